"""`capture` of packed rows: as the padded batch that they came from, under every attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations.eager_maps import eager_maps, eager_policy, gradients, perturbed
from tests.integrations.models import FAMILIES, build, inputs

RESPONSES = [4, 6, 3]  # tokens at the end of each sequence
ADVANTAGES = torch.tensor([1.0, -0.5, 0.7])
FLASH_LIKE = "packed_test"
IMPLEMENTATIONS = ["sdpa", "eager", "ral", "ral by lengths", FLASH_LIKE]


@pytest.fixture(autouse=True, scope="module")
def implementations() -> None:
    register()
    _register_flash_like()


def _register_flash_like() -> None:
    """An attention as flash attention is called: no mask, sequences by cu_seq_lens or positions.

    Flash attention itself needs a GPU. transformers' own function finds the sequences.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = given["scaling"]
        if mask is not None:
            raise AssertionError("the padded batch runs under sdpa")
        (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(given["position_ids"])
        out = rk.flash_attn_varlen_func(
            q[0], k[0], v[0], bounds, bounds, int(longest), int(longest), softmax_scale=scale,
            causal=True,
        )  # fmt: skip
        return out[None], None

    AttentionInterface.register(FLASH_LIKE, forward)
    AttentionMaskInterface.register(FLASH_LIKE, flash_attention_mask)


def _build(family: str, implementation: str) -> Any:
    name = implementation.removesuffix(" by lengths")
    if name == FLASH_LIKE and FAMILIES[family].pictures is not None:
        return build(family, {"text_config": name, "vision_config": "sdpa"})
    return build(family, name)


def _padded(family: str) -> tuple[dict[str, Tensor], list[int]]:
    """Three sequences of different lengths, padded on the left; and their lengths."""
    batch = inputs(family, padding="left", batch_size=3, text_length=12)
    return batch, batch["attention_mask"].sum(-1).tolist()


def _packed(model: Any, family: str, how: str) -> dict[str, Any]:
    """The same sequences, one after another, as transformers' flattening collator gives them."""
    from transformers import DataCollatorWithFlattening

    batch, lengths = _padded(family)
    real = batch["attention_mask"].bool()
    ids = [row[own].tolist() for row, own in zip(batch["input_ids"], real, strict=True)]
    by_lengths = how.endswith("by lengths")
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=by_lengths)
    flat = dict(flatten([{"input_ids": each} for each in ids]))
    given = {name: flat[name] for name in flat if name not in ("labels", "attention_mask")}
    assert given["input_ids"].shape == (1, sum(lengths))
    types = FAMILIES[family].token_types
    if types is not None and types in batch:
        given[types] = batch[types][real][None]
        given |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        each, grids = [], batch["image_grid_thw"]
        for i, own in enumerate(real):
            named = {types: batch[types][i : i + 1, own], "image_grid_thw": grids[i : i + 1]}
            each.append(model.model.get_rope_index(batch["input_ids"][i : i + 1, own], **named)[0])
        given["position_ids"] = torch.cat([given["position_ids"][None], torch.cat(each, -1)])
    if by_lengths:  # positions that count up: the lengths alone tell sequences apart
        given["cu_seq_lens_q"] = given["cu_seq_lens_k"] = flat["cu_seq_lens_q"].int()
    return given


def _rows(lengths: list[int]) -> list[tuple[int, int]]:
    return [(n - count - 1, n - 1) for n, count in zip(lengths, RESPONSES, strict=True)]


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"])
def test_packed_rows_are_those_of_the_padded_batch(family: str, how: str) -> None:
    """Loss, gradients of parameters, policy and divergence; exactly zero at the reference."""
    batch, lengths = _padded(family)
    longest, most = batch["input_ids"].shape[1], max(RESPONSES)
    window = (longest - most - 1, longest - 1)
    counted = torch.tensor([[False] * (most - n) + [True] * n for n in RESPONSES])
    old, model = perturbed(build(family)), build(family)
    with torch.no_grad(), capture(old, rows=window) as before:
        old(**batch, use_cache=False)
    with capture(model, rows=window) as padded:
        model(**batch, use_cache=False)
    wanted = padded.ral_loss(before.snapshot(), ADVANTAGES, counted, reduction="sequence_mean")
    wanted_policy, wanted_divergence = padded.policy(), padded.divergence(before.snapshot())
    wanted_gradients = gradients(model, wanted)

    rows = _rows(lengths)
    old, model = perturbed(_build(family, how)), _build(family, how)
    given = _packed(model, family, how)
    with torch.no_grad(), capture(old, rows=rows) as before:
        old(**given, use_cache=False)
    reference = before.snapshot()
    with capture(model) as captured:
        model(**given, use_cache=False)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    assert captured.cu_seqlens is not None and torch.equal(captured.cu_seqlens, bounds)
    loss = captured.ral_loss(reference, ADVANTAGES, rows=rows, reduction="sequence_mean")
    torch.testing.assert_close(loss, wanted, atol=1e-7, rtol=1e-5)
    got = captured.policy(rows=rows)[0]
    assert got.shape == (sum(RESPONSES), max(lengths))
    torch.testing.assert_close(
        captured.divergence(reference, rows=rows)[0], wanted_divergence[counted], atol=1e-6, rtol=0
    )
    at = 0
    for i, count in enumerate(RESPONSES):
        theirs = wanted_policy[i, -count:, longest - lengths[i] :]
        ours = got[at : at + count]
        torch.testing.assert_close(ours[:, : lengths[i]], theirs, atol=1e-6, rtol=1e-5)
        assert (ours[:, lengths[i] :] == 0).all()
        at += count
    zero = captured.ral_loss(captured.snapshot(rows=rows), ADVANTAGES, rows=rows)
    assert zero == 0
    found = gradients(model, loss)
    assert found.keys() == wanted_gradients.keys()
    for name, gradient in found.items():
        largest = max(wanted_gradients[name].abs().max().item(), 1e-6)
        assert (gradient - wanted_gradients[name]).abs().max() <= 1e-5 * largest + 1e-9, name


def test_an_unchanged_packed_policy_has_no_gradient() -> None:
    model = build("qwen2")
    given = _packed(model, "qwen2", "sdpa")
    with capture(model) as captured:
        model(**given, use_cache=False)
    loss = captured.ral_loss(captured.snapshot(), ADVANTAGES)
    found = torch.autograd.grad(loss, [captured.q(), captured.k()])
    assert loss == 0 and all((x == 0).all() for x in found)


@pytest.mark.parametrize("head_reduction", [None, "mean"])
def test_marginals_and_spans_of_packed_rows(head_reduction: Any) -> None:
    """Those of each sequence alone, with its part of the spans."""
    model = build("qwen2", "eager")
    given = _packed(model, "qwen2", "eager")
    _, lengths = _padded("qwen2")
    rows, total = _rows(lengths), sum(lengths)
    spans = rk.Spans(torch.arange(total) % 3, 3)
    with torch.no_grad(), capture(model, spans=spans, rows=rows) as captured:
        model(**given, use_cache=False)
    marginals, policy = captured.marginals(head_reduction=head_reduction), captured.policy()
    assert marginals.shape == (1, *([] if head_reduction else [4]), sum(RESPONSES), 3)
    first = at = 0
    for n, (start, stop) in zip(lengths, rows, strict=True):
        ids = given["input_ids"][:, first : first + n]
        with torch.no_grad():
            maps = eager_maps(model, {"input_ids": ids})[-1][:, :, start:stop]
        one_hot = torch.nn.functional.one_hot(spans.ids[first : first + n].long(), 3).float()
        wanted = maps @ one_hot
        if head_reduction:
            wanted = wanted.mean(1)
        count = stop - start
        torch.testing.assert_close(marginals[..., at : at + count, :], wanted, atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            p = eager_policy(eager_maps(model, {"input_ids": ids})[-1])[:, start:stop]
        torch.testing.assert_close(policy[:, at : at + count], p @ one_hot, atol=1e-6, rtol=1e-5)
        first, at = first + n, at + count


@pytest.mark.slow(stands_in="test_packed_rows_are_those_of_the_padded_batch")
def test_flex_attention() -> None:
    found = []
    for name in ("sdpa", "flex_attention"):
        model = build("qwen2", name)
        given = _packed(model, "qwen2", name)
        with torch.no_grad(), capture(model) as captured:
            model(**given, use_cache=False)
        assert captured.cu_seqlens is not None and captured.cu_seqlens.shape == (4,)
        found.append(captured.policy())
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_a_window_stays_within_its_sequence() -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = build("qwen2", sliding_window=8, use_sliding_window=True, layer_types=kinds)
    ids = torch.randint(2, 256, (1, 30), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad(), capture(model, "all") as captured:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    alone = []
    for part in ids.split([12, 18], dim=1):
        with torch.no_grad(), capture(model, "all") as each:
            model(input_ids=part, use_cache=False)
        alone.append(each)
    sliding = captured.options(0)
    assert sliding["window"] == (7, None) and sliding["cu_seqlens_q"].tolist() == [0, 12, 30]
    for layer in (0, 1):
        p = captured.policy(layer)[0]
        for rows, each in ((slice(0, 12), alone[0]), (slice(12, 30), alone[1])):
            wanted = each.policy(layer)[0]
            torch.testing.assert_close(p[rows, : len(wanted)], wanted, atol=1e-6, rtol=1e-5)


def test_what_packed_rows_refuse() -> None:
    model = build("qwen2")
    given = _packed(model, "qwen2", "sdpa")
    with torch.no_grad(), capture(model, rows=(0, 4)) as captured:
        model(**given, use_cache=False)
    with pytest.raises(ValueError, match=r"one slice or .* for each of S=3 sequences; got 2"):
        captured.policy()
    with pytest.raises(ValueError, match=r"one slice or .* for each of S=3 sequences; got 1"):
        captured.policy(rows=[(0, 4)])
    with pytest.raises(TypeError, match="rows must be None or a sequence of slices"):
        captured.policy(rows=slice(0, 4))


def test_sequences_by_position_alone_need_flash() -> None:
    """With a cache, transformers' masks know nothing of packing: all attend as one sequence."""
    model = build("qwen2")
    given = _packed(model, "qwen2", "sdpa")
    with torch.no_grad(), capture(model) as captured:
        model(**given, use_cache=True)
    assert captured.cu_seqlens is None
    total = given["input_ids"].shape[1]
    assert captured.policy().shape == (1, total, total)
    assert (captured.policy()[0, -1, :5] > 0).all()
