"""Where a rollout looked, the reward and the credit made of it: by hand, and in the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ral import RALConfig
from ral.crediting import check_evidence
from ral.looking import (
    Evidence,
    Looks,
    attention_reward,
    credit_weights,
    look,
    without_sinks,
)
from ral.losses import PolicyView
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, evidence_case, tiny
from .test_config import BASE
from .two_processes import FixedRollouts

ONE_STEP = {"attn_coef": 0.0, "num_iterations": 1, "steps_per_generation": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


def trainer_of(path: Path, tmp_path: Path, **config: Any) -> Any:
    config = {"train_dataset": evidence_case.dataset(), "evidence_sigma": 0.0, **config}
    return tiny.trainer(path, tmp_path, **config)


def batch_of(trainer: Any) -> dict[str, Any]:
    torch.manual_seed(0)  # of the rollouts, and of TRL's shuffle
    return by_hand.batch_of(trainer)


def looks_by_hand(trainer: Any, inputs: dict[str, Any], layers: list[int]) -> Looks:
    """From full maps: sinks left out, shares of visual tokens and of the evidence, entropy."""
    visual = inputs["mm_token_type_ids"] == 1
    evidence = evidence_case.evidence_mask(trainer, inputs)
    valid = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
    for row in valid:
        row[row.nonzero()[: evidence_case.SINKS, 0]] = False
    assert not (visual & ~valid).any()
    found = []
    with torch.no_grad(), by_hand.weights(trainer.model, None):
        maps = evidence_case.maps(trainer.model, inputs)
    for layer in layers:
        p = maps[layer].clone()
        for row in range(p.shape[1]):  # eq. (1): without the row's own key
            p[:, row, p.shape[2] - p.shape[1] - 1 + row] = 0
        p = p * valid[:, None]
        p = p / p.sum(-1, keepdim=True)
        share = (p * visual[:, None]).sum(-1)
        seen = p * visual[:, None] / share[..., None]
        entropy = -torch.where(seen > 0, seen * seen.clamp(min=1e-30).log(), 0.0).sum(-1)
        entropy = entropy / visual.sum(-1, keepdim=True).log()
        found.append(torch.stack([share, (seen * evidence[:, None]).sum(-1), entropy]))
    return Looks(*torch.stack(found).mean(0))


def weights_by_hand(share: Tensor, mask: Tensor, top_share: float) -> Tensor:
    weights = torch.zeros_like(share)
    for row, counted in enumerate(mask.bool()):
        tokens = counted.nonzero()[:, 0].tolist()
        most = sorted(tokens, key=lambda t: -share[row, t].item())
        for t in most[: math.ceil(top_share * len(tokens))]:
            weights[row, t] = share[row, t]
        if weights[row].any():
            weights[row] *= len(tokens) / weights[row].sum()
        else:  # no evidence: as GRPO
            weights[row] = counted
    return weights


# -- by hand --------------------------------------------------------------------------------------


def test_credit_weights() -> None:
    share = torch.tensor([[0.1, 0.4, 0.3, 0.9], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.5, 0.5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    got = credit_weights(share, mask)
    wanted = torch.tensor([[0.375, 1.5, 1.125, 0.0], [1.0] * 4, [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(got, wanted)  # without attention on images: as GRPO
    half = credit_weights(share, mask, 0.5)
    wanted = torch.tensor([[0.0, 12 / 7, 9 / 7, 0.0], [2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(half, wanted)  # ceil(1.5) = 2 tokens; of equal ones the first
    torch.testing.assert_close(half.sum(-1), mask.sum(-1).float())
    assert credit_weights(torch.rand(1, 10), torch.ones(1, 10), 0.3).count_nonzero() == 3
    assert not credit_weights(share, torch.zeros_like(mask), 0.5).any()


def test_attention_reward() -> None:
    visual = torch.tensor([[True] * 4 + [False] * 2] * 4)
    evidence = Evidence(
        torch.tensor([[0, 1], [2, -1], [-1, -1], [0, 1]]),
        torch.tensor([[1.0, 0.5], [1.0, 0.7], [0.3, 0.3], [1.0, 0.5]]),
    )
    assert evidence.given.tolist() == [True, True, False, True]
    looks = Looks(
        torch.rand(4, 3),
        torch.tensor([[1.0, 0.2, 0.9], [0.25] * 3, [0.5] * 3, [0.375] * 3]),
        torch.tensor([[0.0, 0.5, 0.1], [0.5] * 3, [0.5] * 3, [1.0] * 3]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    got = attention_reward(looks, evidence, visual, mask)
    # u = 1.5 / 4; (1 · 0.625 + 0.5 · (0.2 − 0.375)) / 1.5
    assert got[0] == pytest.approx((0.625 - 0.0875) / 1.5)
    assert got[1] == 0 and got[2].isnan()  # as uniform attention has; no evidence
    assert got[3] == 0  # all rows are uniform
    assert attention_reward(looks, evidence, torch.zeros_like(visual), mask).isnan().all()


def test_looks_of_many_rows_and_of_one_visual_token() -> None:
    """More rows than are held at once; the entropy over one token is 0, whatever it rounds to."""
    p = torch.rand(2, 150, 6, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[False, True, True, False, True, False], [False] * 5 + [True]])
    kept = torch.tensor([[False] + [True] * 5] * 2)
    evidence = Evidence(torch.tensor([[2, 4], [5, -1]]), torch.tensor([[1.0, 0.5], [1.0, 9.0]]))

    class Captured:
        def policy(self, *, rows: tuple[int, int], scope: Tensor, **options: Any) -> Tensor:
            chosen = p[:, slice(*rows)] * scope[:, None]
            return chosen / chosen.sum(-1, keepdim=True)

    captured: Any = Captured()
    looks = look(captured, [0, 1], PolicyView((5, 145)), visual, kept, evidence)
    rows = p[:, 5:145] * kept[:, None]
    share = (rows * visual[:, None]).sum(-1) / rows.sum(-1)
    seen = rows[0, :, [1, 2, 4]] / rows[0, :, [1, 2, 4]].sum(-1, keepdim=True)
    torch.testing.assert_close(looks.visual, share)
    torch.testing.assert_close(looks.evidence[0], seen[:, 1] + 0.5 * seen[:, 2])
    torch.testing.assert_close(looks.evidence[1], torch.ones(140))
    entropy = -(seen * seen.log()).sum(-1) / math.log(3)
    torch.testing.assert_close(looks.entropy[0], entropy)
    assert (looks.entropy[1] == 0).all()
    assert not look(captured, [0], PolicyView((5, 9)), visual, kept, None).evidence.any()


def test_sinks_are_the_first_text_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    visual = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0] * 7]).bool()
    kept = without_sinks(mask, visual, 2)
    assert kept.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert torch.equal(without_sinks(mask, visual, 0), mask.bool())


# -- in the trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "credit",
    [
        "looking",
        pytest.param(
            "evidence",
            marks=pytest.mark.slow(stands_in="test_credit_and_looks_of_the_old_policy"),
        ),
    ],
)
def test_credit_and_looks_of_the_old_policy(credit: str, path: Path, tmp_path: Path) -> None:
    config = {"attn_layers": "all", "attn_coef": 0.0}
    plain = batch_of(trainer_of(path, tmp_path / "1", **config))
    trainer = trainer_of(path, tmp_path / "2", credit=credit, credit_top_share=0.5, **config)
    inputs = batch_of(trainer)
    mask = inputs["completion_mask"]
    wanted = looks_by_hand(trainer, inputs, [0, 1])
    if credit == "looking":  # which asks for no evidence
        wanted = wanted._replace(evidence=torch.zeros_like(wanted.evidence))
    index = inputs["rollout_index"]
    for got, values in zip(trainer._looks, wanted, strict=True):
        torch.testing.assert_close(got[index] * mask, values * mask, rtol=1e-4, atol=1e-5)
    share = wanted.visual if credit == "looking" else wanted.evidence
    weights = weights_by_hand(share, mask, 0.5)
    assert torch.equal(inputs["completion_ids"], plain["completion_ids"])
    torch.testing.assert_close(
        inputs["advantages"], plain["advantages"][:, None] * weights, rtol=1e-4, atol=1e-5
    )
    means = inputs["advantages"].abs().sum(-1) / mask.sum(-1)
    torch.testing.assert_close(means, plain["advantages"].abs())
    logged = trainer._metrics["train"]
    assert 0 < logged["credit/tokens"][0] < 1
    whole = logged["looking/visual"][0]
    assert 0 < whole < 1 and logged["looking/entropy"][0] < 1


@pytest.mark.parametrize(
    "checkpointing",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.slow(stands_in="test_credit_in_the_updates_own_forward")
        ),
    ],
)
def test_credit_in_the_updates_own_forward(checkpointing: bool, path: Path, tmp_path: Path) -> None:
    """With one step a rollout batch no old policy runs. The gradient is that of weights by hand."""
    trainer = trainer_of(
        path, tmp_path, credit="looking", gradient_checkpointing=checkpointing, **ONE_STEP
    )
    inputs = batch_of(trainer)
    assert trainer._looks is None and inputs["advantages"].dim() == 1
    advantages = inputs["advantages"].clone()
    got = gradients(trainer.model, trainer._compute_loss(trainer.model, inputs))
    assert torch.equal(inputs["advantages"], advantages)  # the batch keeps its own
    assert trainer._after_forward is None
    looks = looks_by_hand(trainer, inputs, [-1])
    weights = weights_by_hand(looks.visual, inputs["completion_mask"], 1.0)
    trainer.args.credit = "uniform"
    uniform = gradients(trainer.model, trainer._compute_loss(trainer.model, inputs))
    by_tokens = {**inputs, "advantages": advantages[:, None] * weights}
    wanted = gradients(trainer.model, trainer._compute_loss(trainer.model, by_tokens))
    assert_same_gradients(got, wanted, 1e-4)
    name = max(wanted, key=lambda each: float(wanted[each].norm()))
    assert (wanted[name] - uniform[name]).norm() > 1e-3 * wanted[name].norm()


def test_the_attention_reward_by_hand(path: Path, tmp_path: Path) -> None:
    """TRL makes the advantages that it would make of a reward function with these values."""
    measured = trainer_of(path, tmp_path / "1", attention_reward=3.0, reward_weights=[0.5])
    assert measured.args.reward_weights == [0.5]
    inputs = batch_of(measured)
    rewards = measured._attention_rewards.tolist()
    looks = looks_by_hand(measured, inputs, [-1])
    evidence = evidence_case.evidence_mask(measured, inputs)
    visual, mask = inputs["mm_token_type_ids"] == 1, inputs["completion_mask"]
    for row, index in enumerate(inputs["rollout_index"].tolist()):
        if not evidence[row].any():
            assert math.isnan(rewards[index])
            continue
        uniform = evidence[row].sum() / visual[row].sum()
        certain = (1 - looks.entropy[row]) * mask[row]
        wanted = (certain * (looks.evidence[row] - uniform)).sum() / certain.sum()
        assert rewards[index] == pytest.approx(wanted.item(), abs=1e-5)
    assert any(map(math.isnan, rewards)) and not all(map(math.isnan, rewards))

    def known(completions: Any, **columns: Any) -> list[float | None]:
        return [None if math.isnan(x) else x for x in rewards]

    functions = [tiny.reward, known]
    told = trainer_of(path, tmp_path / "2", reward_funcs=functions, reward_weights=[0.5, 3.0])
    assert torch.equal(batch_of(told)["advantages"], inputs["advantages"])
    without = batch_of(trainer_of(path, tmp_path / "3", reward_weights=[0.5]))
    assert not torch.allclose(without["advantages"], inputs["advantages"], atol=1e-3)
    for name in ("reward", "rewards/attention/mean"):
        other = name.replace("attention", "known")
        assert measured._metrics["train"][name] == told._metrics["train"][other]


@pytest.mark.slow(stands_in="test_the_attention_reward_by_hand")
def test_weight_0_is_trl(path: Path, tmp_path: Path) -> None:
    """Advantages are those of TRL alone, for the same rollouts and rewards."""
    from trl import GRPOTrainer

    class Plain(GRPOTrainer):
        def __init__(self, *args: Any, teacher_model: Any, terms: Any, **named: Any) -> None:
            super().__init__(*args, **named)

    settings = {"attention_reward": 0.0, "attn_coef": 0.0}
    ours = trainer_of(path, tmp_path / "1", credit="looking", **settings)
    theirs = trainer_of(path, tmp_path / "2", trainer_class=Plain, **settings)
    assert ours.reward_func_names == ["reward"]
    weighted, plain = batch_of(ours), batch_of(theirs)
    assert torch.equal(weighted["completion_ids"], plain["completion_ids"])
    assert list(ours._logs["advantages"]) == list(theirs._logs["advantages"])


@pytest.mark.slow(stands_in="test_the_attention_reward_by_hand")
def test_attention_alone_is_a_reward(path: Path, tmp_path: Path) -> None:
    """Beside no other function; evaluation does not measure it."""
    trainer = trainer_of(
        path, tmp_path, reward_funcs=None, attention_reward=1.0, max_steps=2,
        eval_dataset=evidence_case.dataset(4),
    )  # fmt: skip
    trainer.train()
    assert tiny.logged(trainer, "reward") == tiny.logged(trainer, "rewards/attention/mean")
    assert tiny.logged(trainer, "reward_std")[0] > 0
    assert "eval_rewards/attention/mean" not in trainer.evaluate()


@pytest.mark.slow(stands_in="test_the_attention_reward_by_hand")
def test_resampling_sees_the_other_rewards(path: Path, tmp_path: Path) -> None:
    """Groups that are equal without attention are replaced; those chosen get it."""

    def reward(completions: Any, problem_id: Any, **columns: Any) -> list[float]:
        values = tiny.reward(completions)
        return [1.0 if n in "0345" else x for n, x in zip(problem_id, values, strict=True)]

    trainer = trainer_of(
        path, tmp_path, trainer_class=FixedRollouts, reward_funcs=reward, attention_reward=2.0,
        resample_equal_groups=9, max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert sum(tiny.logged(trainer, "groups/drawn")) > 0
    assert set(tiny.logged(trainer, "groups/left_equal")) == {0.0}
    rewards = torch.tensor(list(trainer._logs["rewards"]["attention"]))
    torch.testing.assert_close(rewards, trainer._attention_rewards, equal_nan=True)
    assert rewards.nansum() != 0


@pytest.mark.slow(stands_in="test_the_attention_reward_by_hand")
def test_boxes_reach_the_keys_of_a_padded_batch(path: Path, tmp_path: Path) -> None:
    """Pictures of 2 x 3 or 3 x 2 tokens of 28 pixels; a box over one token and a half of the next.

    Smoothing keeps the sum within its picture.
    """
    rows = evidence_case.dataset().map(
        lambda row, number: {
            "prompt": [{"role": "user", "content": f"picture {number}?" + " Look." * number}],
            "evidence": [{"image": 1, "box": [0.0, 0.0, 42.0, 28.0]}] if number != 2 else [],
        },
        with_indices=True,
    )
    for sigma in (0.0, 1.0):
        trainer = trainer_of(
            path, tmp_path / str(sigma), train_dataset=rows, attention_reward=1.0,
            evidence_sigma=sigma,
        )  # fmt: skip
        inputs = batch_of(trainer)
        assert not inputs["prompt_mask"].all()  # prompts of several lengths
        visual = inputs["mm_token_type_ids"] == 1
        place = Evidence(inputs["evidence_ids"], inputs["evidence_weights"])
        assert place.given.any() and len(place.ids) == 4
        for row in place.given.nonzero()[:, 0].tolist():
            second = visual[row].nonzero()[6:12, 0]  # the tokens of the second picture
            dense = torch.zeros(visual.shape[1])
            ids = place.ids[row]
            dense[ids[ids >= 0]] = place.weights[row][ids >= 0]
            if sigma == 0:
                wanted = torch.zeros_like(dense)
                wanted[second[:2]] = torch.tensor([1.0, 0.5])
                torch.testing.assert_close(dense, wanted)
            else:
                assert dense[second].sum() == pytest.approx(1.5, abs=1e-4) == dense.sum().item()
                assert dense[second].count_nonzero() == 6


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need a column `evidence` in the training set; got prom"):
        tiny.trainer(path, tmp_path, attention_reward=1.0)
    with pytest.raises(ValueError, match="need a column `evidence`"):
        check_evidence(tiny.dataset())
    none = tiny.dataset().add_column("evidence", [[]] * len(tiny.dataset()))
    with pytest.raises(ValueError, match="none of which has evidence"):
        check_evidence(none)
    check_evidence(evidence_case.dataset())
    check_evidence(tiny.dataset().to_iterable_dataset().remove_columns("images").map(dict))
    needs = [RALConfig(**BASE, **x).needs_evidence for x in (
        {}, {"credit": "looking"}, {"credit": "evidence"}, {"evidence_coef": 1.0},
        {"attention_reward": 1.0},
    )]  # fmt: skip
    assert needs == [False, False, True, True, True]
