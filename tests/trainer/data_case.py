"""Rows in Video-R1's format, images and clips, for the tests of `ral.data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ral.data import load_rows

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CHOICE: dict[str, Any] = {
    "problem": "What barks?",
    "options": ["the cat", "the dog"],
    "solution": "<answer>B</answer>",
    "problem_type": "multiple choice",
    "data_type": "image",
    "path": "red.png",
}
NUMBER: dict[str, Any] = {
    "problem": "How many?",
    "options": [],
    "solution": "<answer>1,234</answer>",
    "problem_type": "numerical",
    "data_type": "video",
    "path": "clip",
    "problem_id": 7,
    "process": "<think>I count them.</think>",
}


def make(folder: Path) -> Path:
    """A red and a green image, 12 frames whose grey is their number, a GIF of 5 such frames."""
    Image.new("RGB", (8, 6), RED).save(folder / "red.png")
    Image.new("RGB", (8, 6), GREEN).save(folder / "green.png")
    clip = folder / "clip"
    clip.mkdir()
    for i in range(12):
        grey(i).save(clip / f"frame{i}.png")
    (clip / "._frame3.png").write_bytes(b"left by a file manager")
    (clip / "times.json").write_text("[]")
    frames = [grey(i) for i in range(5)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return folder


def grey(i: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (10 * i,) * 3)


def greys(images: list[Any]) -> list[int]:
    return [image.getpixel((0, 0))[0] // 10 for image in images]


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    """data.jsonl of rows, or of lines as they are."""
    path = folder / "data.jsonl"
    path.write_text(
        "".join((json.dumps(row) if isinstance(row, dict) else row) + "\n" for row in rows)
    )
    return path


def load(folder: Path, *rows: dict[str, Any] | str, **options: Any) -> Any:
    return load_rows(write(folder, *rows), **options)


def text_of(row: dict[str, Any]) -> str:
    return str(row["prompt"][-1]["content"][-1]["text"])


def parts_of(row: dict[str, Any]) -> list[str]:
    return [part.get("text", part["type"]) for part in row["prompt"][0]["content"]]
