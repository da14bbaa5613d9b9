"""The command line: `python -m ral_kernels`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .media.errors import PictureError, short_path
from .media.pictures import PICTURE_SUFFIXES, read_pictures
from .media.video_file import is_video
from .media.videos import evenly, read_video

DTYPES = ("auto", "float32", "bfloat16", "float16")
FAILED = 2  # exit status of an error that the user can fix, as in argparse


class Refused(Exception):
    """An error that the user can fix; its text says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line, default `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 2 with a message on stderr.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except Refused as error:
        print(f"ral_kernels: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ral_kernels",
        description="Attention whose share of each span of keys has a gradient.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_attention_map(commands)
    backends = commands.add_parser(
        "backends",
        help="which backends work on this machine",
        description="Which backends work on this machine, and why the others do not.",
    )
    backends.set_defaults(run=_backends)
    info = commands.add_parser(
        "info",
        help="versions, devices, compiled libraries, and which backend each op chooses",
        description="What this installation has: versions, devices, compiled libraries, and which "
        "backend each op chooses with backend=None, with the reason why others are skipped.",
    )
    info.add_argument("--json", action="store_true", help="as JSON, for a report of a bug")
    info.set_defaults(run=_info)
    return parser


def _backends(given: argparse.Namespace) -> int:
    from . import available_backends

    found = available_backends()
    for name, answer in found.items():
        print(f"{name:<{max(map(len, found))}}  {answer}")
    return 0


def _info(given: argparse.Namespace) -> int:
    from . import info

    if given.json:
        print(json.dumps(info.facts(), indent=1))
    else:
        print(*info.lines(), sep="\n")
    return 0


def _add_attention_map(commands: Any) -> None:
    command = commands.add_parser(
        "attention-map",
        help="draw where a vision-language model looks as it answers",
        description="Draw where a vision-language model looks as it writes each token of its "
        "answer: over the image (--granularity token, the default for one image), or along the "
        "frames (--granularity frame, the default for several).",
    )
    command.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files (of an animation the first frame, of a video all, as images), or a "
        "folder of frames",
    )
    command.add_argument(
        "--video", action="append", default=[], metavar="FILE",
        help="a video or GIF, through the model's own video path; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--fps", type=_positive_number, metavar="N",
        help="frames a second that are taken of a video; default 2",
    )  # fmt: skip
    command.add_argument("--prompt", required=True, help="the question about the images")
    command.add_argument("--model", required=True, help="folder of a model, or its name on the Hub")
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        help="what to write: map.png (or .jpg, .pdf, .svg), map.html to explore, map.npz to keep",
    )
    command.add_argument("--response", help="look at this answer instead of generating one")
    command.add_argument("--max-new-tokens", type=_positive, default=32, help="default %(default)s")
    command.add_argument(
        "--tokens", type=_ranges, metavar="0,3-7", help="which tokens of the answer; default all"
    )
    command.add_argument(
        "--layer", type=_layer, action="append", metavar="N",
        help="decoder layer, negative from the end; several are averaged; 'all' draws each, too; "
        "default -1",
    )  # fmt: skip
    command.add_argument("--heads", action="store_true", help="draw each head, too")
    command.add_argument(
        "--relative-to", metavar="PROMPT",
        help="divide by the map of a neutral prompt, such as 'Describe the image.': attention "
        "sinks vanish",
    )  # fmt: skip
    command.add_argument(
        "--granularity", choices=("token", "frame"),
        help="a grid of visual tokens over each image, or a share for each image",
    )  # fmt: skip
    command.add_argument(
        "--frames",
        type=_positive,
        metavar="N",
        help="at most this many images, and frames of each video, evenly spread",
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, ...; default %(default)s")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; default the checkpoint's"
    )
    command.add_argument(
        "--attn", metavar="NAME", help="attn_implementation of the model; default transformers'"
    )
    command.add_argument(
        "--clip", type=float, default=98.0, metavar="PERCENTILE",
        help="where colours end if a few visual tokens are far above the rest; 100 for never; "
        "default %(default)s",
    )  # fmt: skip
    command.set_defaults(run=_attention_map)


def _attention_map(given: argparse.Namespace) -> int:
    if not given.images and not given.video:
        raise Refused("attention-map needs an IMAGE or a --video")
    if given.fps is not None and given.frames is not None:
        raise Refused("--fps and --frames exclude each other")
    paths = _image_paths(given.images, given.frames)
    _check_out(given.out)
    if not 0 < given.clip <= 100:
        raise Refused(f"--clip must be a percentile in (0, 100]; got {given.clip:g}")
    layers = given.layer or [-1]
    if "all" in layers and len(layers) > 1:
        raise Refused("--layer all stands for every layer; give no other --layer with it")
    _check_packages()
    pictures = [picture for path in paths for picture in _open(path, given)]
    videos = [_open_video(Path(name), given) for name in given.video]
    model, processor = _load(given)
    from .integrations.transformers.attention_map import attention_map

    every = "all" in layers
    steps = given.max_new_tokens if given.response is None else 1
    with _progress("writing tokens", steps) as step, _refusing("cannot map this"):
        maps = attention_map(
            model,
            processor,
            pictures or None,
            given.prompt,
            videos=videos or None,
            response=given.response,
            max_new_tokens=given.max_new_tokens,
            layers="all" if every else layers,
            by_layer=every,
            by_head=given.heads,
            relative_to=given.relative_to,
            on_token=step,
        )
    del model
    print(f"answer: {maps.text!r}", file=sys.stderr)
    for path in _draw(maps, given):
        print(path)
    return 0


def _draw(maps: Any, given: argparse.Namespace) -> Iterator[Path]:
    """Write the pictures, the page or the file, and yield the path of each."""
    from . import viz

    count = len(maps.tokens)
    tokens = list(range(count)) if given.tokens is None else given.tokens
    if max(tokens) >= count:
        raise Refused(f"--tokens must lie in 0-{count - 1}, the answer's; got {max(tokens)}")
    chosen = maps.select(tokens)
    out: Path = given.out
    if out.suffix.lower() in (".html", ".npz"):
        with _refusing(f"cannot write {out}"):
            yield chosen.to_html(out) if out.suffix.lower() == ".html" else chosen.save(out)
        return
    images = range(len(maps.images))
    granularity = given.granularity or ("token" if len(images) == 1 else "frame")
    if granularity == "token":
        for image in images:
            path = out if len(images) == 1 else _beside(out, str(image + 1))
            if len(tokens) == 1:
                viz.overlay(maps, image, tokens[0], clip=given.clip, path=path)
            else:
                viz.token_grid(maps, image, tokens, clip=given.clip, path=path)
            yield path
    else:
        viz.film_strip(chosen, clip=given.clip, path=out)
        yield out
        path = _beside(out, "tokens")
        viz.token_frame(chosen, path=path)
        yield path
    if maps.parts is not None:
        for image in images:
            path = _beside(out, "layers" if len(images) == 1 else f"layers-{image + 1}")
            viz.layer_head_grid(chosen, image, clip=given.clip, path=path)
            yield path


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


# -- what is given --------------------------------------------------------------------------------


def _image_paths(given: Sequence[str], most: int | None) -> list[Path]:
    """The files; those of a folder in the order of the numbers in their names."""
    paths: list[Path] = []
    for name in given:
        path = Path(name)
        if os.path.isdir(name):  # `Path.is_dir` raises for a name that is too long
            inside = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
            if not inside:
                raise Refused(f"{path} has no images ({', '.join(PICTURE_SUFFIXES)})")
            paths += sorted(inside, key=lambda file: _numbers_as_numbers(file.name))
        elif os.path.isfile(name):
            paths.append(path)
        else:
            raise Refused(f"there is no image file {short_path(path)}")
    if most is not None:
        paths = [paths[index] for index in evenly(len(paths), most)]
    return paths


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open(path: Path, given: argparse.Namespace) -> list[Any]:
    """A picture, or a video whose frames are to be images."""
    if is_video(path):
        return [_open_video(path, given)]
    try:
        return read_pictures(path)
    except (OSError, PictureError) as error:
        raise Refused(
            f"cannot read {path} as an image: {getattr(error, 'reason', error)}"
        ) from error


def _open_video(path: Path, given: argparse.Namespace) -> Any:
    if not os.path.isfile(path):
        raise Refused(f"there is no video file {short_path(path)}")
    try:
        return read_video(path, fps=given.fps, num_frames=given.frames)
    except (ImportError, OSError, PictureError) as error:
        raise Refused(
            f"cannot read {path} as a video: {getattr(error, 'reason', error)}"
        ) from error


def _check_out(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise Refused(f"--out: there is no folder {path.parent}")
    endings = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg", ".html", ".npz")
    if path.suffix.lower() not in endings:
        raise Refused(
            f"--out must end in .png, .jpg, .webp, .pdf, .svg, .html or .npz; got {path.name}"
        )


def _check_packages() -> None:
    """Refuse before a model is loaded, which may take minutes."""
    from .integrations.transformers.registration import check_transformers

    try:
        check_transformers("attention-map")
    except ImportError as error:
        raise Refused(str(error)) from error
    for package, name in (("matplotlib", "matplotlib"), ("PIL", "pillow")):
        try:
            __import__(package)
        except ImportError as error:
            raise Refused(
                f"attention-map needs {name}: pip install matplotlib pillow ({error})"
            ) from error


def _load(given: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    import transformers

    from .integrations.transformers.processors import load_processor

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = Path(given.model).expanduser()
    if not path.is_dir() and (given.model.count("/") != 1 or given.model[0] in "./~"):
        raise Refused(f"there is no model folder {given.model}, and that is not a name on the Hub")
    name = str(path) if path.is_dir() else given.model
    options = {} if given.attn is None else {"attn_implementation": given.attn}
    with _progress("loading the model", 2) as step, _refusing(f"cannot load {given.model}"):
        try:
            device = torch.device(given.device)
        except RuntimeError as error:
            raise Refused(f"--device: {_first_line(error)}") from error
        trusted = given.trust_remote_code
        processor = load_processor(name, trust_remote_code=trusted)
        step()
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=given.dtype, trust_remote_code=trusted, **options
        )
        try:
            model = model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            raise Refused(f"--device {given.device}: {_first_line(error)}") from error
        step()
    return model, processor


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Errors that the user can fix become one line; others are bugs and keep their trace."""
    import torch

    try:
        yield
    except (
        ImportError, OSError, ValueError, NotImplementedError, torch.OutOfMemoryError,
    ) as error:  # fmt: skip
        raise Refused(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "trust_remote_code" in str(error):
        return " ".join(lines)  # the last one says how
    return lines[0] if lines else type(error).__name__


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Any]:
    """A function to call at each step; on a terminal with tqdm it moves a progress bar."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{what} ...", file=sys.stderr)
        yield lambda: None
        return
    with tqdm(total=steps, desc=what, leave=False) as bar:
        yield bar.update


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive; got {text}")
    return value


def _layer(text: str) -> int | str:
    return "all" if text == "all" else int(text)


def _ranges(text: str) -> list[int]:
    """Numbers such as 0,3-7."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"must be numbers such as 0,3-7; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"must be rising ranges; got {part.strip()!r}")
        chosen += range(first, last + 1)
    return chosen
