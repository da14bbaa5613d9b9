"""`ral train --preset paper` with vLLM, and `ral eval` of what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.engines.vllm import models
from tests.trainer import cli_case

ROOT = Path(__file__).resolve().parents[3]


def ral(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ral", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_papers_preset_trains_with_vllm(tmp_path: Path) -> None:
    models.save(tmp_path, "qwen2_5_vl")  # which the case takes as it is
    folder, out = cli_case.make(tmp_path), tmp_path / "run"
    ral(
        "train", "--preset", "paper", *cli_case.words(folder, out), "bf16=false",
        "use_vllm=true", "vllm_gpu_memory_utilization=0.1", "vllm_max_model_length=512",
        "steps_per_generation=4", "max_completion_length=8", "max_steps=4", "logging_steps=1",
    )  # fmt: skip
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ratios = [
        log["sampling/importance_sampling_ratio/mean"]
        for log in logs
        if "sampling/importance_sampling_ratio/mean" in log
    ]
    # Two rollout batches. The ratio is of whole responses here, less the mass of media tokens.
    assert len(ratios) == 2 and min(ratios) > 0.8
    table = ral(
        "eval", f"model={out}", f"data={folder / 'rows.jsonl'}", f"out={tmp_path / 'eval.json'}",
        "max_new_tokens=8",
    )  # fmt: skip
    assert "accuracy" in table
    [cell] = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert cell["rows"] == 8 and cell["visual_tokens"] == 6
