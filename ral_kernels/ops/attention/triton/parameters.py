"""What the Triton kernels of `attention` take, as tuples. Fields in capitals are constants."""

from __future__ import annotations

from typing import Any, NamedTuple

from ....runtime.triton_rows import SpanValues


class SpanTable(NamedTuple):
    """The tensors of `SpanBlocks`, and what lies between two samples; None without spans."""

    entries_ptr: Any
    positions_ptr: Any
    counts_ptr: Any
    ids_ptr: Any
    local_ptr: Any
    whole_before_ptr: Any
    short_before_ptr: Any
    gathered_before_ptr: Any
    stride_b: Any  # in blocks
    key_stride_b: Any  # in keys


NO_SPAN_TABLE = SpanTable(None, None, None, None, None, None, None, None, 0, 0)


class AttnMask(NamedTuple):
    """attn_mask [B, H, T, N]; booleans are read as bytes."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    stride_n: Any
    IS_BOOL: Any


class Padding(NamedTuple):
    """key_padding_mask [B, N], as bytes."""

    ptr: Any
    stride_b: Any
    stride_n: Any


class Window(NamedTuple):
    """The keys that a query sees, from its own position on the diagonal."""

    left: Any
    right: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    TOP_LEFT: Any  # the diagonal starts at the first key, and otherwise ends at the last one


class Masks(NamedTuple):
    """What is added to scores or hides keys. What is not there is None."""

    span_bias: SpanValues | None
    attn_mask: AttnMask | None
    padding: Padding | None
    window: Window


class Packed(NamedTuple):
    """Bounds of packed sequences, int32 [num_sequences + 1]; None and 0 for a dense call."""

    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any
    num_sequences: Any


class Sizes(NamedTuple):
    """Without the batch size, which most kernels do not read and would be specialised by."""

    num_heads: Any
    num_kv_heads: Any
    seqlen_q: Any
    seqlen_k: Any


class KeySplits(NamedTuple):
    """Over how many programs the queries of a block of keys are split: heads times ranges.

    With more than one, dk and dv are float32 and partial, one after another.
    """

    heads: Any
    ranges: Any  # None: there is one
    dk_stride: Any  # between two parts; None: there is one
    dv_stride: Any


class SpanRows(NamedTuple):
    """The shape [stop - start, num_spans] of the marginals of a head."""

    num_spans: Any
    start: Any
    stop: Any


class RowTerms(NamedTuple):
    """What the backward reads of each query, float32 [B, H, 2 T + S R].

    A head has lse in base 2, δ, and for every span δ less the gradient of its marginal. These rows
    reach beyond those of the marginals, so that a block of queries reads one kind.
    """

    ptr: Any
    stride_h: Any
    first: Any  # of the R rows; None without gradients of marginals
    num_rows: Any  # R


class Score(NamedTuple):
    """How a score follows from q kᵀ."""

    tau: Any  # the scale
    scale: Any  # τ log2 e, or τ / c with a soft cap c
    cap: Any  # c log2 e
    HAS_CAP: Any


class Programs(NamedTuple):
    """Over what those of the forward are spread."""

    q_blocks: Any
    batch_size: Any
    splits: Any  # over the keys; with more than one, results are float32 and partial
    split_stride: Any  # between two parts of out


class TileSizes(NamedTuple):
    """Constants of a launch."""

    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any  # the powers of two above the head dims
    BLOCK_DV: Any
    PART_D: Any  # features in one matrix product
    PART_DV: Any
    BLOCK_Q: Any
    BLOCK_K: Any
    TABLE_K: Any  # keys in a block of the table of spans: BLOCK_K or, of dk and dv, its half
    MIXED_Q: Any  # queries of a block where those of keys are mixed, for dk and dv
    MIXED_STAGES: Any  # of the loop that may form products in a branch; None: as of the others
    GROUP: Any  # heads of a kv head whose rows share a tile (decoding), else 1
    TERMS: Any  # bfloat16 numbers that a sum over spans is split into
    BY_TENSOR: Any  # whether tensor descriptors read q, and K and V of blocks without masks
    PRECISION: Any  # of products of float32, as tl.dot names it
