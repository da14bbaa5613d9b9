"""Device functions of `policy` and `policy_divergence`: scores, masks, weights (README.md)."""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....runtime.triton_blocks import block_ranges
from ....runtime.triton_rows import head_of, load_rows
from ....runtime.triton_softmax import in_base_2, tanh
from ....runtime.triton_spans import sequence_of_block

# Weights below are 0, so that p is 0 exactly where the weights of all heads are: the mean of up to
# 256 heads stays a normal number. The bound of the backward is higher: where a weight passes it,
# though its score was rounded otherwise, p is not 0.
SMALLEST_HEAD_WEIGHT = tl.constexpr(2.0**-118)
SMALLEST_HEAD_WEIGHT_BWD = tl.constexpr(2.0**-117)
SMALLEST_WEIGHT = tl.constexpr(2.0**-100)  # of all heads on the valid keys, as in reference.py


class KeyHead(NamedTuple):
    """The keys of one head: `length` of them from the shared prefix, if there is one."""

    own: Any
    prefix: Any
    length: Any


class Sample(NamedTuple):
    """The sample of a program, or its packed sequence: see `Samples`."""

    rows: Any  # what strides between samples multiply in tensors over rows
    keys: Any  # and in tensors over keys
    num_rows: Any
    seqlen_k: Any
    query_start: Any


@triton.jit
def blocks_of_rows(samples, num_rows, BLOCK_Q: tl.constexpr):
    """Blocks of rows of one sample; of all packed sequences, some of them empty."""
    if samples.row_offsets_ptr is None:
        return tl.cdiv(num_rows, BLOCK_Q)
    else:
        return num_rows // BLOCK_Q + samples.batch_size  # see sequence_of_block


@triton.jit
def blocks_of_keys(samples, seqlen_k, BLOCK_K: tl.constexpr):
    """Likewise of keys."""
    if samples.key_offsets_ptr is None:
        return tl.cdiv(seqlen_k, BLOCK_K)
    else:
        return samples.total_k // BLOCK_K + samples.batch_size


@triton.jit
def sample_of_rows(samples, num_rows, seqlen_k, query_start, b, block, BLOCK_Q: tl.constexpr):
    """(the sample, its block of rows); packed: of the sequence whose rows `block` holds."""
    if samples.row_offsets_ptr is None:
        return Sample(b, b, num_rows, seqlen_k, query_start), block
    else:
        n, start, own_rows, own_block = sequence_of_block(
            samples.row_offsets_ptr, samples.batch_size, block, BLOCK_Q
        )
        first_key = tl.load(samples.key_offsets_ptr + n)
        # A block beyond the last row sees no key: its loops are empty.
        own_keys = tl.load(samples.key_offsets_ptr + n + 1) - first_key
        own_keys = tl.where(own_block * BLOCK_Q < own_rows, own_keys, 0)
        own_start = tl.load(samples.query_starts_ptr + n)
        sample = Sample(
            start.to(tl.int64), first_key.to(tl.int64), own_rows, own_keys, own_start
        )  # fmt: skip
        return sample, own_block


@triton.jit
def sample_of_keys(samples, num_rows, seqlen_k, query_start, b, block, BLOCK_K: tl.constexpr):
    """(the sample, its block of keys), likewise."""
    if samples.key_offsets_ptr is None:
        return Sample(b, b, num_rows, seqlen_k, query_start), block
    else:
        n, start, own_keys, own_block = sequence_of_block(
            samples.key_offsets_ptr, samples.batch_size, block, BLOCK_K
        )
        first_row = tl.load(samples.row_offsets_ptr + n)
        own_rows = tl.load(samples.row_offsets_ptr + n + 1) - first_row
        own_rows = tl.where(own_block * BLOCK_K < own_keys, own_rows, 0)
        own_start = tl.load(samples.query_starts_ptr + n)
        sample = Sample(
            first_row.to(tl.int64), start.to(tl.int64), own_rows, own_keys, own_start
        )  # fmt: skip
        return sample, own_block


@triton.jit
def program_of_head(samples, heads, num_rows, query_start, BLOCK_Q: tl.constexpr):
    """(sample, its block of rows, head, piece of the keys) of this program."""
    row_blocks = blocks_of_rows(samples, num_rows, BLOCK_Q)
    pid = tl.program_id(0)
    block = pid % row_blocks
    head = (pid // row_blocks % heads.num_heads).to(tl.int64)
    rest = pid // row_blocks // heads.num_heads
    split = rest
    if samples.row_offsets_ptr is None:
        split = rest // samples.batch_size
        rest = rest % samples.batch_size
    sample, block = sample_of_rows(
        samples, num_rows, heads.seqlen_k, query_start, rest.to(tl.int64), block, BLOCK_Q
    )
    return sample, block, head, split


@triton.jit
def last_row(samples, num_rows):
    """The rows of one sample; packed: of all sequences. A tensor may have rows beyond them."""
    if samples.row_offsets_ptr is None:
        return num_rows
    else:
        return tl.load(samples.row_offsets_ptr + samples.batch_size)


@triton.jit
def rows_of_heads(samples, num_heads, num_rows):
    """Elements of a contiguous [B, H, T]."""
    if samples.row_offsets_ptr is None:
        return tl.cast(num_heads, tl.int64) * samples.batch_size * num_rows
    else:
        return tl.cast(num_heads, tl.int64) * num_rows


@triton.jit
def first_row(samples, sample, num_rows):
    """Index of the sample's first row in a contiguous [B, T]."""
    if samples.row_offsets_ptr is None:
        return sample.rows * num_rows
    else:
        return sample.rows


@triton.jit
def first_row_of_head(samples, sample, head, num_heads, num_rows):
    """Index of the sample's first row in a contiguous [B, H, T]."""
    if samples.row_offsets_ptr is None:
        return (sample.rows * num_heads + head) * num_rows
    else:
        return head * num_rows + sample.rows


@triton.jit
def kv_head_of(head, heads):
    return head // (heads.num_heads // heads.num_kv_heads)


@triton.jit
def keys_of_head(k, b, kv_head):
    """Keys without a prefix."""
    own = head_of(k, b, kv_head)
    return KeyHead(own, own, 0)


@triton.jit
def keys_with_prefix(k, prefix, b, kv_head):
    own = head_of(k, b, kv_head)
    if prefix.ptr is None:
        return KeyHead(own, own, 0)
    else:
        return KeyHead(own, head_of(prefix, tl.load(prefix.index_ptr + b), kv_head), prefix.length)


@triton.jit
def load_keys(
    keys,
    offs_k,
    mask_k,
    first_d,
    head_dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """[BLOCK_K, BLOCK_D]: keys of one head."""
    if not HAS_PREFIX:
        k = load_rows(keys.own, offs_k, mask_k, first_d, head_dim, BLOCK_D)
    else:
        own = offs_k >= keys.length
        offs = offs_k - keys.length
        k = load_rows(keys.own, offs, mask_k & own, first_d, head_dim, BLOCK_D)
        shared = load_rows(keys.prefix, offs_k, mask_k & ~own, first_d, head_dim, BLOCK_D)
        k = tl.where(own[:, None], k, shared)
    return k


@triton.jit
def whole_rows(head, offs, mask, tile):
    """[BLOCK, HEAD_DIM]; 0 where a product takes BLOCK_D features at a time."""
    if tile.BLOCK_D == tile.HEAD_DIM:
        return load_rows(head, offs, mask, 0, tile.head_dim, tile.HEAD_DIM)
    else:
        return 0


@triton.jit
def whole_keys(keys, offs_k, mask_k, tile, HAS_PREFIX: tl.constexpr):
    """As `whole_rows`."""
    if tile.BLOCK_D == tile.HEAD_DIM:
        return load_keys(keys, offs_k, mask_k, 0, tile.head_dim, tile.HEAD_DIM, HAS_PREFIX)
    else:
        return 0


@triton.jit
def product(
    q, q_head, offs_q, mask_q, k, keys, offs_k, mask_k, tile, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """q kᵀ from `whole_rows` and `whole_keys`, or BLOCK_D features at a time.

    float32 rows of more features do not fit the registers.
    """
    if tile.BLOCK_D == tile.HEAD_DIM:
        x = tl.dot(q, tl.trans(k), input_precision=tile.PRECISION)
    else:
        x = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for first_d in range(0, tile.HEAD_DIM, tile.BLOCK_D):
            # [BLOCK_Q, BLOCK_D], [BLOCK_K, BLOCK_D]
            q_part = load_rows(q_head, offs_q, mask_q, first_d, tile.head_dim, tile.BLOCK_D)
            k_part = load_keys(
                keys, offs_k, mask_k, first_d, tile.head_dim, tile.BLOCK_D, HAS_PREFIX
            )
            x = tl.dot(q_part, tl.trans(k_part), x, input_precision=tile.PRECISION)
    return x


@triton.jit
def real_keys(flags, b, offs_k, mask_k):
    """mask_k, without padding."""
    if flags.padding_ptr is not None:
        padding_ptr = flags.padding_ptr + b * flags.padding_stride_b
        mask_k = mask_k & (tl.load(padding_ptr + offs_k, mask=mask_k, other=0) != 0)
    return mask_k


@triton.jit
def keys_in_scope(flags, b, offs_k, mask_k):
    """mask_k, without keys outside the scope."""
    if flags.scope_ptr is not None:
        scope_ptr = flags.scope_ptr + b * flags.scope_stride_b
        mask_k = mask_k & (tl.load(scope_ptr + offs_k, mask=mask_k, other=0) != 0)
    return mask_k


@triton.jit
def outcomes_of(flags, b, offs_k, mask_k):
    """[BLOCK_K]: the span of each key, -1 for none; the key itself where there are no spans."""
    if flags.span_ids_ptr is not None:
        span_ids_ptr = flags.span_ids_ptr + b * flags.span_ids_stride_b
        return tl.load(span_ids_ptr + offs_k, mask=mask_k, other=-1)
    else:
        return offs_k


@triton.jit
def load_head_weights(weights, b, head, offs_q, mask_q):
    """[BLOCK_Q]: the weight of a head for each row, 0 for a row that does not exist."""
    ptr = weights.ptr + b * weights.stride_b + head * weights.stride_h
    return tl.load(ptr + offs_q.to(tl.int64) * weights.stride_t, mask=mask_q, other=0.0)


@triton.jit
def load_norm(norm, b, head, offs_q, mask_q):
    """[BLOCK_Q], each: m, and the head's weight over the normaliser."""
    norm_ptr = norm.ptr + b * norm.stride_b + head * norm.stride_h + offs_q
    m = tl.load(norm_ptr, mask=mask_q, other=0.0)
    return m, tl.load(norm_ptr + norm.stride_i, mask=mask_q, other=0.0)


@triton.jit
def key_blocks(sample, row_block, start, stop, window_left, window_right, tile):
    """`block_ranges` of the keys in [start, stop) that a block of rows sees.

    A block whose keys all rows see needs no mask; with EXCLUDE_SELF, if they are before all rows.
    """
    first = sample.query_start + row_block * tile.BLOCK_Q
    last = first + tile.BLOCK_Q - 1
    full_high = first + window_right + 1
    if tile.EXCLUDE_SELF:
        full_high = tl.minimum(full_high, first)
    return block_ranges(
        tl.maximum(first - window_left, start), tl.minimum(last + window_right + 1, stop),
        tl.maximum(last - window_left, start), tl.minimum(full_high, stop), tile.BLOCK_K,
    )  # fmt: skip


@triton.jit
def existing_keys(offs_k, seqlen_k, IS_EDGE: tl.constexpr):
    """Which keys exist: all of them in a block that is not at an edge."""
    if IS_EDGE:
        return offs_k < seqlen_k
    else:
        return tl.full(offs_k.shape, True, tl.int1)


@triton.jit
def flags_of_block(flags, b, first_key, BLOCK_K: tl.constexpr):
    """(whether keys of a block need masks for their flags, whether they are in the scope if not).

    Those of most blocks are alike, which two counts tell.
    """
    masked = first_key < 0
    in_scope = first_key >= 0
    if flags.padding_ptr is not None:
        ptr = flags.padding_before_ptr + b * flags.padding_before_stride_b + first_key
        masked = tl.load(ptr + BLOCK_K) - tl.load(ptr) < BLOCK_K
    if flags.scope_ptr is not None:
        ptr = flags.scope_before_ptr + b * flags.scope_before_stride_b + first_key
        number = tl.load(ptr + BLOCK_K) - tl.load(ptr)
        masked = masked | ((number > 0) & (number < BLOCK_K))
        in_scope = number > 0
    return masked, in_scope


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
def head_scores(x, score):
    """log2(e) y from q kᵀ: (1)."""
    return tanh(x * score.factor) * score.softcap_log2 if score.SOFTCAP else x * score.factor


@triton.jit
def span_bias(bias, b, head, offs_q, offs_s, mask):
    """log2(e) b, from rows and spans whose shapes broadcast; 0 for keys in no span."""
    bias_ptr = bias.ptr + b * bias.stride_b + head * bias.stride_h
    pointers = bias_ptr + offs_q.to(tl.int64) * bias.stride_t + offs_s.to(tl.int64) * bias.stride_s
    return in_base_2(tl.load(pointers, mask=mask & (offs_s >= 0), other=0.0))


@triton.jit
def weights(s, m, inverse):
    """w P_h on visible keys, from scores in base 2 and the row's normaliser: (4).

    The caller leaves other keys out, whose values mean nothing, and takes weights below its
    SMALLEST_HEAD_WEIGHT for 0.
    """
    return tl.exp2(s - m) * inverse


@triton.jit
def sum_of_weights(
    q, k, prefix, bias, norm, sample, num_kv_heads, group, offs_q, mask_q, offs_k, mask_k, span_k,
    score, tile,
):  # fmt: skip
    """Σ_h w P_h of one sample on visible keys, [BLOCK_Q, BLOCK_K], heads in order; see `weights`.

    Both policies of a comparison come from here: equal inputs give equal bits.
    """
    HAS_PREFIX: tl.constexpr = prefix.ptr is not None
    total = tl.zeros([tile.BLOCK_Q, tile.BLOCK_K], tl.float32)
    for kv_head in range(num_kv_heads):
        keys = keys_with_prefix(k, prefix, sample.keys, tl.cast(kv_head, tl.int64))
        # [BLOCK_K, HEAD_DIM]
        k_rows = whole_keys(keys, offs_k, mask_k, tile, HAS_PREFIX)
        for member in range(kv_head * group, (kv_head + 1) * group):
            head = tl.cast(member, tl.int64)
            q_head = head_of(q, sample.rows, head)
            m, inverse = load_norm(norm, sample.rows, head, offs_q, mask_q)
            # [BLOCK_Q, HEAD_DIM]
            q_rows = whole_rows(q_head, offs_q, mask_q, tile)
            x = product(
                q_rows, q_head, offs_q, mask_q, k_rows, keys, offs_k, mask_k, tile, tile.BLOCK_Q,
                tile.BLOCK_K, HAS_PREFIX,
            )  # fmt: skip
            s = head_scores(x, score)
            if bias is not None:
                s += span_bias(  # (2)
                    bias, sample.rows, head, offs_q[:, None], span_k[None, :], mask_q[:, None]
                )
            p = weights(s, m[:, None], inverse[:, None])
            total += tl.where(p < SMALLEST_HEAD_WEIGHT, 0.0, p)
    return total
