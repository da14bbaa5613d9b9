"""A tiny model and a file of JSON lines for the tests of the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from . import tiny


def make(folder: Path) -> Path:
    """The folder with `qwen2_5_vl/`, `rows.jsonl` (still images) and `films.jsonl` (4 frames)."""
    tiny.checkpoint(folder)
    rng = np.random.default_rng(0)

    def picture(path: Path, height: int, width: int) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        return str(path.relative_to(folder))

    rows, films = [], []
    for index in range(8):
        row = {
            "problem": f"What is in picture {index}?",
            "options": ["A. a cat", "B. a dog"],
            "solution": f"<answer>{'AB'[index % 2]}</answer>",
            "problem_type": "multiple choice",
            "data_type": "image",
            "process": "I look at it.",
            "path": picture(folder / f"images/{index}.png", 56, 84),
        }
        rows.append(row)
        for frame in range(4):
            picture(folder / f"films/{index}/frame{frame}.png", 56, 56)
        films.append({**row, "data_type": "video", "path": f"films/{index}"})
    for name, content in (("rows", rows), ("films", films)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    """Settings of a run of seconds, of rows.jsonl."""
    return [
        f"model={folder / 'qwen2_5_vl'}",
        f"data={folder / 'rows.jsonl'}",
        f"output_dir={out}",
        "use_cpu=true",
        "report_to=none",
        "gradient_checkpointing=false",
        "per_device_train_batch_size=4",
        "save_strategy=no",
        *more,
    ]
