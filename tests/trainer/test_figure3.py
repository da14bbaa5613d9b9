"""The study behind figure3.py: its arms, its controls, its statistics, and a run of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import figure3
from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, BUDGET, QUICK
from benchmarks.study.evaluate import TargetAttention, sharpened
from benchmarks.study.statistics import estimate, paired
from benchmarks.study.tasks import TASKS
from ral import RALConfig
from ral.digits.model import make_model, make_processor, save_start


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> one.Plan:
    """A study whose start and teacher are random models."""
    plan = one.Plan(tmp_path_factory.mktemp("study"), 1, 8)
    for task in TASKS.values():
        for style in ("think", "direct"):
            save_start(plan.start(task, style))
        save_start(plan.teacher(task), make_model(seed=1))
    return plan


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_arms(arm) -> None:
    """Each is a configuration that is not refused, and differs from what it is compared with."""
    config = RALConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to=[], **{**BUDGET, **arm.settings}
    )
    assert config.needs_teacher == arm.teacher
    assert config.generation_batch_size == one.ROLLOUTS
    others = {other.name: other for other in ARMS}
    if arm.against is not None:
        against = others[arm.against]
        same = (arm.settings, arm.control, arm.sharpened) == (
            against.settings, against.control, against.sharpened,
        )  # fmt: skip
        assert not same and against.style == arm.style


def test_controls_change_what_attention_learns_from_and_nothing_else(plan) -> None:
    losses = {}
    for name in ("ral", "ral_flipped", "ral_shuffled"):
        arm = next(arm for arm in ARMS if arm.name == name)
        trainer = one._trainer(plan, TASKS["frames"], arm, seed=0, batches=1)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        generator = torch.Generator().manual_seed(0)  # a random start is never right
        inputs["advantages"] = torch.randn(inputs["advantages"].shape, generator=generator)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.05)
        torch.manual_seed(0)
        trainer._compute_loss(trainer.model, inputs)
        metrics = trainer._metrics["train"]
        losses[name] = (metrics["attn/loss"][0], metrics["entropy"][0], metrics["kl"][0])
    attention, *others = zip(*losses.values(), strict=True)
    assert attention[1] == pytest.approx(-attention[0], rel=1e-4) != 0.0
    assert attention[2] != pytest.approx(attention[0], rel=1e-3)
    for values in others:
        assert values == pytest.approx([values[0]] * 3)


def test_target_attention_and_sharpening() -> None:
    """Against the model's own attention maps: the share on the frame that is asked about."""
    import ral_kernels as rk

    model, processor = make_model(attn_implementation="eager"), make_processor()
    watch = TargetAttention(processor, TASKS["frames"], "think", 4, 6)
    shares = watch(model)
    maps = model(**watch.inputs, output_attentions=True, use_cache=False).attentions
    ids = rk.spans_for(model.config, watch.inputs, "frame").spans.ids
    for share, attention in zip(shares, maps, strict=True):
        row = attention.mean(1)[:, watch.row]
        visual = (row * (ids >= 0)).sum(-1)
        target = (row * (ids == watch.targets[:, None])).sum(-1)
        assert share == pytest.approx(float((target / visual).mean().detach()), rel=1e-4)
    with sharpened(model, 3.0):
        assert watch(model) != pytest.approx(shares, rel=1e-3)
    assert watch(model) == pytest.approx(shares)


def test_statistics() -> None:
    # Student's t for 4 degrees of freedom: 2.776; the standard error of 1..5 is sqrt(0.5)
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.half_width == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert math.isnan(estimate([0.5]).half_width)
    difference = paired({0: 0.5, 1: 0.7, 2: 0.1}, {1: 0.6, 2: 0.2, 9: 1.0})
    assert difference is not None and difference.seeds == 2
    assert difference.mean == pytest.approx(0.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_study(plan, tmp_path: Path, capsys) -> None:
    arms = ["grpo", "ral"]
    for arm in arms:
        result = one.run(plan, "frames", arm, 0)
        assert set(result["accuracy"]) == {str(size) for size in TASKS["frames"].evaluated}
        assert all(
            0 <= x <= 1 for x in [*result["accuracy"].values(), *result["grounded"].values()]
        )
        assert [step for step, _ in result["target_curve"]] == [0]
    before = plan.result("frames", "ral", 0).stat().st_mtime_ns
    arguments = ["--tasks", "frames", "--arms", *arms, "--seeds", "1", "--batches", "1"]
    arguments += ["--test-rows", "8", "--workers", "1", "--runs", str(plan.folder)]
    assert figure3.main([*arguments, "--out", str(tmp_path)]) == 0
    assert plan.result("frames", "ral", 0).stat().st_mtime_ns == before  # runs are not repeated
    (file,) = tmp_path.glob("*.json")
    study = json.loads(file.read_text())
    assert [run["arm"] for run in study["runs"]] == ["start", *arms]
    assert file.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "GRPO + RAL, λ = 5" in printed and "difference at 32" in printed


def test_quick_arms_have_what_they_are_compared_with() -> None:
    by_name = {arm.name: arm for arm in ARMS}
    for name in QUICK:
        assert by_name[name].against in {None, *QUICK}
