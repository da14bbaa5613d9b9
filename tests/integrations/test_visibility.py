"""What `capture` says that rows see is what the attention functions let them see."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.masks import KEY_MASK_DTYPES, Pattern
from ral_kernels.integrations.transformers.visibility import (
    Visibility,
    read_dense_mask,
    read_simple_mask,
)

LENGTH, WINDOW = 12, 3


def seen_by_attention(
    implementation: str, mask: Any, is_causal: bool, sliding_window: int | None, config: Any
) -> torch.Tensor:
    """Bool [B, T, N]: one-hot values make the output the weights."""
    register()
    q = torch.randn(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    module = SimpleNamespace(
        is_causal=is_causal, config=config, num_key_value_groups=1, training=False
    )
    out, _ = ALL_ATTENTION_FUNCTIONS[implementation](
        module, q, q, torch.eye(LENGTH).expand_as(q), mask, sliding_window=sliding_window
    )
    return out[:, :, 0] > 0


@pytest.mark.parametrize("sliding_window", [None, WINDOW, 2 * LENGTH])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "ral"])
def test_without_a_mask(implementation: str, is_causal: bool, sliding_window: int | None) -> None:
    if implementation == "sdpa" and is_causal and sliding_window == WINDOW:
        sliding_window = LENGTH  # sdpa reads no window: from there on transformers makes a mask
    config = SimpleNamespace(sliding_window=sliding_window)
    check(implementation, None, is_causal, sliding_window, config)


@pytest.mark.parametrize("configured", [None, 5])
@pytest.mark.parametrize(
    ("dtype", "says_so"), [*itertools.product(KEY_MASK_DTYPES.values(), (True, False))], ids=str
)
def test_masks_of_ral(dtype: torch.dtype, says_so: bool, configured: int | None) -> None:
    """Of every pattern, in modules that say the same or the opposite of it."""
    pattern = next(x for x, of in KEY_MASK_DTYPES.items() if of == dtype)
    is_causal = pattern.is_causal == says_so
    mask = torch.ones(2, LENGTH, dtype=dtype)
    mask[1, :2] = 0
    config = SimpleNamespace(sliding_window=configured)
    sliding_window = WINDOW if pattern != Pattern(True, False) else None
    check("ral", mask, is_causal, sliding_window, config)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_plain_padding_mask_of_ral(is_causal: bool) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, -2:] = False
    check("ral", mask, is_causal, WINDOW, SimpleNamespace(sliding_window=5))


def check(
    implementation: str, mask: Any, is_causal: bool, sliding_window: int | None, config: Any
) -> None:
    wanted = seen_by_attention(implementation, mask, is_causal, sliding_window, config)
    found = read_simple_mask(
        "capture", mask, seqlen_q=LENGTH, seqlen_k=LENGTH, implementation=implementation,
        is_causal=is_causal, sliding_window=sliding_window, config=config,
    )  # fmt: skip
    assert found is not None and found[0] == LENGTH
    got = found[1].rows(0, LENGTH, LENGTH, LENGTH, "cpu")
    assert torch.equal(got.expand_as(wanted), wanted)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones(1, LENGTH, dtype=torch.bool)])
def test_flash_attention_has_a_window_to_either_side(mask: Any, is_causal: bool) -> None:
    """transformers gives it (sliding_window - 1, sliding_window - 1), causal or not."""
    found = read_simple_mask(
        "capture", mask, seqlen_q=LENGTH, seqlen_k=LENGTH, implementation="flash_attention_2",
        is_causal=is_causal, sliding_window=WINDOW, config=None,
    )  # fmt: skip
    assert found is not None
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    wanted = distance.abs() < WINDOW
    if is_causal:
        wanted &= distance <= 0
    assert torch.equal(found[1].rows(0, LENGTH, LENGTH, LENGTH, "cpu")[0], wanted)


def test_a_dense_mask_may_have_a_window_to_either_side() -> None:
    mask = Visibility(False, (2, 2), None).rows(0, LENGTH, LENGTH, LENGTH, "cpu")[None]
    seen = read_dense_mask(
        "capture", mask, (0, LENGTH), seqlen_q=LENGTH, seqlen_k=LENGTH, is_causal=False,
        sliding_window=WINDOW,
    )  # fmt: skip
    assert seen.window == (2, 2)
