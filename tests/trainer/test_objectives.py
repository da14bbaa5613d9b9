"""The evidence term, value and gradient, against eager's full maps; schedules; its mean."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ral import RALTrainer, evidence
from ral.cli.main import main
from ral.cli.progress import read_metrics
from ral.objectives import EvidenceLoss, Schedule, evidence_share
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, cli_case, evidence_case, tiny
from .test_cli import REWARD, RL
from .test_resuming import after, resumed, same_weights


@dataclass(frozen=True)
class Case:
    """Settings of a trainer. Without others the evidence term alone trains, on all rollouts."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    family: str = "qwen2_5_vl"
    lora: bool = False
    tools: bool = False


CASES = (
    Case("cross_entropy_all_layers", {"evidence_layers": "all"}),
    Case("kl_heads_of_one_layer", {"evidence_divergence": "kl", "evidence_floor": 0.2,
                                   "evidence_heads": [0, 3], "evidence_layers": 0}),
    Case("jsd_good_heads", {"evidence_divergence": "jsd", "evidence_on": "good",
                            "evidence_heads": [1, 2, 3]}),
    Case("reverse_kl_by_reward", {"evidence_divergence": "reverse_kl", "evidence_on": "good",
                                  "evidence_min_reward": 3.0}),
    Case("mean_of_means", {"attn_reduction": "sequence_mean", "evidence_on": "good"}),
    Case("accumulated", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    Case("one_step_a_batch", {"num_iterations": 1, "steps_per_generation": 1}),
    Case("own_query", {"attn_rows": "token"}),
    Case("lora", lora=True),
    Case("checkpointed", {"gradient_checkpointing": True}),
    Case("qwen3_vl", family="qwen3_vl"),
    Case("ral_attention", {"model_init_kwargs": {"attn_implementation": "ral"}}),
    Case("spans_for_ral", {"attn_granularity": "image", "attn_coef": 0.0}),
    Case("tools", {"evidence_on": "good", "attn_reduction": "sequence_mean"}, tools=True),
)  # fmt: skip
QUICK = ("cross_entropy_all_layers", "jsd_good_heads", "tools")
slow = pytest.mark.slow(stands_in="test_evidence_from_eager_maps")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


class WithTools(RALTrainer):
    """Tokens 2 and 3 of each response are a tool's, as TRL's loop over turns says it."""

    def _generate(self, *args: Any, **named: Any) -> Any:
        made = list(super()._generate(*args, **named))
        made[2] = [[int(place not in (2, 3)) for place in range(len(ids))] for ids in made[1]]
        return tuple(made)


def written(inputs: dict[str, Any]) -> Tensor:
    """[B, C], 1 for the tokens that the policy wrote."""
    mask: Tensor = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    return mask


def trainer_of(path: Path, tmp_path: Path, lora: bool = False, **config: Any) -> Any:
    settings = {
        "train_dataset": evidence_case.dataset(), "attn_coef": 0.0, "rl_coef": 0.0,
        "evidence_coef": 2.0, "evidence_sigma": 0.0, "evidence_on": "all",
        "peft_config": tiny.lora() if lora else None,
    }  # fmt: skip
    return tiny.trainer(path, tmp_path, **{**settings, **config})


def loss_by_hand(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Σ over the chosen rollouts' tokens of D(p over visual tokens, evidence), over layers."""
    args = trainer.args
    visual = inputs["mm_token_type_ids"] == 1
    evidence = evidence_case.evidence_mask(trainer, inputs).float()
    given = evidence.any(-1)
    floor = args.evidence_floor * given[:, None] * visual / visual.sum(-1, keepdim=True)
    r = (1 - args.evidence_floor) * evidence / evidence.sum(-1, keepdim=True).clamp(min=1)
    even = visual / visual.sum(-1, keepdim=True)  # any finite value: these rows do not count
    r = torch.where(given[:, None], r + floor, even)[:, None]
    heads = args.evidence_heads or None
    maps = evidence_case.maps(model, inputs, heads, rows=args.attn_rows)
    default = args.attn_layers if args.evidence_layers is None else args.evidence_layers
    layers = range(len(maps)) if default == "all" else [default]
    values = []
    for layer in layers:
        p = maps[layer] * visual[:, None]
        p = p / p.sum(-1, keepdim=True)
        if args.evidence_divergence == "cross_entropy":
            values.append(-torch.where(r > 0, r * p.clamp(min=1e-30).log(), 0.0).sum(-1))
        else:
            values.append(by_hand.divergence(p, r.expand_as(p), args.evidence_divergence))
    chosen = given.clone()
    if args.evidence_on == "good":
        rewards = trainer._rewards[inputs["rollout_index"]]
        least = args.evidence_min_reward
        chosen &= inputs["advantages"] > 0 if least is None else rewards >= least
    assert chosen.any() and (args.evidence_on == "all" or not chosen.all())
    tokens = written(inputs) * chosen[:, None]
    mean = torch.where(chosen[:, None], torch.stack(values).mean(0), 0.0)
    # the mean over a step's chosen tokens, of all micro-batches: here this one's part of it
    whole = trainer._buffered_inputs
    share = args.steps_per_generation / args.gradient_accumulation_steps
    everyone = [evidence_case.evidence_mask(trainer, part).any(-1) for part in whole]
    if args.evidence_on == "good":
        least = args.evidence_min_reward
        good = [
            part["advantages"] > 0
            if least is None
            else trainer._rewards[part["rollout_index"]] >= least
            for part in whole
        ]
        everyone = [a & b for a, b in zip(everyone, good, strict=True)]
    if args.attn_reduction == "sequence_mean":
        of_row = (mean * tokens).sum(-1) / written(inputs).sum(-1)
        return share * of_row.sum() / sum(each.sum() for each in everyone)
    counts = [
        (written(part) * each[:, None]).sum() for part, each in zip(whole, everyone, strict=True)
    ]
    return share * (mean * tokens).sum() / sum(counts)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_evidence_from_eager_maps(
    case: Case, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", case.family)
    classes = {"trainer_class": WithTools} if case.tools else {}
    trainer = trainer_of(path, tmp_path, case.lora, **classes, **case.config)
    torch.manual_seed(1)
    inputs = by_hand.batch_of(trainer)
    assert case.tools == ("tool_mask" in inputs and not inputs["tool_mask"].all())
    by_hand.stepped(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)
    model = trainer.model.get_base_model() if case.lora else trainer.model
    with by_hand.weights(model, None):
        wanted_loss = 2.0 * loss_by_hand(trainer, model, inputs)
        wanted = gradients(trainer.model, wanted_loss)
    assert wanted_loss > 0.01
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(got, wanted, 1e-5)
    logged = trainer._metrics["train"]
    assert logged["evidence/loss"][0] * 2 * trainer.args.gradient_accumulation_steps > 0
    assert 0 < logged["evidence/share"][0] < 1 and 0 < logged["evidence/rollouts"][0] <= 1


def test_credit_goes_to_what_the_policy_wrote(path: Path, tmp_path: Path) -> None:
    """Of a response with a tool's tokens, whose weights are 0: the others' sum stays GRPO's."""
    trainer = trainer_of(path, tmp_path, trainer_class=WithTools, credit="looking")
    inputs = by_hand.batch_of(trainer)
    mask, advantages = written(inputs), inputs["advantages"]
    assert advantages.shape == mask.shape and (advantages[mask == 0] == 0).all()
    least, largest = trainer._rewards.min(), trainer._rewards.max()
    assert least < largest
    of_response = advantages.sum(-1) / mask.sum(-1)
    groups = trainer._rewards.view(-1, trainer.num_generations)
    plain = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(of_response, plain.flatten()[inputs["rollout_index"]])


def test_images_of_tools_are_refused() -> None:
    row = {"images": [tiny.dataset(1)[0]["images"][0]], "evidence": [{"image": 0}]}
    fields = {"pixel_values": torch.zeros(1), "num_images": [2]}
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"where tools return images; .* \[1\] .* \[2\]"):
        evidence.locate([row], None, ids, ids, fields, 0.0)


@slow
def test_without_evidence_nothing_is_added(path: Path, tmp_path: Path) -> None:
    """Rows without evidence, and text alone, in a run whose other terms go on: exact zeros."""
    rows = evidence_case.dataset().map(lambda row: {"evidence": []})
    trainer = trainer_of(path, tmp_path)
    trainer.train_dataset = rows  # a set without any is refused; a batch without may occur
    inputs = by_hand.batch_of(trainer)
    assert not inputs["evidence_share"].any() and (inputs["evidence_ids"] == -1).all()
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss == 0.0
    assert not any(x.any() for x in gradients(trainer.model, loss).values())


@slow
def test_rows_of_text_beside_rows_with_evidence(path: Path, tmp_path: Path) -> None:
    read = list(evidence_case.dataset())
    for row in read[::4]:
        row["images"], row["evidence"] = None, None
    rows = type(evidence_case.dataset()).from_list(read)
    trainer = trainer_of(
        path, tmp_path, train_dataset=rows, attn_coef=1.0, rl_coef=1.0, attention_reward=0.5,
        credit="looking", per_device_train_batch_size=8, steps_per_generation=2,
    )  # fmt: skip
    trainer.train()
    logs = tiny.logged(trainer, "evidence/rollouts")
    assert all(0 <= share < 1 for share in logs) and any(logs)
    assert all(map(math.isfinite, tiny.logged(trainer, "loss")))
    assert all(map(math.isfinite, tiny.logged(trainer, "grad_norm")))


@slow
def test_the_term_teaches_where_to_look(path: Path, tmp_path: Path) -> None:
    """Alone, on all rollouts: attention moves to the evidence, with a step size it can follow."""
    trainer = trainer_of(
        path, tmp_path, max_steps=12, learning_rate=5e-3, evidence_layers="all",
        lr_scheduler_type="constant", attn_metrics_every=0,
    )  # fmt: skip
    trainer.train()
    shares = tiny.logged(trainer, "evidence/share")
    losses = tiny.logged(trainer, "evidence/loss")
    assert shares[-1] > 1.5 * shares[0] and losses[-1] < losses[0]


OBJECTIVES: dict[str, Any] = {
    "train_dataset": evidence_case.dataset(), "evidence_coef": 0.5, "evidence_on": "good",
    "evidence_schedule": "cosine", "evidence_steps": 6, "attention_reward": 0.5,
    "credit": "looking", "credit_top_share": 0.7,
}  # fmt: skip


@slow
@pytest.mark.parametrize("lora", [False, True])
def test_all_of_them_resume_exactly(lora: bool, path: Path, tmp_path: Path) -> None:
    settings = {**OBJECTIVES, "peft_config": tiny.lora() if lora else None, "max_steps": 7}
    straight, other = resumed(path, tmp_path, 4, **settings)
    assert after(other, 4) == after(straight, 4)
    assert len(after(other, 4)) > 1
    assert same_weights(straight, other)
    assert "evidence/loss" in after(other, 4)[0] and "attn/loss" in after(other, 4)[0]
    assert len(tiny.logged(straight, "evidence/loss")) == 6  # of 7 steps: the coefficient ends


@slow
@pytest.mark.usefixtures("one_thread")
def test_a_line_each_on_the_command_line(tmp_path: Path) -> None:
    """Boxes in a file of JSON lines, in some rows, summed with a reward function by weights."""
    folder = cli_case.make(tmp_path)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(lines):
        if number % 4:
            row["evidence"] = [{"image": 0, "box": [0, 0, 42, 28]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "rewards.py").write_text(REWARD)
    out = tmp_path / "run"
    more = ("evidence_coef=0.5", "evidence_on=all", "attention_reward=0.5", "credit=looking")
    reward = f"rewards={folder / 'rewards.py'}:letters:2"
    assert main(["train", *cli_case.words(folder, out, *RL, reward, *more)]) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4 and all(row["evidence/loss"] >= 0 for row in rows)
    assert max(row["evidence/rollouts"] for row in rows) > 0
    first = rows[0]
    parts = 2 * first["rewards/letters/mean"], first["reward"]
    assert parts[0] != parts[1] and abs(first["rewards/attention/mean"]) < 1
    assert 0 < first["looking/visual"] < 1 and 0 < first["credit/tokens"] <= 1


# -- schedules and the mean, by hand --------------------------------------------------------------


def test_schedules() -> None:
    def factors(shape: Any, length: float) -> list[float]:
        return [Schedule(shape, length).at(step, 8) for step in range(9)]

    assert factors("constant", 0.25) == [1.0] * 9
    assert factors("warmup", 0.25) == factors("warmup", 2) == [1.0] * 2 + [0.0] * 7
    assert factors("linear", 4) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert factors("linear", 1.0)[4] == 0.5  # a share of the run
    assert factors("cosine", 4)[:5] == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    term = EvidenceLoss(3.0, schedule=Schedule("linear", 4))
    assert [term.coefficient_at(step, 8) for step in (0, 2, 5)] == [3.0, 1.5, 0.0]
    with pytest.raises(ValueError, match=r"shape must be one of constant, warmup, .* got 'step'"):
        Schedule("step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be finite and > 0; got 0"):
        Schedule("warmup", 0)
    with pytest.raises(ValueError, match=r"kind must be one of jsd, kl, .* got 'ce'"):
        EvidenceLoss(kind="ce")  # type: ignore[arg-type]


def test_weights_add_up_to_a_mean() -> None:
    """Over two processes, which are averaged, and micro-batches of a step, which are added."""
    chosen = torch.tensor([[True, False], [True, True]])  # rollouts of each process
    tokens = torch.tensor([[3, 5], [4, 1]])
    totals = torch.tensor([8.0, 3.0])
    for reduction, of_token in (("token_mean", [1 / 8] * 4), ("sequence_mean", [1 / 9, 1 / 12])):
        found = torch.stack(
            [
                evidence_share(a, b, totals, 2, 3, reduction)
                for a, b in zip(chosen, tokens, strict=True)
            ]
        )
        # each of 3 micro-batches, over 3 that are accumulated and 2 processes
        torch.testing.assert_close((found * tokens).sum() / (2 * 3), torch.tensor(1.0))
        assert found[0, 1] == 0 and found[0, 0] == pytest.approx(6 * of_token[0])
    nothing = evidence_share(chosen[0] & False, tokens[0], torch.zeros(2), 2, 3, "token_mean")
    assert not nothing.any()


@slow
def test_other_trainers_are_told_what_is_missing(path: Path, tmp_path: Path) -> None:
    trainer = trainer_of(path, tmp_path)
    inputs = by_hand.batch_of(trainer)
    del inputs["evidence_ids"], inputs["evidence_share"]
    with pytest.raises(NotImplementedError, match="it lacks evidence_ids, evidence_share"):
        trainer._compute_loss(trainer.model, inputs)
