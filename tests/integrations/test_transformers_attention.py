"""attn_implementation="ral" in whole models: as sdpa, over the families of models.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.attention import attention_forward
from tests.integrations import models

PADDINGS = [None, "left", "right"]
# (family, with pictures)
SUBJECTS = [
    (name, images)
    for name, family in models.FAMILIES.items()
    for images in ([False, True] if family.pictures else [False])
]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """[B, T], which positions have logits that mean something."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def logits_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real tokens, and every gradient of a random functional of them."""
    model.zero_grad()
    logits = model(**batch).logits[real_tokens(batch)]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits.float() * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name],
            gradient,
            rtol=2e-4,
            atol=float(2e-6 * scale),
            msg=partial(str.__add__, f"{name}: "),
        )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "images"), SUBJECTS)
def test_logits_and_gradients_equal_sdpa(name: str, images: bool, padding: str | None) -> None:
    batch = models.inputs(name, images=images, padding=padding, batch_size=3)
    wanted, wanted_gradients = logits_and_gradients(models.build(name, "sdpa"), batch)
    got, gradients = logits_and_gradients(models.build(name, "ral"), batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert_same_gradients(gradients, wanted_gradients)
    if images:
        assert any("vis" in n and g.abs().max() > 0 for n, g in gradients.items())


@pytest.mark.parametrize(("name", "images"), SUBJECTS)
def test_bfloat16_is_as_right_as_sdpa(name: str, images: bool) -> None:
    """Errors against float32 with the same weights at most twice sdpa's in bfloat16."""
    batch = models.inputs(name, images=images, padding="left", dtype=torch.bfloat16)
    exact_batch = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    half = models.build(name, "sdpa").bfloat16()
    exact, exact_gradients = logits_and_gradients(copy.deepcopy(half).float(), exact_batch)

    def errors(model: Any) -> tuple[float, float]:
        logits, gradients = logits_and_gradients(model, batch)
        off = sum(
            float((gradients[n].float() - g).square().sum()) for n, g in exact_gradients.items()
        )
        return float((logits.float() - exact).norm()), off**0.5

    theirs = errors(half)
    half.set_attn_implementation("ral")
    ours = errors(half)
    assert theirs[0] > 0
    assert ours[0] <= 2 * theirs[0] and ours[1] <= 2 * theirs[1]


GENERATION: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("name", "images"), SUBJECTS)
@pytest.mark.parametrize("kind", GENERATION)
def test_generate_equals_sdpa(kind: str, name: str, images: bool, padding: str | None) -> None:
    batch = models.inputs(name, images=images, padding=padding)
    options = dict(GENERATION[kind])
    # More tokens than Gemma3's window, so that its cache starts to forget.
    options |= {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    results = [
        models.build(name, implementation).generate(**batch, **options, output_scores=True)
        for implementation in ("sdpa", "ral")
    ]
    wanted, got = results
    assert torch.equal(got.sequences, wanted.sequences)
    assert got.sequences[:, batch["input_ids"].shape[1] :].unique().numel() > 3
    if kind != "beams":
        for a, b in zip(got.scores, wanted.scores, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continuing_a_cache_equals_one_forward(
    name: str, padding: str | None, static: bool
) -> None:
    """Several new tokens over a cache: the last query stands at the last written key."""
    from transformers import DynamicCache, StaticCache

    batch = models.inputs(name, images=False, padding=padding, text_length=20)
    model = models.build(name, "ral")
    whole = model(**batch).logits
    config = model.config.get_text_config()
    cache = StaticCache(config, max_cache_len=32) if static else DynamicCache(config=config)
    pieces = []
    mask = batch.get("attention_mask")
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 16), (16, 20)):
            given = {} if mask is None else {"attention_mask": mask[:, :stop]}
            if mask is not None:
                given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
            ids = batch["input_ids"][:, start:stop]
            pieces.append(model(input_ids=ids, past_key_values=cache, **given).logits)
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = model(**batch, position_ids=positions).logits
    rows = real_tokens(batch)
    torch.testing.assert_close(torch.cat(pieces, 1)[rows], whole[rows], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", models.VISION_FAMILIES)
def test_text_and_vision_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = models.inputs(name, padding="left")
    wanted = models.build(name, "sdpa")(**batch).logits
    called: list[str] = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(type(module).__name__)
        return attention_forward(module, *args, **kwargs)

    from transformers import AttentionInterface

    AttentionInterface.register("ral", spy)
    for text, vision in (("ral", "sdpa"), ("sdpa", "ral"), ("ral", "ral")):
        called.clear()
        model = models.build(name, {"text_config": text, "vision_config": vision})
        rows = real_tokens(batch)
        torch.testing.assert_close(model(**batch).logits[rows], wanted[rows], rtol=1e-4, atol=2e-5)
        is_vision = ["Vision" in module or "Siglip" in module for module in called]
        assert any(is_vision) == (vision == "ral")
        assert all(is_vision) == (text != "ral")


def test_sample_is_independent_of_its_padding() -> None:
    """Padding honoured on both sides: a padded sample has the logits that it has alone."""
    model = models.build("qwen2", "ral")
    for padding in ("left", "right"):
        batch = models.inputs("qwen2", padding=padding)
        rows = real_tokens(batch)[1]
        logits = model(**batch).logits[1, rows]
        alone = model(input_ids=batch["input_ids"][1:, rows]).logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_softcap_and_window_equal_eager(padding: str | None) -> None:
    """Gemma 2: sdpa knows no soft cap, eager does."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **{**models.TEXT, "initializer_range": 0.4},
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )
    batch = models.inputs("llama", padding=padding, text_length=16)
    found = []
    for implementation in ("eager", "ral"):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation=implementation)
        found.append(logits_and_gradients(model.eval(), batch))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=5e-5)
    assert_same_gradients(found[1][1], found[0][1])


# Models with something of their own: (configuration, model, options).
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # makes a windowed mask and does not tell its attention how wide
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    # every layer has a window, and the configuration no types of layers
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 4}),
    # cuts rows out of the mask
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": models.VOCABULARY,
            "tie_word_embeddings": False,
        },
    ),
    # both directions, some layers within a window, which it passes one wider than its mask has it
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {"local_attention": 6}),
    # an encoder, a decoder, and attention from one to the other
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            **{f"{side}_{name}": size for side in ("encoder", "decoder")
                for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))},
            "d_model": 64,
            "init_std": models.SPREAD,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
}  # fmt: skip


def build_other(name: str, implementation: str) -> Any:
    import transformers

    config_class, model_class, options = OTHERS[name]
    config = getattr(transformers, config_class)(**{**models.TEXT, **options})
    torch.manual_seed(0)
    model: Any = getattr(transformers, model_class)._from_config(
        config, attn_implementation=implementation
    )
    return model.eval()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", OTHERS)
def test_models_with_something_of_their_own(name: str, padding: str | None) -> None:
    batch = models.inputs("llama", padding=padding, text_length=14)
    wanted = logits_and_gradients(build_other(name, "sdpa"), batch)
    got = logits_and_gradients(build_other(name, "ral"), batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-4, atol=5e-5)
    assert_same_gradients(got[1], wanted[1])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["mistral", "gemma4", "bart"])
def test_generate_of_models_with_something_of_their_own(name: str, static: bool) -> None:
    batch = models.inputs("llama", padding="left", text_length=14)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_scores": True}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    wanted, got = (
        build_other(name, implementation).generate(
            **batch, **options, return_dict_in_generate=True, pad_token_id=0
        )
        for implementation in ("sdpa", "ral")
    )
    assert torch.equal(got.sequences, wanted.sequences)
    for a, b in zip(got.scores, wanted.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_of_four_dimensions(kind: str) -> None:
    """A user's own pattern is the whole truth: no causality is added to it."""
    batch = models.inputs("llama")
    length = batch["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(2, 1, length, length, generator=generator) < 0.5
    allowed |= torch.eye(length, dtype=torch.bool)
    mask = allowed if kind == "bool" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    wanted, got = (
        models.build("llama", implementation)(batch["input_ids"], attention_mask=mask).logits
        for implementation in ("sdpa", "ral")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = models.build("llama", "ral")
    ids = models.inputs("llama", text_length=10, batch_size=1)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    alone = [model(input_ids=part).logits[0] for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=2e-5)


def test_packed_sequences_by_their_lengths() -> None:
    """cu_seq_lens, as flash attention takes them: per sequence, causal or not, with a window."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4, 1, 6]
    query = torch.randn(1, 4, 11, 8, generator=generator)
    key, value = (torch.randn(1, 2, 11, 8, generator=generator) for _ in range(2))
    bounds = torch.tensor([0, 4, 5, 11])
    module = SimpleNamespace(is_causal=True)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    for options in ({}, {"is_causal": False}, {"sliding_window": 3}):
        got, _ = attention_forward(module, query, key, value, **given, **options)
        parts = [x.split(lengths, dim=2) for x in (query, key, value)]
        wanted = [attention_forward(module, *qkv, **options)[0] for qkv in zip(*parts, strict=True)]
        torch.testing.assert_close(got, torch.cat(wanted, 1))
    with pytest.raises(NotImplementedError, match=r"packed sequences need .* got cu_seq_lens_q"):
        attention_forward(module, query, key, value, cu_seq_lens_q=bounds)


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=["no mask", "padding"])
def test_both_ways_the_mask_alone_has_a_window(dtype: torch.dtype | None) -> None:
    """DiffusionGemma's decoder names a window and makes no mask of it: eager and sdpa see all."""
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    mask = None
    if dtype is not None:  # of masks.KEY_MASK_DTYPES: padding, both ways, no window
        mask = torch.ones(1, 9, dtype=dtype)
        mask[:, 7:] = 0
    module = SimpleNamespace(is_causal=False)
    got, _ = attention_forward(module, query, key, value, mask, sliding_window=3)
    seen = None if mask is None else mask[:, None, None].bool()
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    torch.testing.assert_close(got, wanted.transpose(1, 2))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    batch = models.inputs(name, padding="left")
    model = models.build(name, "ral")
    wanted = logits_and_gradients(model, batch)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = logits_and_gradients(model, batch)
    torch.testing.assert_close(got[0], wanted[0])
    assert_same_gradients(got[1], wanted[1])


@pytest.mark.parametrize(
    "padding",
    [
        pytest.param(None, marks=pytest.mark.slow(stands_in="test_compile_of_a_text_model")),
        "left",
    ],
)
def test_compile_of_a_text_model(padding: str | None) -> None:
    batch = models.inputs("llama", padding=padding)
    model = models.build("llama", "ral")
    wanted = logits_and_gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = logits_and_gradients(compiled, batch)
    rows = {name.removeprefix("_orig_mod."): gradient for name, gradient in got[1].items()}
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=2e-5)
    assert_same_gradients(rows, wanted[1])


def test_compile_over_a_static_cache() -> None:
    """One graph for every fill of the cache."""
    from transformers import StaticCache

    model, ids = models.build("llama", "ral"), models.inputs("llama", text_length=16)["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(model.config, max_cache_len=24)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        whole = model(ids).logits
        model(ids[:, :4], past_key_values=cache)
        pieces = [compiled(ids[:, i : i + 4], past_key_values=cache).logits for i in (4, 8, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, 4:], rtol=1e-4, atol=2e-5)


def test_autocast() -> None:
    batch = models.inputs("llama", padding="left")
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = (models.build("llama", name)(**batch).logits for name in ("sdpa", "ral"))
    assert got.dtype == wanted.dtype == torch.bfloat16
    exact = models.build("llama", "sdpa")(**batch).logits
    rows = real_tokens(batch)
    theirs, ours = ((x.float() - exact)[rows].norm() for x in (wanted, got))
    assert 0 < ours <= 2 * theirs


def test_float64_and_wide_heads() -> None:
    """What the compiled backends do not take goes to the reference, not to a wrong result."""
    for options in ({"dtype": torch.float64}, {"head_dim": 288}):
        batch = models.inputs("llama", padding="left")
        wanted, got = (
            models.build("llama", name, **options)(**batch).logits for name in ("sdpa", "ral")
        )
        rows = real_tokens(batch)
        torch.testing.assert_close(got[rows], wanted[rows], rtol=1e-4, atol=2e-5)


def test_queries_shared_by_the_batch() -> None:
    """Learned queries have batch 1; sdpa broadcasts them."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(2))
    out, _ = attention_forward(SimpleNamespace(), query, key, value, None, is_causal=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(query.expand(2, 4, 3, 8), key, value)
    torch.testing.assert_close(out, wanted.transpose(1, 2))
