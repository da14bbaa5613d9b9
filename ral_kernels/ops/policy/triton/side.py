"""Device functions of `policy` and `policy_divergence`: scores, masks, weights (README.md)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ral_kernels.runtime.triton_softmax import in_base_2, tanh

# Weights below are 0, so that p is 0 exactly where every head's weight is: the mean of up to 256
# heads stays a normal number. The backward's bound is higher: a weight that it counts, though its
# score was rounded otherwise, has a p that is not 0.
SMALLEST_HEAD_WEIGHT = tl.constexpr(2.0**-118)
SMALLEST_HEAD_WEIGHT_BWD = tl.constexpr(2.0**-117)
SMALLEST_WEIGHT = tl.constexpr(2.0**-100)  # of all heads on the valid keys, as in reference.py


@triton.jit
def load_rows(ptr, stride, offs, mask, first_d, head_dim: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a tensor with rows `stride` apart, 0 behind the mask and head_dim."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    pointers = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if head_dim % BLOCK_D == 0:
        rows = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        rows = tl.load(pointers, mask=mask[:, None] & (offs_d < head_dim)[None, :], other=0.0)
    return rows


@triton.jit
def load_keys(
    k_ptr,
    k_stride_n,
    prefix_ptr,
    prefix_stride_n,
    prefix_length,
    offs_k,
    mask_k,
    first_d,
    head_dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_K, BLOCK_D]: keys of one head, the first `prefix_length` from the shared prefix."""
    if prefix_ptr is None:
        k = load_rows(k_ptr, k_stride_n, offs_k, mask_k, first_d, head_dim, BLOCK_D)
    else:
        own = offs_k >= prefix_length
        offs = offs_k - prefix_length
        k = load_rows(k_ptr, k_stride_n, offs, mask_k & own, first_d, head_dim, BLOCK_D)
        shared = load_rows(
            prefix_ptr, prefix_stride_n, offs_k, mask_k & ~own, first_d, head_dim, BLOCK_D
        )
        k = tl.where(own[:, None], k, shared)
    return k


@triton.jit
def product_in_parts(
    q_ptr,
    q_stride_t,
    offs_q,
    mask_q,
    k_ptr,
    k_stride_n,
    prefix_ptr,
    prefix_stride_n,
    prefix_length,
    offs_k,
    mask_k,
    head_dim: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q kᵀ, BLOCK_D features at a time: float32 rows of more features do not fit the registers."""
    x = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first_d in range(0, HEAD_DIM, BLOCK_D):
        # [BLOCK_Q, BLOCK_D]
        q = load_rows(q_ptr, q_stride_t, offs_q, mask_q, first_d, head_dim, BLOCK_D)
        # [BLOCK_K, BLOCK_D]
        k = load_keys(
            k_ptr,
            k_stride_n,
            prefix_ptr,
            prefix_stride_n,
            prefix_length,
            offs_k,
            mask_k,
            first_d,
            head_dim,
            BLOCK_D,
        )
        x = tl.dot(q, tl.trans(k), x, input_precision=PRECISION)
    return x


@triton.jit
def flagged(flags_ptr, offs_k, mask_k):
    """mask_k and the flags [N] there, if there are any: key padding, a scope."""
    if flags_ptr is not None:
        mask_k = mask_k & (tl.load(flags_ptr + offs_k, mask=mask_k, other=0) != 0)
    return mask_k


@triton.jit
def key_range(first, last, window_left, window_right, start, stop, BLOCK_K: tl.constexpr):
    """From and to which key the rows at positions first to last see keys in [start, stop)."""
    low = tl.maximum(first - window_left, 0) // BLOCK_K * BLOCK_K
    return tl.maximum(low, start), tl.minimum(last + window_right + 1, stop)


@triton.jit
def key_masks(
    position, offs_k, mask_k, in_scope, window_left, window_right, EXCLUDE_SELF: tl.constexpr
):
    """(visible, valid) for positions and keys whose shapes broadcast; in_scope has mask_k in it."""
    distance = offs_k - position
    near = (distance >= -window_left) & (distance <= window_right)
    valid = near & in_scope
    if EXCLUDE_SELF:
        valid = valid & (distance != 0)
    return near & mask_k, valid


@triton.jit
def scores(x, score_factor, softcap_log2, SOFTCAP: tl.constexpr):
    """log2(e) y from q kᵀ: (1)."""
    return tanh(x * score_factor) * softcap_log2 if SOFTCAP else x * score_factor


@triton.jit
def span_bias(bias_ptr, offs_q, stride_t, offs_s, stride_s, mask):
    """log2(e) b, from rows and spans whose shapes broadcast; 0 for keys in no span."""
    pointers = bias_ptr + offs_q.to(tl.int64) * stride_t + offs_s.to(tl.int64) * stride_s
    return in_base_2(tl.load(pointers, mask=mask & (offs_s >= 0), other=0.0))


@triton.jit
def weights(s, m, inverse, SMALLEST: tl.constexpr):
    """P_h on visible keys, from scores in powers of two and the row's normaliser: (4).

    On others it may be anything: the caller leaves them out.
    """
    p = tl.exp2(s - m) * inverse
    return tl.where(p < SMALLEST, 0.0, p)


@triton.jit
def sum_of_weights(
    q_ptr,
    q_stride_h,
    q_stride_t,
    k_ptr,
    k_stride_h,
    k_stride_n,
    prefix_ptr,
    prefix_stride_h,
    prefix_stride_n,
    prefix_length,
    bias_ptr,
    bias_stride_h,
    bias_stride_t,
    bias_stride_s,
    norm_ptr,
    norm_stride_i,
    norm_stride_h,
    num_kv_heads,
    group,
    offs_q,
    mask_q,
    offs_k,
    mask_k,
    span_k,
    score_factor,
    softcap_log2,
    head_dim: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_h P_h of one sample on visible keys, [BLOCK_Q, BLOCK_K], heads in order; see `weights`.

    Both policies of a comparison come from here: equal inputs give equal bits.
    """
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for kv_head in range(num_kv_heads):
        k_head = k_ptr + tl.cast(kv_head, tl.int64) * k_stride_h
        prefix_head = prefix_ptr
        if prefix_ptr is not None:
            prefix_head += tl.cast(kv_head, tl.int64) * prefix_stride_h
        if BLOCK_D == HEAD_DIM:
            # [BLOCK_K, HEAD_DIM]
            k = load_keys(
                k_head,
                k_stride_n,
                prefix_head,
                prefix_stride_n,
                prefix_length,
                offs_k,
                mask_k,
                0,
                head_dim,
                HEAD_DIM,
            )
        for head in range(kv_head * group, (kv_head + 1) * group):
            q_head = q_ptr + tl.cast(head, tl.int64) * q_stride_h
            norm_head = norm_ptr + tl.cast(head, tl.int64) * norm_stride_h + offs_q
            # [BLOCK_Q], each
            m = tl.load(norm_head, mask=mask_q, other=0.0)
            inverse = tl.load(norm_head + norm_stride_i, mask=mask_q, other=0.0)
            if BLOCK_D == HEAD_DIM:
                # [BLOCK_Q, HEAD_DIM]
                q = load_rows(q_head, q_stride_t, offs_q, mask_q, 0, head_dim, HEAD_DIM)
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            else:
                x = product_in_parts(
                    q_head,
                    q_stride_t,
                    offs_q,
                    mask_q,
                    k_head,
                    k_stride_n,
                    prefix_head,
                    prefix_stride_n,
                    prefix_length,
                    offs_k,
                    mask_k,
                    head_dim,
                    HEAD_DIM,
                    BLOCK_D,
                    PRECISION,
                    BLOCK_Q,
                    BLOCK_K,
                )
            s = scores(x, score_factor, softcap_log2, SOFTCAP)
            if bias_ptr is not None:
                s += span_bias(
                    bias_ptr + tl.cast(head, tl.int64) * bias_stride_h,
                    offs_q[:, None],
                    bias_stride_t,
                    span_k[None, :],
                    bias_stride_s,
                    mask_q[:, None],
                )  # (2)
            total += weights(s, m[:, None], inverse[:, None], SMALLEST_HEAD_WEIGHT)
    return total
