"""`capture`: policies of a running model, held against eager's output_attentions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations.eager_maps import (
    assert_same_gradients,
    eager_maps,
    eager_policy,
    eager_ral_loss,
    gradients,
    leaves_nothing,
    perturbed,
)
from tests.integrations.models import FAMILIES, LAYERS, SLIDING_WINDOW, build, inputs

ROWS = 5  # rows of the last text, in which every family's mask is causal
FLASH_LIKE = "padded_test"


@pytest.fixture(autouse=True, scope="module")
def implementations():
    register()
    _register_flash_like()


def _register_flash_like() -> None:
    """An attention as flash attention is called: 2-D masks, and its own name in the configuration.

    Flash attention itself needs a GPU.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any
    ) -> Any:
        # flash_attention_forward hands this name on, to choose its kernels by
        assert module.config._attn_implementation == FLASH_LIKE
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        own = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        seen = torch.arange(seqlen_k) <= own
        if (window := given.pop("sliding_window", None)) is not None:
            seen &= torch.arange(seqlen_k) > own - window
        dense = seen[None, None] if mask is None else seen & mask[:, None, None, :].bool()
        return sdpa_attention_forward(module, q, k, v, dense, **given)

    AttentionInterface.register(FLASH_LIKE, forward)
    AttentionMaskInterface.register(FLASH_LIKE, flash_attention_mask)


def _build(family: str, implementation: str, **options: Any) -> Any:
    """The family's model; what a mask cannot be made for in two dimensions runs in text alone."""
    if implementation == FLASH_LIKE:
        return build(family, {"text_config": FLASH_LIKE, "vision_config": "sdpa"}, **options)
    return build(family, implementation, **options)


def _pairs(families: Iterable[str]) -> list[tuple[str, str]]:
    """Families and implementations; images of Gemma3 attend both ways, which flash cannot do."""
    implementations = ["sdpa", "eager", "ral", FLASH_LIKE]
    return [
        (family, implementation)
        for family in families
        for implementation in implementations
        if (family, implementation) != ("gemma3", FLASH_LIKE)
    ]


def _real(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


# -- equal to eager's maps ------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "implementation"), _pairs(FAMILIES))
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_policy_is_that_of_eager_maps(family, padding, implementation):
    batch = inputs(family, padding=padding)
    with torch.no_grad():
        wanted = eager_maps(build(family, "eager"), batch)
        model = _build(family, implementation)
        alone = model(**batch, use_cache=False).logits
        with leaves_nothing(model), capture(model, "all", rows=slice(-ROWS, None)) as captured:
            logits = model(**batch, use_cache=False).logits
    assert torch.equal(logits, alone)  # capturing changes nothing
    real = _real(batch)[:, -ROWS:]
    assert captured.layers == list(range(LAYERS)) and real.any()
    for layer in captured.layers:
        policy = captured.policy(layer)
        torch.testing.assert_close(
            policy[real], eager_policy(wanted[layer])[:, -ROWS:][real], atol=1e-6, rtol=1e-5
        )


@pytest.mark.slow(stands_in="test_policy_is_that_of_eager_maps")
def test_flex_attention():
    batch = inputs("qwen2", padding="left")
    wanted = eager_policy(eager_maps(build("qwen2", "eager"), batch)[-1])
    model = build("qwen2", "flex_attention")
    with torch.no_grad(), capture(model) as captured:
        model(**batch, use_cache=False)
    real = _real(batch)
    torch.testing.assert_close(captured.policy()[real], wanted[real], atol=1e-6, rtol=1e-5)


def test_options_are_those_of_the_layer():
    batch = inputs("gemma3", padding="left")
    model = build("gemma3", "sdpa")
    with torch.no_grad(), capture(model, "all", rows=slice(-ROWS, None)) as captured:
        model(**batch, use_cache=False)
    rows = slice(-ROWS, None)
    sliding, full = captured.options(0, rows=rows), captured.options(1, rows=rows)
    assert sliding["window"] == (SLIDING_WINDOW - 1, None) and full["window"] is None
    assert torch.equal(full["key_padding_mask"], _real(batch))
    assert full["scale"] == pytest.approx(16**-0.5) and full["is_causal"]
    # The same op from outside, and what the window keeps out
    p = rk.attention_policy(captured.q(0), captured.k(0), rows=rows, **sliding)
    assert torch.equal(p, captured.policy(0))
    assert (p[:, -1, :-SLIDING_WINDOW] == 0).all() and (p[:, -1, -SLIDING_WINDOW:-1] > 0).all()


def test_soft_cap():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        query_pre_attn_scalar=16, attn_logit_softcapping=1.5, sliding_window=8,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    batch = inputs("qwen2", padding="right", text_length=14)
    wanted = eager_maps(model, batch)
    with capture(model, "all") as captured:
        model(**batch, use_cache=False)
    assert captured.options(0)["softcap"] == 1.5
    for layer in range(2):
        torch.testing.assert_close(
            captured.policy(layer)[_real(batch)],
            eager_policy(wanted[layer])[_real(batch)],
            atol=1e-6,
            rtol=1e-5,
        )


@pytest.mark.parametrize("implementation", ["sdpa", "ral"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_ral_loss_and_gradients_are_those_of_eager_maps(family, padding, implementation):
    batch = inputs(family, padding=padding)
    rows = slice(-ROWS, None)
    counts = _real(batch)[:, rows]
    advantages = torch.tensor([1.3, -0.7])

    eager = build(family, "eager")
    with torch.no_grad():
        reference = eager_policy(eager_maps(perturbed(build(family, "eager")), batch)[-1])
    maps = eager_policy(eager_maps(eager, batch)[-1])
    wanted = eager_ral_loss(maps[:, rows], reference[:, rows], advantages, counts)
    wanted_gradients = gradients(eager, wanted)

    model, old = build(family, implementation), perturbed(build(family, implementation))
    with torch.no_grad(), capture(old, rows=rows) as captured:
        old(**batch, use_cache=False)
    snapshot = captured.snapshot()
    with capture(model, rows=rows) as captured:
        model(**batch, use_cache=False)
    loss = captured.ral_loss(snapshot, advantages, counts)
    assert abs(loss.item() - wanted.item()) < 1e-5 and abs(wanted.item()) > 1e-3
    got = gradients(model, loss)
    assert_same_gradients(got, wanted_gradients)
    # Against itself: exactly nothing
    with capture(model, rows=rows) as captured:
        model(**batch, use_cache=False)
    assert captured.ral_loss(captured.snapshot(), advantages, counts).item() == 0.0
    assert captured.divergence(captured.snapshot()).abs().max().item() == 0.0


@pytest.mark.parametrize("padding", [None, "left"])
def test_marginals_are_sums_of_eager_maps(padding):
    batch = inputs("qwen2_5_vl", padding=padding)
    seqlen = batch["input_ids"].shape[1]
    spans = rk.Spans.from_lengths([4, 6, 5])  # the keys behind them belong to none
    maps = eager_maps(build("qwen2_5_vl", "eager"), batch)[-1]
    model = build("qwen2_5_vl", "sdpa")
    with torch.no_grad(), capture(model, spans=spans) as captured:
        model(**batch, use_cache=False)
    start, stop = seqlen - 5, seqlen - 2
    wanted = torch.stack([x.sum(-1) for x in maps[..., :15].split([4, 6, 5], -1)], -1)
    wanted = wanted[:, :, start:stop]
    got = captured.marginals(rows=(start, stop))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    mean = captured.marginals(rows=(start, stop), head_reduction="mean")
    torch.testing.assert_close(mean, wanted.mean(1), atol=1e-6, rtol=1e-5)
    policy = captured.policy(rows=(start, stop))
    torch.testing.assert_close(
        policy, wanted.mean(1) / wanted.mean(1).sum(-1, keepdim=True), atol=1e-6, rtol=1e-5
    )


# -- generation -----------------------------------------------------------------------------------


def _teacher_forced(family: str, batch: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, ...]:
    """Eager's maps of what was generated, without its last token, which was never fed."""
    extra = tokens.shape[1] - 1 - batch["input_ids"].shape[1]
    full = dict(batch, input_ids=tokens[:, :-1])
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in full:
            full[name] = torch.nn.functional.pad(full[name], (0, extra), value=value)
    return eager_maps(build(family, "eager"), full)


@pytest.mark.parametrize(("family", "implementation"), _pairs(["qwen2_5_vl", "gemma3", "llama"]))
def test_generate_has_a_row_for_each_token(family, implementation):
    batch = inputs(family, padding="left")
    prompt = batch["input_ids"].shape[1]
    model = _build(family, implementation)
    new = SLIDING_WINDOW + 4  # more than Gemma3's window: its cache drops keys
    alone = model.generate(**batch, max_new_tokens=new, do_sample=False)
    spans = rk.Spans.from_lengths([prompt - 3, 3])
    with leaves_nothing(model), capture(model, "all") as captured:
        tokens = model.generate(**batch, max_new_tokens=new, do_sample=False)
    assert torch.equal(tokens, alone) and tokens.shape[1] == prompt + new
    assert len(captured) == 1
    for layer, maps in enumerate(_teacher_forced(family, batch, tokens)):
        wanted = eager_policy(maps)[:, prompt - 1 :]
        policy = captured.policy(layer)
        assert policy.shape == (2, new, prompt + new - 1)
        torch.testing.assert_close(policy, wanted, atol=1e-6, rtol=1e-5)
        last = captured.policy(layer, rows=slice(-1, None), spans=spans)  # of the prompt alone
        shares = torch.stack(
            [x.sum(-1) for x in wanted[:, -1:, :prompt].split([prompt - 3, 3], -1)]
        )
        shares = shares.movedim(0, -1)
        torch.testing.assert_close(
            last, shares / shares.sum(-1, keepdim=True).clamp(min=1e-30), atol=1e-6, rtol=1e-4
        )


def test_generate_keeps_one_cache_and_the_rows_that_were_asked_for():
    batch = inputs("qwen2", padding="left")
    prompt = batch["input_ids"].shape[1]
    model = build("qwen2", "sdpa")
    with capture(model) as captured, capture(model, rows="all") as everything:
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
    calls: list[Any] = []
    call = captured._sinks[0].newest
    while call is not None:
        calls.insert(0, call)
        call = call.before
    assert [call.q.shape[2] for call in calls] == [1] * 6
    assert [call.k.shape[2] for call in calls] == [prompt] + [1] * 5
    # A step's key has memory of its own, not that of its step's cache.
    assert calls[-1].k.untyped_storage().nbytes() == calls[-1].k.numel() * 4
    wanted = eager_policy(_teacher_forced("qwen2", batch, tokens)[-1])
    assert everything.q().shape[2] == wanted.shape[1] == prompt + 5
    real = torch.nn.functional.pad(_real(batch), (0, 5), value=True)
    torch.testing.assert_close(everything.policy()[real], wanted[real], atol=1e-6, rtol=1e-5)
    assert captured.layer().num_generated == 6


def test_generations_and_forwards_in_one_capture():
    batch = inputs("qwen2")
    model = build("qwen2", "sdpa")
    with capture(model) as captured:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        model(**batch, use_cache=False)
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert [forward.q().shape[2] for forward in captured.forwards] == [3, 7, 4]
    # A forward over a cache that was filled before: bottom-right aligned
    with torch.no_grad():
        cache = model(batch["input_ids"][:, :4], use_cache=True).past_key_values
        with capture(model) as captured:
            model(batch["input_ids"][:, 4:], past_key_values=cache, use_cache=True)
    wanted = eager_policy(eager_maps(build("qwen2", "eager"), batch)[-1])[:, 4:]
    torch.testing.assert_close(captured.policy(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_caches_that_are_not_extended_are_refused(how):
    model = build("qwen2", "sdpa")
    with capture(model) as captured:
        model.generate(**inputs("qwen2"), max_new_tokens=5, do_sample=False, **how)
    with pytest.raises(NotImplementedError, match="beam search, assisted decoding, a static"):
        captured.policy()
