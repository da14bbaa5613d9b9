"""The study of routers: its task, its start, its arms, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import router_study as study

PLAN = study.Plan(start_steps=12, batches=1, every=1)


def test_steps_are_judged_from_the_symbol_before() -> None:
    rules = study.rules()
    assert all(row.sort().values.tolist() == list(range(study.SYMBOLS)) for row in rules)
    ids = torch.tensor([[study.SYMBOLS + 2, 5]])
    for _ in range(study.STEPS):
        ids = torch.cat([ids, rules[2, ids[:, -1:]]], 1)
    assert study.right(ids).all()
    ids[0, 4] = (ids[0, 4] + 1) % study.SYMBOLS  # wrong, and so is the step from it
    assert study.right(ids)[0].tolist() == [True, True, False, False, True, True]
    assert len(study.questions().unique(dim=0)) == 64


@pytest.fixture(scope="module")
def start() -> object:
    return study.make_start(PLAN, 0)


def test_only_routing_learns(start: object) -> None:
    """And the arms differ from the second step on the first rollouts, as the term does."""
    trainable = [name for name, x in start.named_parameters() if x.requires_grad]  # type: ignore[attr-defined]
    assert trainable == ["model.layers.0.mlp.gate.weight"]
    runs = {arm: study.train(PLAN, arm, 0, start) for arm in study.ARMS}
    again = study.train(PLAN, "grpo", 0, start)
    assert again == runs["grpo"]
    for run in runs.values():
        assert [batch for batch, _ in run["curve"]] == [0, 1]
        assert run["curve"][0] == runs["grpo"]["curve"][0]
        first, second, third = run["divergence"]
        assert first == 0.0 < second < third
    # With the sign of the advantage it is another term than without.
    ends = {arm: run["divergence"][-1] for arm, run in runs.items()}
    assert len(set(ends.values())) == len(ends)


@pytest.mark.slow(stands_in="test_only_routing_learns")
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(study, "QUICK", PLAN)
    threads = torch.get_num_threads()
    try:
        assert study.main(["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (file,) = tmp_path.glob("router_study-*.json")
    run = json.loads(file.read_text())
    assert [each["arm"] for each in run["runs"]] == list(study.ARMS)
    assert run["settings"]["seeds"] == 1 and run["settings"]["batches"] == 1
    printed = capsys.readouterr().out
    accuracy = 100 * run["runs"][1]["accuracy"]
    assert f"router-1   {accuracy:.1f}" in printed and "start: " in printed
