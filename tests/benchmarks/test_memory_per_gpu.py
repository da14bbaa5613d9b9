"""The table of memory per GPU: its counts, and how it grows."""

from __future__ import annotations

import re

import pytest

from benchmarks import memory_per_gpu


def _table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    assert memory_per_gpu.main(arguments) == 0
    rows = re.findall(r"^\| \**(.+?)\** \| \**([\d.]+)\** \|", capsys.readouterr().out, re.M)
    return {what: float(gib) for what, gib in rows}


def test_counts_and_growth(capsys: pytest.CaptureFixture[str]) -> None:
    table = _table(capsys)
    # 8.29 G parameters, of which 0.68 G see; 16 bytes each of the others over 8 GPUs
    assert table["trained weights, gradients, Adam"] == pytest.approx(7.62e9 * 2 / 2**30, rel=1e-2)
    halved = _table(capsys, "--gpus", "4")
    for name in ("trained weights, gradients, Adam", "frozen weights"):
        assert halved[name] == pytest.approx(2 * table[name], rel=0.05)
    long = _table(capsys, "--visual-tokens", "65536")
    for name in ("checkpointed activations", "RAL: snapshots of a rollout batch"):
        assert 1.8 < long[name] / table[name] < 2.05
    lora = _table(capsys, "--lora-rank", "64", "--no-vllm")
    assert "TRL's reference model (beta > 0)" not in lora and not any(
        "vLLM" in name for name in lora
    )
    assert (
        lora["trained weights, gradients, Adam"] < 0.05 * table["trained weights, gradients, Adam"]
    )
    update = sum(gib for what, gib in lora.items() if "in all" not in what)
    assert lora["update, in all"] == pytest.approx(update, abs=0.1)
