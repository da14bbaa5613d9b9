"""Device functions of the backward of `policy`: the gradient of the scores (README.md)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .side import SMALLEST_HEAD_WEIGHT_BWD


@triton.jit
def load_outcomes(x, b, offs_q, outcome, mask, has_spans: tl.constexpr):
    """`Outcomes` at rows and outcomes whose shapes broadcast; 0 in no outcome (-1)."""
    rows = b * x.stride_b + offs_q.to(tl.int64) * x.stride_t
    if x.ALIGNED:
        rows = tl.multiple_of(rows, (4, 4))
    if has_spans:
        mask = mask & (outcome >= 0)
    return tl.load(x.ptr + rows + outcome, mask=mask, other=0.0)


@triton.jit
def load_factor_and_c(terms, row, offs_q, mask_q):
    """[BLOCK_Q], each; row: `first_row`."""
    # Added in turn, the offsets stay int32 vectors, which take half the registers.
    factor = tl.load(terms.factor_ptr + row + offs_q, mask=mask_q, other=0.0)
    return factor, tl.load(terms.c_ptr + row + offs_q, mask=mask_q, other=0.0)


@triton.jit
def load_delta(terms, row, offs_q, mask_q):
    """[BLOCK_Q]; row: `first_row_of_head`."""
    return tl.load(terms.delta_ptr + row + offs_q, mask=mask_q, other=0.0)


@triton.jit
def score_gradient(p, g, delta):
    """dS_h from P_h and G, both times a row's weight: (12).

    A weight that counts as 0 has a gradient of 0, whatever G is there.
    """
    return tl.where(p < SMALLEST_HEAD_WEIGHT_BWD, 0.0, p * (g - delta))


@triton.jit
def softcap_slope(s, score):
    """1 − (y/c̄)² from the scores before the bias: (14)."""
    squashed = s / score.softcap_log2
    return 1.0 - squashed * squashed


@triton.jit
def add_score_gradient(total, ds, x, PRECISION: tl.constexpr):
    """total + ds x.

    With float16 inputs dS stays float32, in a product of tf32, which holds every float16 number.
    Policies of thousands of keys have a dS of 1e-9, which underflows in float16.
    """
    if x.dtype == tl.float16:
        total = tl.dot(ds, x.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(ds.to(x.dtype), x, total, input_precision=PRECISION)
    return total


@triton.jit
def add_per_span(total, x, one_hot):
    """total + x one_hot in float32, by two products of tf32: x is split, one_hot is exact."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits are tf32's
    total = tl.dot(high, one_hot, total, input_precision="tf32")
    return tl.dot(x - high, one_hot, total, input_precision="tf32")
