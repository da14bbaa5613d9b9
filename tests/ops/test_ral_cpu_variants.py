"""The RAL objective on every variant of the CPU kernels, on several threads."""

from __future__ import annotations

import pytest
import torch

from ral_kernels.ops.divergence.arguments import KINDS
from tests.ops import test_divergence as of_divergence
from tests.ops import test_policy as of_policy
from tests.ops import test_policy_divergence as of_policy_divergence
from tests.ops import test_policy_divergence_at_reference as at_reference
from tests.ops import test_ral_loss as of_ral_loss
from tests.ops.policy_cases import BY_NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN_NAMES = (
    "length_2",
    "off_blocks",
    "chunked_prefill",
    "gqa_7",
    "head_dim_16",
    "head_dim_256",
    "head_dim_37",
    "layout_mixed",
    "rows_middle",
    "scope_batch",
    "padding_left",
    "window_both",
    "softcap",
    "large_scores",
    "increasing_scores",
    "peaked_on_self",
    "together",
)
SPAN_NAMES = ("spans_ragged", "spans_unsorted", "spans_batch", "1000_spans", "span_bias_softcap")

pytestmark = pytest.mark.parametrize("threads", [3], indirect=True)


@pytest.mark.parametrize("name", TOKEN_NAMES + SPAN_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_policy(name: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    of_policy.check_case(BY_NAME[name], dtype, "cpu")


@pytest.mark.parametrize("name", TOKEN_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_policy_divergence(name: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    of_policy_divergence.check_case(BY_NAME[name], dtype, "cpu", "jsd", other_model=True)


@pytest.mark.parametrize("bias", of_policy.LOW_BIASES)
def test_very_low_biases_hide(bias: float, isa: str, threads: int) -> None:
    of_policy.check_low_bias(bias, "cpu")


def test_kept_normalisers_serve_policies_of_one_dtype(isa: str, threads: int) -> None:
    of_ral_loss.check_kept_by_dtype("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["off_blocks", "gqa_7", "layout_bthd", "together"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_unchanged_policy(name: str, kind: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    at_reference.check_unchanged(BY_NAME[name], kind, dtype, "cpu")


@pytest.mark.parametrize("shape", [(2, 7), (33, 127), (1, 8191)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kind: str, shape: tuple[int, ...], isa: str, threads: int) -> None:
    of_divergence.check_shape(kind, shape, "cpu")
