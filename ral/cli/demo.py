"""`demo`: a first picture of attention over frames, in seconds and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import refusing
from .parsing import Settings
from .settings import DemoSettings

PICTURE, OVERLAY, TOKENS = "attention-over-frames.png", "overlay.png", "token-frame.png"
_OWN = 'python -m ral_kernels attention-map FRAME... --prompt "..." --model FOLDER --out map.png'


def demo(settings: Settings) -> int:
    """Ask the bundled model about real handwritten digits, and draw where it looked."""
    given: DemoSettings = settings.build(DemoSettings)
    with refusing("cannot show the demo"):
        puzzle, maps = _look(given)
        folder = Path(given.out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        files = _draw(puzzle, maps, folder)
    time, digit = f"{puzzle.times[puzzle.frame]}s", str(puzzle.digits[puzzle.frame, puzzle.cell])
    share = maps.image_shares[_place(maps, "digit"), puzzle.frame]
    print(f"question  {_question(puzzle)}  ({len(maps.images)} frames of real handwritten digits)")
    print(f"answer    {maps.text}  (right: {digit}, in the frame of {time})")
    print(f"looked    {share:.0%} of the digit's attention is on the frame of {time}")
    print(f"wrote     {', '.join(str(file) for file in files)}")
    print(f"your own  {_OWN}")
    return 0


def _look(given: DemoSettings) -> tuple[Any, Any]:
    """A puzzle of scans that no training saw, and the map of the bundled model's answer."""
    import ral_kernels as rk

    from ..digits import load_pretrained
    from ..digits.puzzles import draw, make_puzzle
    from ..digits.tasks import NOISE, prompt

    puzzle = make_puzzle("timestamp", given.frames, "test", given.seed, 0)
    model, processor = load_pretrained()
    messages = [{"role": "user", "content": prompt(puzzle, "think")}]
    frames = list(draw(puzzle, "test", NOISE["timestamp"]))
    return puzzle, rk.attention_map(model, processor, frames, messages, max_new_tokens=12)


def _draw(puzzle: Any, maps: Any, folder: Path) -> list[Path]:
    from ral_kernels import viz

    digit = _place(maps, "digit")
    viz.attention_over_frames(
        maps,
        question=_question(puzzle),
        names=[f"{time} s" for time in puzzle.times],
        tokens=[0, _place(maps, "time"), digit],
        path=folder / PICTURE,
    )
    viz.overlay(maps, puzzle.frame, digit, path=folder / OVERLAY)
    viz.token_frame(maps, path=folder / TOKENS)
    return [folder / name for name in (PICTURE, OVERLAY, TOKENS)]


def _question(puzzle: Any) -> str:
    return f"Which digit is in the {puzzle.colour} tile?"


def _place(maps: Any, what: str) -> int:
    """The number of a token of `<think>37s</think><answer>5</answer>`."""
    after = {"time": "<think>", "digit": "<answer>"}[what]
    return min([*maps.tokens, after].index(after) + 1, len(maps.tokens) - 1)
