"""Terms of one's own beside RAL: their value by hand, what is kept for them, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import ral_kernels as rk
from ral import Term
from ral.cli.errors import Refused
from ral.cli.loss_terms import loss_terms
from ral.cli.settings import TermSettings
from ral.losses import PolicyView
from ral.references import References
from ral.terms import AttentionLoss, Batch, Terms
from tests.integrations.eager_maps import assert_same_gradients, gradients, perturbed

from . import by_hand, tiny


class Rowwise(Term):
    """RAL in another form: rows of probabilities instead of a snapshot, of a token's own query."""

    name = "rowwise/loss"
    reference = "old"
    rows = "token"

    def take(self, captured: Any, layer: int, view: PolicyView) -> Tensor:
        assert not torch.is_grad_enabled()
        return captured.policy(layer=layer, rows=view.rows)

    def divergence(self, batch: Batch) -> Tensor:
        (layer,) = batch.layers
        p = batch.captured.policy(layer=layer, rows=batch.view.rows)
        return rk.divergence(p, batch.references[layer])

    def loss(self, batch: Batch) -> Tensor:
        return (batch.weights * batch.advantages * self.divergence(batch)).sum()

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        values = self.divergence(batch)[batch.mask]
        return {"rowwise/divergence": torch.stack([values.sum(), batch.mask.sum()])}


class Again(AttentionLoss):
    name = "attn/again"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.getbasetemp() / "checkpoints")


def test_a_term_of_ones_own(path, tmp_path) -> None:
    """Another layer, other rows and another reference than RAL's, which is beside it."""
    trainer = tiny.trainer(
        path, tmp_path, rl_coef=0.0, attn_coef=3.0, terms=[Rowwise(2.0, layers=0)]
    )
    inputs = by_hand.batch_of(trainer)
    before = by_hand.stepped(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    got = gradients(trainer.model, loss)

    def both() -> list[Tensor]:
        return [
            by_hand.policies(trainer.model, inputs, [-1])[0],
            by_hand.policies(trainer.model, inputs, [0], rows="token")[0],
        ]

    with torch.no_grad(), by_hand.weights(trainer.model, before):
        references = both()
    with by_hand.weights(trainer.model, None):
        values = [by_hand.divergence(p, r) for p, r in zip(both(), references, strict=True)]
        share = inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
        means = [
            by_hand.response_mean(inputs["advantages"][:, None] * each, inputs) for each in values
        ]
        wanted_loss = (3.0 * means[0] + 2.0 * means[1]) * share
        wanted = gradients(trainer.model, wanted_loss)
    assert min(mean.abs() for mean in means) > 1e-5
    torch.testing.assert_close(loss.detach(), wanted_loss.detach(), rtol=2e-4, atol=1e-6)
    assert_same_gradients(got, wanted, 5e-4)
    logged = trainer._metrics["train"]
    assert logged["rowwise/loss"] == pytest.approx([(means[1] * share).item()], rel=2e-4)
    mean = by_hand.response_mean(values[1], inputs).item()
    assert logged["rowwise/divergence"] == pytest.approx([mean], rel=2e-4)
    assert logged["rowwise/divergence/inner_0"] == logged["rowwise/divergence"]


def test_terms_of_one_reference_share_what_is_kept(path, tmp_path) -> None:
    alone = tiny.trainer(path, tmp_path, rl_coef=0.0)
    twice = tiny.trainer(path, tmp_path, rl_coef=0.0, terms=[Again(1.0)])
    sizes, losses = [], []
    for trainer in (alone, twice):
        torch.manual_seed(0)
        inputs = by_hand.batch_of(trainer)
        torch.manual_seed(1)
        by_hand.stepped(trainer)
        losses.append(trainer._compute_loss(trainer.model, inputs).item())
        sizes.append(trainer._references.nbytes)
    assert sizes[0] == sizes[1] > 0
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6) != 0


def test_a_coefficient_of_0_only_measures(path, tmp_path) -> None:
    settings = {"attn_coef": 0.0, "max_steps": 2, "attn_metrics_every": 0}
    plain = tiny.trainer(path, tmp_path / "1", **settings)
    plain.train()
    watched = tiny.trainer(path, tmp_path / "2", terms=[AttentionLoss(0.0)], **settings)
    watched.train()
    assert tiny.logged(watched, "loss") == tiny.logged(plain, "loss")
    first, second = tiny.logged(watched, "attn/divergence")
    assert first < 1e-7 < second
    assert not tiny.logged(watched, "attn/loss")


def test_an_engine_of_ones_own(path) -> None:
    """`Terms` by itself: forwards of two rollouts each, in an order that the engine has chosen."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    ids = torch.randint(10, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    view = PolicyView((5, 11))
    references = References()
    terms = Terms([AttentionLoss(), Rowwise()], model, -1, references)
    assert len(terms) == 2 and terms.layers == [1] and terms.roles == {"old"}
    with terms.taking("ref", model, view), torch.no_grad():
        model(input_ids=ids)
    assert references.nbytes == 0  # no term compares with it
    with terms.taking("old", model, view), torch.no_grad():
        for chunk in ids.split(2):
            model(input_ids=chunk)
    perturbed(model, 0.02)
    index = torch.tensor([3, 1])
    with terms.capturing(model) as captured:
        model(input_ids=ids[index])
    ones = torch.ones(2, 6)
    batch = Batch(
        captured=None, layers=[], references={}, advantages=ones[:, :1], mask=ones.bool(),
        weights=ones / 12, num_tokens=12, view=view, inputs={},
    )  # fmt: skip
    (ral, of_ral), (rowwise, of_rowwise) = terms.seen(captured, batch, index)
    assert of_ral.view.rows == (5, 11) and of_rowwise.view.rows == (6, 12)
    snapshot = of_ral.references[1]
    assert isinstance(snapshot, rk.AttentionSnapshot) and snapshot.batch_size == 2
    wanted = of_ral.captured.divergence(snapshot, rows=(5, 11)).mean()
    torch.testing.assert_close(ral.loss(of_ral), wanted)
    assert of_rowwise.references[1].shape == (2, 6, 12)
    sums = rowwise.metrics(of_rowwise)["rowwise/divergence"]
    torch.testing.assert_close(rowwise.loss(of_rowwise), sums[0] / sums[1])
    assert rowwise.loss(of_rowwise) > 1e-6


def test_what_a_trainer_refuses(path, tmp_path) -> None:
    def refused(error: type[Exception], match: str, terms: list[Any], **config: Any) -> None:
        with pytest.raises(error, match=match):
            tiny.trainer(path, tmp_path, terms=terms, **config)

    refused(TypeError, "terms must hold Term objects; got str", ["attn/loss"])
    refused(ValueError, "different names; got attn/loss, attn/loss", [AttentionLoss()])
    teacher = AttentionLoss(reference="teacher")
    refused(ValueError, r"terms of a teacher \(attn/loss\)", [teacher], attn_coef=0.0)
    refused(ValueError, "'ref' of attn/again needs beta > 0", [Again(reference="ref")])
    one_step = {"attn_coef": 0.0, "num_iterations": 1, "steps_per_generation": 1}
    refused(ValueError, "'old' of rowwise/loss needs more than one", [Rowwise()], **one_step)


@pytest.mark.parametrize("coefficient", [-1.0, math.inf, math.nan])
def test_coefficients(coefficient) -> None:
    with pytest.raises(ValueError, match="Rowwise: coefficient must be finite and >= 0"):
        Rowwise(coefficient)


def test_attributes_of_a_term() -> None:
    for name, value, wanted in (
        ("reference", "new", "None or one of old, ref, teacher; got 'new'"),
        ("rows", "last", "None or one of predicting, token; got 'last'"),
        ("name", None, "the text that it is logged under; got none"),
    ):
        with pytest.raises(ValueError, match=wanted):
            type("Own", (Rowwise,), {name: value})()


def test_terms_by_name(tmp_path: Path) -> None:
    lines = "from ral.terms import AttentionLoss\nclass Own(AttentionLoss):\n    name = 'own'\n"
    (tmp_path / "own_terms.py").write_text(lines)
    own = f"{tmp_path / 'own_terms.py'}:Own"
    made = loss_terms(TermSettings(terms=[own, own + ":0.25", "ral.terms:AttentionLoss:2"]))
    assert [type(term).__name__ for term in made] == ["Own", "Own", "AttentionLoss"]
    assert [term.coefficient for term in made] == [1.0, 0.25, 2.0]
    assert loss_terms(TermSettings()) == []
    for given, message in (
        ("Own:1", "must be file.py:Name or package.module:Name, .* got 'Own:1'"),
        (f"{tmp_path}/none.py:Own", "there is no file"),
        ("ral.terms:Terms:1", "classes of ral.Term; ral.terms has no such 'Terms'"),
        (own + ":-1", "coefficient must be finite and >= 0; got -1.0"),
    ):
        with pytest.raises(Refused, match=message):
            loss_terms(TermSettings(terms=[given]))
