"""attn_implementation="ral" against "eager" in every family of transformers that reads pictures.

The models are tiny and random. A family that does not run under eager, or that never calls its
attention through transformers' interface, is not applicable; the reason is in the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_kernels.integrations.transformers import attention, register
from tests.conformance import tiny
from tests.conformance.conftest import slow

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
QUICK = ("qwen2_5_vl",)
BATCH_SIZE, LENGTH = 2, 12
Record = Callable[[str, Any], None]


class NotThere(Exception):
    """What the case needs is not in this family, or not on this machine."""


class Subject:
    """A family and its models, by their attention implementation."""

    def __init__(self, family: str) -> None:
        register()
        self.family = family
        self.models = {"eager": tiny.build(family, "eager")}
        try:
            self.models["ral"] = tiny.build(family, "ral")
        except KeyError:  # its vision tower has a table of attentions: README.md of integrations
            self.models["ral"] = tiny.build(family, {"text_config": "ral"})

    def of(self, implementation: str) -> Any:
        if implementation not in self.models:
            self.models[implementation] = tiny.build(self.family, implementation)
        return self.models[implementation]


def _marks(family: str) -> list[pytest.MarkDecorator]:
    group = pytest.mark.xdist_group(f"family-{family}")
    return [group] if family in QUICK else [group, slow("test_text")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=_marks(family)) for family in tiny.families()],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    try:
        return Subject(request.param)
    except ImportError as error:
        pytest.skip(f"{request.param}: {sentence(error)}")
    except KeyError as error:
        if error.args != ("ral",):
            raise
        pytest.skip(f"{request.param}: its table of attentions names eager and sdpa alone")


def sentence(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def check_as_eager(
    subject: Subject,
    run: Callable[[Any], Any],
    same: Callable[[Any, Any], None],
    record: Callable[[str, Any], None],
) -> None:
    """`run` gives under "ral" what it gives under eager, or "ral" refuses by name.

    Where sdpa itself differs from eager, in a call that lacks a mask, "ral" is to be as sdpa.
    """
    try:
        wanted = run(subject.of("eager"))
    except NotThere as error:
        pytest.skip(f"{subject.family}: {error}")
    except Exception as error:
        pytest.skip(f"{subject.family}: eager raises {sentence(error)}")
    calls = []

    def counted(module: Any, *args: Any, **keywords: Any) -> Any:
        calls.append(module)
        return attention.attention_forward(module, *args, **keywords)

    transformers.AttentionInterface.register("ral", counted)
    try:
        got = run(subject.of("ral"))
    except NotImplementedError as error:
        # An unknown keyword is no feature that is missing: that is a failure.
        if not re.match(
            "ral attention: .*(is not|are not) supported|.*dropout must be", str(error)
        ):
            raise
        record("refused", str(error))
        return
    finally:
        register()
    if not calls:
        pytest.skip(f"{subject.family}: no layer calls transformers' attention interface")
    try:
        same(got, wanted)
    except AssertionError:
        try:
            same(got, run(subject.of("sdpa")))
        except Exception:
            same(got, wanted)
        pytest.skip(f"{subject.family}: eager and sdpa differ in this call; ral is as sdpa")


def batch_of(model: Any, padding: str | None, picture: bool = False) -> dict[str, Tensor]:
    """Two samples; the second is three tokens shorter where there is padding."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 250, (BATCH_SIZE, LENGTH), generator=generator)
    batch: dict[str, Tensor] = {}
    if picture:
        if not tiny.parameters_of(model) & {"pixel_values", "image_patches", "flattened_patches"}:
            raise NotThere("the model takes no pictures")
        given, count = tiny.picture(model)
        for name, x in given.items():
            batch[name] = torch.cat([x, x.flip(-1) if x.is_floating_point() else x])
        tokens = torch.full((BATCH_SIZE, count), tiny.IMAGE_TOKEN)
        ids = torch.cat([ids[:, :4], tokens, ids[:, 4:]], 1)
    names = tiny.parameters_of(model)
    if padding:
        mask = torch.ones_like(ids)
        ids[1] = ids[1].roll(3) if padding == "left" else ids[1]
        where = slice(0, 3) if padding == "left" else slice(ids.shape[1] - 3, None)
        ids[1, where], mask[1, where] = 0, 0
        batch["attention_mask"] = mask
    if picture:
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in names:
                batch[name] = (ids == tiny.IMAGE_TOKEN).long()
        if "cross_attention_mask" in names:  # of the first of four tiles
            batch["cross_attention_mask"] = torch.zeros(*ids.shape, 1, 4, dtype=torch.long)
            batch["cross_attention_mask"][..., 0] = 1
    if "bbox" in names:
        batch["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.long)
    if "input_ids" not in names:  # the prompt is the decoder's
        return {"decoder_input_ids": ids, **batch}
    if "decoder_input_ids" in names and model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5]
    return {"input_ids": ids, **batch}


def logits_of(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output[0]
    if not isinstance(logits, Tensor):
        raise NotThere("the model has no logits")
    return logits


def forward_and_backward(
    model: Any, batch: dict[str, Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real tokens, and every gradient of a random functional of them."""
    model.zero_grad()
    torch.manual_seed(2)
    logits = logits_of(model(**batch, **options))
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert wanted.isfinite().all(), "eager's values are not finite"
    off, size = (got - wanted).abs().max(), wanted.abs().max()
    assert off <= 2e-4 * size, f"{float(off):.2e} off of {float(size):.2e}"


def assert_same_with_gradients(
    got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert_same(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys()
    largest = max((float(g.norm()) for g in wanted[1].values()), default=0.0)
    assert largest > 0
    for name, gradient in wanted[1].items():
        off = float((got[1][name] - gradient).norm())
        assert off <= 1e-3 * float(gradient.norm()) + 1e-5 * largest, f"{name}: {off:.2e} off"


def assert_same_tokens(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Of the same sequences and scores."""
    assert torch.equal(got[0], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_text(subject: Subject, padding: str | None, record_property: Record) -> None:
    """Logits and every gradient."""

    def run(model: Any) -> Any:
        return forward_and_backward(model, batch_of(model, padding))

    check_as_eager(subject, run, assert_same_with_gradients, record_property)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_pictures(subject: Subject, padding: str | None, record_property: Record) -> None:
    """The same with a picture in each sample."""

    def run(model: Any) -> Any:
        return forward_and_backward(model, batch_of(model, padding, picture=True))

    check_as_eager(subject, run, assert_same_with_gradients, record_property)


def test_labels(subject: Subject, record_property: Record) -> None:
    """The loss that the model computes itself."""

    def run(model: Any) -> Tensor:
        batch = batch_of(model, "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if "decoder_input_ids" in batch:
            labels = labels[:, : batch["decoder_input_ids"].shape[1]].contiguous()
        loss = model(**batch, labels=labels).loss
        if loss is None:
            raise NotThere("the model computes no loss")
        return loss.detach()

    check_as_eager(subject, run, assert_same, record_property)


def test_packed(subject: Subject, record_property: Record) -> None:
    """Two sequences in one row, separated by positions that restart."""

    def run(model: Any) -> Any:
        if "position_ids" not in tiny.parameters_of(model):
            raise NotThere("the model takes no position_ids")
        batch = {"input_ids": batch_of(model, None)["input_ids"][:1]}
        positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
        return forward_and_backward(model, batch, position_ids=positions, use_cache=False)

    check_as_eager(subject, run, assert_same_with_gradients, record_property)


def test_cache(subject: Subject, record_property: Record) -> None:
    """Several new tokens over the keys of an earlier call."""

    def run(model: Any) -> Tensor:
        ids = batch_of(model, None)["input_ids"]
        torch.manual_seed(2)
        with torch.no_grad():
            first = model(input_ids=ids[:, :7], use_cache=True)
            cache = getattr(first, "past_key_values", None)
            if cache is None:
                raise NotThere("the model returns no cache")
            last = model(input_ids=ids[:, 7:], past_key_values=cache, use_cache=True)
        return torch.cat([logits_of(first), logits_of(last)], 1)

    check_as_eager(subject, run, assert_same, record_property)


GENERATION: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("kind", GENERATION)
def test_generate(subject: Subject, kind: str, record_property: Record) -> None:
    """Six greedy tokens of a batch padded on the left, and their scores."""

    def run(model: Any) -> list[Tensor]:
        torch.manual_seed(2)
        output = model.generate(
            **batch_of(model, "left"),
            **GENERATION[kind],
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = [x for x in output.scores or () if isinstance(x, Tensor)]
        return [output.sequences, *(x.clamp(min=-1e4) for x in scores)]

    check_as_eager(subject, run, assert_same_tokens, record_property)


def test_generate_with_pictures(subject: Subject, record_property: Record) -> None:
    def run(model: Any) -> list[Tensor]:
        torch.manual_seed(2)
        output = model.generate(
            **batch_of(model, "left", picture=True),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return [output.sequences, *(x.clamp(min=-1e4) for x in output.scores)]

    check_as_eager(subject, run, assert_same_tokens, record_property)
