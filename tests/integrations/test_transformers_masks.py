"""The masks of "ral", function by function: equal to sdpa's over patterns, padding and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ral_kernels.integrations.transformers import masks, register
from ral_kernels.integrations.transformers.attention import attention_forward

BATCH, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 3, 4, 2, 8, 5
STATIC_LENGTH = 24


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield


def config_of(implementation: str, **options: Any) -> Any:
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        **options,
    )
    config._attn_implementation = implementation
    return config


def attends_both_ways_to_first_keys(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k < 4


# name -> (transformers' function, options of the configuration, options of the call, is_causal)
PATTERNS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], bool]] = {
    "causal": (masking_utils.create_causal_mask, {}, {}, True),
    "window": (
        masking_utils.create_sliding_window_causal_mask,
        {"sliding_window": WINDOW},
        {},
        True,
    ),
    "wide_window": (
        masking_utils.create_sliding_window_causal_mask,
        {"sliding_window": 100},
        {},
        True,
    ),
    "chunks": (
        masking_utils.create_chunked_causal_mask,
        {"attention_chunk_size": WINDOW},
        {},
        True,
    ),
    "wide_chunks": (
        masking_utils.create_chunked_causal_mask,
        {"attention_chunk_size": 100},
        {},
        True,
    ),
    "bidirectional": (masking_utils.create_bidirectional_mask, {}, {}, False),
    "bidirectional_window": (
        masking_utils.create_bidirectional_sliding_window_mask,
        {"sliding_window": WINDOW},
        {},
        False,
    ),
    "prefix": (
        masking_utils.create_causal_mask,
        {},
        {"or_mask_function": attends_both_ways_to_first_keys},
        True,
    ),
    "image": (
        masking_utils.create_causal_mask,
        {},
        {"block_sequence_ids": torch.tensor([[-1] * 2 + [0] * 4 + [-1] * 30] * BATCH)},
        True,
    ),
    "materialised": (
        masking_utils.create_causal_mask,
        {},
        {"allow_is_causal_skip": False},
        True,
    ),
}
# (cache, (tokens in the cache, new tokens))
LENGTHS = [(0, 9), (0, 1), (7, 1), (7, 6), (3, 2), (12, 4), (12, 1)]
CACHES = [
    (cache, lengths)
    for cache in ("none", "dynamic", "static")
    for lengths in LENGTHS
    if cache != "none" or lengths[0] == 0
]


def padding_of(kind: str | None, total: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(BATCH, total, dtype=torch.long)
    for sample in range(1, BATCH):
        side = slice(0, sample) if kind == "left" else slice(total - sample, None)
        if kind == "all_real":
            break
        mask[sample, side] = 0
    return mask


def mask_and_output(
    implementation: str,
    pattern: str,
    cache_kind: str,
    lengths: tuple[int, int],
    padding: str | None,
) -> tuple[Any, Tensor]:
    """The mask of an implementation and what its attention makes of it."""
    create, options, call, is_causal = PATTERNS[pattern]
    config = config_of(implementation, **options)
    past, new = lengths
    generator = torch.Generator().manual_seed(3)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(BATCH, heads, length, HEAD_DIM, generator=generator)

    cache: Any = None
    if cache_kind == "dynamic":
        cache = DynamicCache(config=config)
    elif cache_kind == "static":
        cache = StaticCache(config=config, max_cache_len=STATIC_LENGTH)
    if past:
        cache.update(normal(KV_HEADS, past), normal(KV_HEADS, past), 0)
    mask = create(
        config=config,
        inputs_embeds=torch.zeros(BATCH, new, 0),
        attention_mask=padding_of(padding, past + new),
        past_key_values=cache,
        **call,
    )
    query, key, value = (normal(h, new) for h in (HEADS, KV_HEADS, KV_HEADS))
    if cache is not None:
        key, value = cache.update(key, value, 0)
    module = SimpleNamespace(
        config=config, is_causal=is_causal, num_key_value_groups=HEADS // KV_HEADS, training=False
    )
    attention = attention_forward if implementation == "ral" else sdpa_attention_forward
    out, weights = attention(module, query, key, value, mask, scaling=0.7)  # type: ignore[arg-type]
    assert weights is None and out.is_contiguous()
    return mask, out


def rows_that_see(padding: str | None, lengths: tuple[int, int]) -> Tensor:
    """[B, new]: queries that are real tokens."""
    past, new = lengths
    mask = padding_of(padding, past + new)
    return torch.ones(BATCH, new, dtype=torch.bool) if mask is None else mask[:, past:].bool()


@pytest.mark.parametrize("padding", [None, "left", "right", "all_real"])
@pytest.mark.parametrize(("cache_kind", "lengths"), CACHES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_sdpa(
    pattern: str, cache_kind: str, lengths: tuple[int, int], padding: str | None
) -> None:
    wanted = mask_and_output("sdpa", pattern, cache_kind, lengths, padding)[1]
    got = mask_and_output("ral", pattern, cache_kind, lengths, padding)[1]
    rows = rows_that_see(padding, lengths)
    torch.testing.assert_close(got[rows], wanted[rows], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    ("cache_kind", "lengths"), [case for case in CACHES if case[1][1] > 1], ids=str
)
@pytest.mark.parametrize(
    "pattern", ["causal", "window", "wide_window", "wide_chunks", "bidirectional"]
)
def test_ordinary_masks_are_not_dense(
    pattern: str, cache_kind: str, lengths: tuple[int, int], padding: str | None
) -> None:
    mask, _ = mask_and_output("ral", pattern, cache_kind, lengths, padding)
    assert mask is None or mask.dim() == 2
    if cache_kind == "none" and padding is None and pattern != "window":
        assert mask is None


def test_bidirectional_window_is_not_dense() -> None:
    mask, _ = mask_and_output("ral", "bidirectional_window", "none", (0, 9), "left")
    assert mask.shape == (BATCH, 9) and mask.dtype == torch.int32


@pytest.mark.parametrize("pattern", ["chunks", "prefix", "image", "materialised"])
def test_what_is_no_pattern_is_dense(pattern: str) -> None:
    mask, _ = mask_and_output("ral", pattern, "none", (0, 9), "left")
    assert mask.shape == (BATCH, 1, 9, 9) and mask.dtype == torch.bool


def test_window_of_the_caller_does_not_reach_a_mask_without_one() -> None:
    # DiffusionGemma asks for a whole bidirectional mask and names the window as local_size.
    mask = masks.key_mask(
        batch_size=1,
        q_length=9,
        kv_length=9,
        q_offset=0,
        kv_offset=0,
        mask_function=masking_utils.bidirectional_mask_function,
        attention_mask=torch.tensor([[False] + [True] * 8]),
        allow_is_bidirectional_skip=True,
        local_size=WINDOW,
        config=SimpleNamespace(sliding_window=WINDOW),
    )
    assert mask is not None and masks.PATTERNS[mask.dtype] == masks.Pattern(False, False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_mask_goes_before_the_module(is_causal: bool) -> None:
    """A model may make a mask for both directions and leave `module.is_causal` at True."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    keys = torch.ones(2, 6, dtype=torch.bool)
    keys[0, :2] = False
    mask = keys.to(masks.KEY_MASK_DTYPES[masks.Pattern(is_causal, has_window=False)])
    got, _ = attention_forward(SimpleNamespace(is_causal=not is_causal), query, key, value, mask)
    allowed = keys[:, None, None].expand(2, 1, 6, 6)
    allowed = allowed.tril() if is_causal else allowed
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed)
    torch.testing.assert_close(got[keys], wanted.transpose(1, 2)[keys], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("q_offset", "kv_offset", "kv_length"),
    [(6, 0, 8), (6, 3, 9)],
    ids=["queries_beyond_the_keys", "keys_beyond_the_queries_of_a_window"],
)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_queries_and_keys_that_do_not_end_together(
    q_offset: int, kv_offset: int, kv_length: int, window: int | None
) -> None:
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    given: dict[str, Any] = {
        "batch_size": 1,
        "q_length": 4,
        "q_offset": q_offset,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": torch.ones(1, 12, dtype=torch.bool),
        "local_size": window,
    }
    mask = masks.key_mask(
        **given, allow_is_causal_skip=True, config=SimpleNamespace(sliding_window=window)
    )
    wanted = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    assert mask is not None and wanted is not None and torch.equal(mask, wanted)


def test_a_token_over_a_full_window_has_no_mask() -> None:
    mask, _ = mask_and_output("ral", "window", "dynamic", (12, 1), None)
    assert mask is None


def test_a_mask_that_a_model_concatenates_is_dense() -> None:
    """`generate` makes T5Gemma 2's masks for a static cache: with no skip, of four dimensions."""
    mask = masks.key_mask(
        batch_size=1, q_length=3, q_offset=0, kv_length=3, kv_offset=0,
        mask_function=masking_utils.causal_mask_function, allow_is_causal_skip=True,
        config=SimpleNamespace(model_type="t5gemma2_decoder"),
    )  # fmt: skip
    assert mask is not None and torch.equal(mask[0, 0], torch.ones(3, 3).tril().bool())


def test_positions_of_transformers_4() -> None:
    """There the mask function is given the positions of the queries."""
    padding = torch.ones(2, 13, dtype=torch.bool)
    padding[0, :3] = False
    given: dict[str, Any] = {
        "batch_size": 2,
        "kv_length": STATIC_LENGTH,
        "kv_offset": 0,
        "mask_function": masking_utils.causal_mask_function,
        "attention_mask": padding,
        "allow_is_causal_skip": True,
    }
    old = masks.key_mask(cache_position=torch.arange(7, 13), **given)
    new = masks.key_mask(q_length=6, q_offset=7, **given)
    assert old is not None and new is not None
    assert old.shape == (2, 13) and old.dtype == new.dtype and torch.equal(old, new)


def test_packed_sequences() -> None:
    """Positions that restart: sequences do not see each other, and the mask is dense."""
    outputs = []
    for implementation in ("sdpa", "ral"):
        config = config_of(implementation)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
        mask = masking_utils.create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(1, 9, 0),
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        assert isinstance(mask, Tensor) and mask.shape == (1, 1, 9, 9)
        generator = torch.Generator().manual_seed(3)
        query, key, value = (
            torch.randn(1, h, 9, HEAD_DIM, generator=generator) for h in (HEADS, 2, 2)
        )
        module = SimpleNamespace(config=config, is_causal=True, num_key_value_groups=2)
        attention = attention_forward if implementation == "ral" else sdpa_attention_forward
        outputs.append(attention(module, query, key, value, mask)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-6, rtol=1e-5)


def test_a_graph_does_not_read_how_full_a_static_cache_is() -> None:
    cache = StaticCache(config=config_of("ral"), max_cache_len=STATIC_LENGTH)
    cache.update(*(torch.zeros(BATCH, KV_HEADS, 4, HEAD_DIM) for _ in "kv"), 0)

    def mask_of(embeddings: Tensor) -> Any:
        return masking_utils.create_causal_mask(
            config=config_of_cache,
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=cache,
        )

    config_of_cache, embeddings = config_of("ral"), torch.zeros(BATCH, 3, 0)
    eager = mask_of(embeddings)
    compiled = torch.compile(mask_of, fullgraph=True, backend="eager")(embeddings)
    assert eager.shape == (BATCH, 7)
    assert compiled.shape == (BATCH, 1, 3, STATIC_LENGTH)


def test_masks_pass_through_generate_unchanged() -> None:
    """`generate` with a static cache makes the mask, and the model makes one of that again."""
    config = config_of("ral", sliding_window=WINDOW)
    for past, new in [(0, 9), (0, 3), (3, 4), (7, 2), (7, 1)]:
        cache = StaticCache(config=config, max_cache_len=STATIC_LENGTH)
        if past:
            states = torch.zeros(BATCH, KV_HEADS, past, HEAD_DIM)
            cache.update(states, states, 0)
        given: dict[str, Any] = {
            "config": config,
            "inputs_embeds": torch.zeros(BATCH, new, 0),
            "past_key_values": cache,
        }
        create = masking_utils.create_sliding_window_causal_mask
        once = create(attention_mask=padding_of("left", past + new), **given)
        assert isinstance(once, Tensor)
        twice = create(attention_mask=once, **given)
        assert isinstance(twice, Tensor)
        assert twice.dtype == once.dtype and torch.equal(twice, once)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("pattern", ["causal", "window", "bidirectional"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mask_takes_memory_of_a_row(pattern: str, padding: str) -> None:
    create, options, _, _ = PATTERNS[pattern]
    length, sizes = 4096, {}
    for implementation in ("ral", "sdpa"):
        with Largest() as largest:
            create(
                config=config_of(implementation, **options),
                inputs_embeds=torch.zeros(BATCH, length, 0),
                attention_mask=padding_of(padding, length),
                past_key_values=None,
            )
        sizes[implementation] = largest.size
    assert sizes["ral"] <= 8 * BATCH * length  # the padding itself came as int64
    assert sizes["sdpa"] >= BATCH * length * length
