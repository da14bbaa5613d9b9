"""`demo`: a first picture of attention over frames, in seconds and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import refusing
from .parsing import Settings
from .settings import DemoSettings

PICTURE, OVERLAY, TOKENS = "attention-over-frames.png", "overlay.png", "token-frame.png"
PAGE = "map.html"
_OWN = 'python -m ral_kernels attention-map PICTURE... --prompt "..." --model MODEL --out map.html'


def demo(settings: Settings) -> int:
    """Ask the bundled model about real handwritten digits, and draw where it looked."""
    given: DemoSettings = settings.build(DemoSettings)
    folder = Path(given.out).expanduser()
    with refusing("cannot show the demo"):
        folder.mkdir(parents=True, exist_ok=True)
        puzzle, maps = _look(given)
        files = _draw(puzzle, maps, folder)
    time, digit = f"{puzzle.times[puzzle.frame]}s", str(puzzle.digits[puzzle.frame, puzzle.cell])
    share = maps.image_shares[_digit(maps), puzzle.frame]
    print(f"question  {_question(puzzle)}  ({len(maps.images)} frames of real handwritten digits)")
    print(f"answer    {_answer(maps)}  (right: {digit}, in the frame of {time})")
    print(f"looked    {share:.0%} of the digit's attention is on the frame of {time}")
    print(f"wrote     {', '.join(str(file) for file in files)}")
    print(f"your own  {_OWN}")
    return 0


def _look(given: DemoSettings) -> tuple[Any, Any]:
    """A puzzle of scans that no training saw, and the map of the bundled model's answer.

    The frames are drawn without the noise of the training, for people.
    """
    from PIL import Image

    import ral_kernels as rk
    from ral_kernels.viz import Video

    from ..digits import load_pretrained
    from ..digits.puzzles import draw, make_puzzle
    from ..digits.tasks import prompt

    puzzle = make_puzzle("timestamp", given.frames, "test", given.seed, 0)
    model, processor = load_pretrained()
    messages = [{"role": "user", "content": prompt(puzzle, "think")}]
    frames = [Image.fromarray(frame) for frame in draw(puzzle, "test", noise=0.0)]
    assert puzzle.times is not None
    times = [float(time) for time in puzzle.times]
    video = Video(tuple(frames), tuple(times), times[-1] + 1)  # frames as images, with times
    return puzzle, rk.attention_map(
        model, processor, video, messages, max_new_tokens=12, by_layer=True, by_head=True
    )


def _draw(puzzle: Any, maps: Any, folder: Path) -> list[Path]:
    from ral_kernels.viz import attention_over_frames, overlay, token_frame

    digit = _digit(maps)
    attention_over_frames(
        maps,
        question=_question(puzzle),
        answer=_answer(maps),
        names=[f"{time} s" for time in puzzle.times],
        tokens=[0, digit],
        path=folder / PICTURE,
    )
    overlay(maps, puzzle.frame, digit, clip=100, path=folder / OVERLAY)
    token_frame(maps, path=folder / TOKENS)
    maps.to_html(folder / PAGE)
    return [folder / name for name in (PICTURE, OVERLAY, TOKENS, PAGE)]


def _question(puzzle: Any) -> str:
    return f"Which digit is in the {puzzle.colour} tile?"


def _answer(maps: Any) -> str:
    return str(maps.text).partition("<|")[0]  # without the end of the turn


def _digit(maps: Any) -> int:
    """The number of the answer's token in `<think>37s</think><answer>5</answer>`."""
    return min([*maps.tokens, "<answer>"].index("<answer>") + 1, len(maps.tokens) - 1)
