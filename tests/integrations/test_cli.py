"""`python -m ral_kernels`, on a tiny checkpoint and real pictures."""

from __future__ import annotations

import builtins
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ral_kernels as rk
from ral_kernels import cli, viz
from ral_kernels.runtime import backends, cuda_library

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image

from benchmarks.harness.photographs import load, pan

from . import films, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a picture, and a folder of frames whose names do not sort as numbers do."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_checkpoint.save(folder / "model")
    load("coffee.png").save(folder / "coffee.png")
    (folder / "frames").mkdir()
    for number, frame in enumerate(pan(11, 56, 84)):
        frame.save(folder / "frames" / f"frame{number}.png")
    (folder / "frames" / "notes.txt").write_text("not a picture")
    (folder / "empty").mkdir()
    (folder / "broken.mp4").write_bytes(b"no film at all" * 50)
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    return folder


def command(folder: Path, *images: str, **options: Any) -> list[str]:
    """The arguments of attention-map, with defaults of the tests."""
    chosen = {
        "prompt": "What is in the picture?",
        "model": str(folder / "model"),
        "out": str(folder / "map.png"),
        "response": "A cup of coffee",
        **options,
    }
    words = ["attention-map", *(str(folder / image) for image in images or ("coffee.png",))]
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_a_video(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the model's video path with --video, and as several images without."""
    pytest.importorskip("av")
    film = str(films.write(tmp_path / "film.mp4", films.steps(20, (84, 56))))
    out = tmp_path / "map.npz"
    words = command(folder, out=out)
    words.remove(str(folder / "coffee.png"))
    assert cli.main([*words, "--video", film, "--frames", "4"]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    made = viz.AttentionMap.load(out)
    assert made.kinds == ("frame",) * 2 and made.times == pytest.approx((0.0, 1.3))
    assert cli.main([*words, film, "--fps", "4"]) == 0
    made = viz.AttentionMap.load(out)
    assert made.kinds == ("frame",) * 8 and made.times[1] == pytest.approx(0.3)


def test_a_page_and_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "map.html", tmp_path / "map.png"
    more = ["--layer", "all", "--heads", "--relative-to", "Describe the image."]
    assert cli.main([*command(folder, out=page), *more]) == 0
    assert cli.main([*command(folder, out=picture), *more[:3]]) == 0
    layers = tmp_path / "map-layers.png"
    assert capsys.readouterr().out.split() == [str(page), str(picture), str(layers)]
    assert "Describe the image." in page.read_text() and size_of(layers)[0] > 500


@pytest.mark.slow(stands_in="test_a_picture_for_each_image")
@pytest.mark.long
def test_from_the_shell(folder: Path, tmp_path: Path) -> None:
    """Once as a person calls it: generating, with tokens chosen."""
    out = tmp_path / "map.png"
    words = command(folder, out=out, response=None, max_new_tokens=6, tokens="0,2-4", layer=-1)
    done = subprocess.run(
        [sys.executable, "-m", "ral_kernels", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)] and "answer: " in done.stderr
    assert "Traceback" not in done.stderr and size_of(out)[0] > 500


def test_a_picture_for_each_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map.png"
    images = ("coffee.png", "frames/frame3.png")
    assert cli.main(command(folder, *images, out=out, granularity="token")) == 0
    made = [tmp_path / "map-1.png", tmp_path / "map-2.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    assert not out.exists() and all(path.stat().st_size > 5000 for path in made)


def test_one_token_is_one_large_picture(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    assert cli.main(command(folder, out=out, tokens="1")) == 0
    one = size_of(out)
    assert cli.main(command(folder, out=out, clip=100)) == 0
    assert size_of(out)[0] != one[0] and 800 < one[0] < 1100


def test_a_folder_of_frames(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    shown: list[Any] = []
    original = cli._open

    def opened(path: Any, *sampling: Any) -> Any:
        shown.append(path)
        return original(path, *sampling)

    monkeypatch.setattr(cli, "_open", opened)
    out = tmp_path / "strip.png"
    words = command(folder, "frames", out=out, frames=5, dtype="float32", attn="eager", layer=0)
    assert cli.main([*words, "--layer", "1"]) == 0
    made = [out, tmp_path / "strip-tokens.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    assert [path.stem for path in shown] == [f"frame{n}" for n in (0, 2, 5, 8, 10)]
    assert all(path.stat().st_size > 5000 for path in made)


def test_frames_are_in_the_order_of_their_numbers(folder: Path) -> None:
    paths = cli._image_paths([str(folder / "frames")], None)
    assert [path.name for path in paths] == [f"frame{number}.png" for number in range(11)]
    assert cli._image_paths([str(folder / "frames")], 1) == paths[:1]


FAILING: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no image": ({}, ("nothing.png",), "there is no image "),
    "a broken image": ({}, ("broken.png",), "as an image: "),
    "a picture for Ghostscript": ({}, ("eps.png",), "cannot identify image file"),
    "no frames": ({}, ("empty",), "has no images"),
    "no model folder": ({"model": "/no/such/folder"}, (), "there is no model folder /no/such"),
    "a folder without a model": ({"model": "{folder}/frames"}, (), "cannot load "),
    "no folder for the picture": ({"out": "/no/such/folder/map.png"}, (), "there is no folder"),
    "an odd suffix": (
        {"out": "{folder}/map.txt"},
        (),
        "--out must end in .png, .jpg, .webp, .pdf, .svg, .html or .npz",
    ),
    "a layer too many": ({"layer": 7}, (), "layers must lie in"),
    "a token too many": ({"tokens": "40"}, (), "--tokens must lie in 0-3"),
    "a percentile": ({"clip": 0}, (), "--clip must be a percentile"),
    "a device": ({"device": "abacus"}, (), "--device"),
    "an empty answer": ({"response": ""}, (), "at least one token"),
    "an attention": ({"attn": "abacus"}, (), "cannot load "),
    "no video": ({"video": "/no/such/film.mp4"}, (), "there is no video file /no/such/film.mp4"),
    "a broken video": ({"video": "{folder}/broken.mp4"}, (), "as a video: Invalid data"),
    "two rates": ({"fps": 2, "frames": 3}, (), "--fps and --frames exclude each other"),
}


@pytest.mark.parametrize("name", FAILING)
def test_errors_are_one_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, images, message = FAILING[name]
    filled = {
        key: value.format(folder=folder) if isinstance(value, str) else value
        for key, value in options.items()
    }
    assert cli.main(command(folder, *images, **filled)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ral_kernels: ") and message in said


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "COMMAND"),
        (["attention-map", "x.png"], "--prompt"),
        (["attention-map", "x.png", "--tokens", "3-1"], "rising ranges"),
        (["attention-map", "x.png", "--tokens", "one"], "numbers such as 0,3-7"),
        (["attention-map", "x.png", "--max-new-tokens", "0"], "at least 1"),
        (["attention-map", "x.png", "--granularity", "pixel"], "invalid choice"),
        (["attention-map", "x.png", "--fps", "0"], "must be positive"),
        (["attention-map", "x.png", "--layer", "some"], "invalid _layer value"),
        (["paint"], "invalid choice"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "matplotlib", "PIL"])
def test_missing_packages(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(command(folder)) == 2
    said = capsys.readouterr().err
    assert {"PIL": "pillow"}.get(package, package) in said and "pip install" in said


def test_a_bug_keeps_its_trace(folder: Path, monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr("ral_kernels.integrations.transformers.attention_map._policies", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(command(folder))


def test_layers_and_media_that_exclude_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(folder, layer="all"), "--layer", "1"]) == 2
    assert "--layer all stands for every layer" in capsys.readouterr().err
    words = command(folder)
    words.remove(str(folder / "coffee.png"))
    assert cli.main(words) == 2
    assert "needs an IMAGE or a --video" in capsys.readouterr().err


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(rk.available_backends())
    assert any(line.split() == ["reference", "yes"] for line in lines)


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the automatic choice does, and why: the kernels that no GPU has run are skipped."""
    monkeypatch.setattr(backends._tables["attention"]["cuda"], "available", lambda: None)
    monkeypatch.setattr(cuda_library, "MEASURED", False)
    assert cli.main(["info"]) == 0
    head, *ops = capsys.readouterr().out.split("\n\n")
    assert head.startswith(f"ral_kernels {rk.__version__}\n") and "ral_cuda: " in head
    found = {op.split(":")[0]: op for op in ops}
    assert set(found) == {"attention", "policy", "divergence", "policy_divergence"}
    assert "  cuda       skipped: its kernels have run on no GPU yet" in found["attention"]
    assert "  reference  yes" in found["attention"]


def test_info_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a report of a bug needs, with py-cpuinfo and without."""
    monkeypatch.setenv("RAL_CPU_ISA", "portable")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ral_kernels"] == rk.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_variant"] == "portable" or "not built" in found["cpu_variant"]
    assert found["environment"]["RAL_CPU_ISA"] == "portable"
    assert list(found["backends"]["attention"]) == ["cuda", "triton", "cpu", "reference"]
    library = found["libraries"]["ral_cpu"]
    if library["missing"] is None:
        content = Path(library["path"]).read_bytes()
        assert library["sha256"] == hashlib.sha256(content).hexdigest()
    assert {"name", "family", "model"} <= set(found["cpu"])
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["name"]


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """It imports neither transformers nor matplotlib."""
    code = (
        "import sys; from ral_kernels.cli import main\n"
        "try: main(['attention-map', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'transformers', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert "--granularity" in done.stdout


def test_progress_with_and_without_tqdm(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    with cli._progress("writing tokens", 3) as step:
        step()  # not a terminal: nothing is written
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli._progress("writing tokens", 3) as step:
        step()
        step()
    assert "writing tokens" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli._progress("loading the model", 3) as step:
        step()
    assert capsys.readouterr().err == "loading the model ...\n"
