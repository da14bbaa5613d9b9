"""What the Triton kernels of `policy` take, as tuples. Fields in capitals are constants.

`num_rows`, `query_start` and the window vary between chunks of rows. Kernels are not specialised by
them, so they are parameters of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Samples(NamedTuple):
    """How many samples there are, and where they lie if they are sequences packed in a tensor.

    In a padded call all but the batch size is None. Tensors of a packed one have the stride of a
    row or key in the place of that of a sample: kernels multiply it by a sequence's first row or
    key where they multiply a sample's stride by its number.
    """

    batch_size: Any
    total_k: Any  # keys of all sequences
    row_offsets_ptr: Any  # int32 [B + 1], the sequence's first row
    key_offsets_ptr: Any  # int32 [B + 1], its first key
    query_starts_ptr: Any  # int32 [B], the position of its first row among its keys


class Prefix(NamedTuple):
    """k_prefix [P, Hk, N0, D], and which of them each sample has; None without one."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    index_ptr: Any
    length: Any


class Flags(NamedTuple):
    """Per sample: span ids int32 [N], the key padding mask and the scope, uint8 [N].

    `before` counts the keys before a key that are no padding, or in the scope: int32 [N + 1].
    """

    span_ids_ptr: Any
    span_ids_stride_b: Any
    padding_ptr: Any
    padding_stride_b: Any
    scope_ptr: Any
    scope_stride_b: Any
    padding_before_ptr: Any
    padding_before_stride_b: Any
    scope_before_ptr: Any
    scope_before_stride_b: Any


class Norm(NamedTuple):
    """norm [2, B, H, T]: m and w / Σ 2^(s − m)."""

    ptr: Any
    stride_i: Any
    stride_b: Any
    stride_h: Any


class Outcomes(NamedTuple):
    """A tensor [B, T, outcomes] with unit last stride: p or dp."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    ALIGNED: Any  # whether rows begin at multiples of 16 bytes


class Target(NamedTuple):
    """Distributions over keys that rows share, and which of them each row has; None without any."""

    weights_ptr: Any  # float32 [B, G, N], or [B, G, K]: of the keys that ids name
    stride_b: Any
    stride_g: Any
    ids_ptr: Any  # int32 [B, G, K], ascending and then -1; None: every key has a weight
    num_ids: Any  # K
    num_steps: Any  # of a search among them
    first_key: Any  # what ids call the first key of this launch
    index: Any  # `PerRow`, int32: -1 for a row without a target
    z: Any  # `PerRow`, the weight on a row's valid keys
    value_parts_ptr: Any  # [blocks of keys, B, T], the divergence of each; to be written
    KIND: Any  # the divergence's place in KINDS


class PerRow(NamedTuple):
    """A tensor [B, T] with unit last stride."""

    ptr: Any
    stride_b: Any


class HeadWeights(NamedTuple):
    """The weight of each head for a row, [B, H, T]; rows of a sample share it."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class RowTerms(NamedTuple):
    """What policy_bwd_rows_kernel writes for the gradient of the scores."""

    factor_ptr: Any  # [B, T]
    c_ptr: Any  # [B, T]
    delta_ptr: Any  # [B, H, T]


class Parts(NamedTuple):
    """U_h and W_h of each piece of the keys, [pieces, B, H, T]."""

    u_ptr: Any
    w_ptr: Any
    stride_part: Any
    stride_b: Any
    stride_h: Any


class ValueParts(NamedTuple):
    """A divergence's sums over pieces of the keys, [pieces, B, T]."""

    ptr: Any
    stride_part: Any
    stride_b: Any


class Totals(NamedTuple):
    """U and W, [B, H, T], to be written."""

    u_ptr: Any
    w_ptr: Any
    stride_b: Any
    stride_h: Any


class Heads(NamedTuple):
    """Sizes of a head's keys and of the groups of heads that share them."""

    num_heads: Any
    num_kv_heads: Any
    seqlen_k: Any  # of the longest packed sequence


class Score(NamedTuple):
    """How a score in base 2 follows from q kᵀ: (1)."""

    scale: Any
    factor: Any
    softcap_log2: Any
    SOFTCAP: Any  # whether there is a soft cap


class TileSizes(NamedTuple):
    """Constants of a launch."""

    head_dim: Any
    HEAD_DIM: Any  # the power of two above it
    BLOCK_D: Any  # features at a time
    BLOCK_Q: Any
    BLOCK_K: Any
    EXCLUDE_SELF: Any  # whether the key at a row's own position is not valid
    PRECISION: Any  # of products of float32, as tl.dot names it
