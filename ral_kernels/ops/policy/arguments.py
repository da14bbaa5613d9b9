"""What backends of `policy` and `policy_divergence` receive: arguments, outputs, gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..schema import part


@dataclass(slots=True)
class PolicyArgs:
    """Validated inputs and options of one `attention_policy` call, as every backend receives them.

    Row `t` of the T chosen rows stands at the key position `d = query_start + t`: that key is its
    "self", if there is one (d may lie outside [0, N)). It sees the keys `j` with

        d - window_left <= j <= d + window_right    and    key_padding_mask[b, j],

    a bound of -1 meaning "no bound"; causal is `window_right = 0`. Its *valid* keys, over which the
    policy is renormalised, are those it sees that are in the scope and, with `exclude_self`, are
    not its self.

    A *packed* call has B = 1 and S sequences, told apart by `cu_seqlens_q` and `cu_seqlens_k`. The
    rows of sequence i, `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]`, see its keys alone. Its row t
    stands at `query_starts[i] + t` among these. Rows and keys after the last offset belong to no
    sequence: their results and gradients are 0. `query_start` is then 0 and unused.
    """

    q: Tensor  # [B, H, T, D] the chosen rows alone, float32 | bfloat16 | float16 (reference
    #            backend: also float64), a strided view with unit last stride
    k: Tensor  # [B, Hk, N, D], unit last stride
    span_ids: Tensor | None  # int32 [N] or [B, N], -1 = no span; None: the policy is over keys
    span_bias: Tensor | None  # float32 (float64 with float64 q) [B, H, T, S], with span_ids only;
    #                           strides of 0 broadcast
    head_weights: Tensor | None  # contiguous, in the dtype of span_bias: [B, H], or [S, H], a row a
    #                              sequence. >= 0, with mean 1 over a row's heads; None: each is 1
    scope: Tensor | None  # bool [B or 1, N], True = in the scope; None: every key is
    key_padding_mask: Tensor | None  # bool [B, N], True = a real key; None where packed
    cu_seqlens_q: Tensor | None  # int32 [S + 1], offsets of the rows of each sequence in q, from 0,
    #                              never decreasing; None: the call is not packed
    cu_seqlens_k: Tensor | None  # int32 [S + 1], offsets of its keys in k
    query_starts: Tensor | None  # int32 [S], the position of its row 0 among its keys
    num_spans: int  # 0 without span_ids
    query_start: int  # key position of row 0; negative where rows stand before the first key
    scale: float
    window_left: int
    window_right: int
    softcap: float  # 0 = off
    exclude_self: bool
    max_rows: int  # rows and keys of the longest sequences of a packed call; 0 where not packed
    max_keys: int

    @property
    def batch_size(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def num_rows(self) -> int:
        return self.q.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_sequences(self) -> int:
        """S of a packed call, else the batch size."""
        return self.batch_size if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def num_outcomes(self) -> int:
        """Length of a row of the policy: spans, or keys (of the longest sequence) without spans."""
        if self.span_ids is not None:
            return self.num_spans
        return self.max_keys if self.is_packed else self.seqlen_k

    @property
    def sees_nothing(self) -> bool:
        """Whether no row has a key: results are 0, and backends are not asked."""
        if self.is_packed:
            return self.max_rows == 0 or self.max_keys == 0
        return self.batch_size == 0 or self.num_rows == 0 or self.seqlen_k == 0

    def sequence_of_rows(self) -> Tensor:
        """[1, T] int64, the sequence of each packed row; S for rows after the last offset."""
        assert self.cu_seqlens_q is not None
        rows = torch.arange(self.num_rows, device=self.q.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens_q[1:], rows, right=True)[None]


@dataclass(slots=True)
class PolicyOutputs:
    """What the forward of `policy` writes; float32 (float64 with float64 q), contiguous."""

    p: Tensor  # [B, T, N], or [B, T, S] with spans; packed without spans [1, T, max_keys]
    # [2, B, H, T], over all visible keys: m, in powers of two, and w / Σ 2^(s log₂e − m), w the
    # head's weight (1 without head_weights). Both are 0 for a row that sees no key.
    norm: Tensor
    z: Tensor  # [B, T], the mean over heads of the weight on valid keys


@dataclass(slots=True)
class PolicyGradients:
    """What arrives at the backward of `policy`, and what it writes."""

    dp: Tensor  # as p
    dq: Tensor  # as q
    dk: Tensor  # as k
    dspan_bias: Tensor | None  # as span_bias, contiguous; None where it is not wanted
    dhead_weights: (
        Tensor | None
    )  # as head_weights, by the normalised weights; None where not wanted


@dataclass(slots=True)
class ReferenceArgs:
    """The reference policy: what an `AttentionSnapshot` holds. q and k are None with a target.

    Heads, kv heads, head dim and dtype may differ from the policy's. The batch or packed sequences,
    rows and their key positions, number of keys, scope, key padding and `exclude_self` are the
    policy's. A packed one has no k_prefix. Key j < N0 of
    sample b is `k_prefix[prefix_index[b], :, j]`, key j >= N0 is `k[b, :, j - N0]`.
    """

    q: Tensor | None  # [B, Hr, T, Dr] contiguous
    k: Tensor | None  # [B, Hkr, N - N0, Dr] contiguous; N0 = 0 without k_prefix
    k_prefix: Tensor | None  # [P, Hkr, N0, Dr] contiguous, the keys that samples share
    prefix_index: Tensor | None  # int64 [B] contiguous, into k_prefix; None without k_prefix
    head_weights: Tensor | None  # as in PolicyArgs, for the Hr heads
    scale: float
    window_left: int
    window_right: int
    softcap: float

    @property
    def num_heads(self) -> int:
        return 0 if self.q is None else self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return 0 if self.q is None else self.q.shape[3]

    @property
    def prefix_length(self) -> int:
        return 0 if self.k_prefix is None else self.k_prefix.shape[2]


@dataclass(slots=True)
class TargetArgs:
    """Distributions that rows share, in place of a reference policy: an `AttentionTarget`.

    Row t of sample b is compared with target `g = index[b, t]`. Its weights are restricted to the
    row's valid keys and divided by their sum there, equation (11) of divergence.md. Packed, the
    keys are those of all sequences one after another, and a row reads its own sequence's alone.
    """

    values: Tensor | None = None  # [B, G, N] contiguous, or [B, G, K] with ids; in the dtype of the
    #                               statistics, >= 0, G and K >= 1. None: there is no target
    ids: Tensor | None = None  # int32 [B, G, K] contiguous, in [-1, N): ascending and distinct in a
    #                            target, then -1 = none, where the weight is 0
    index: Tensor | None = None  # int32 [B, T] contiguous, in [-1, G); -1 = a row without a target

    @property
    def num_targets(self) -> int:
        """G."""
        return 0 if self.values is None else self.values.shape[1]

    @property
    def length(self) -> int:
        """N, or K with ids."""
        return 0 if self.values is None else self.values.shape[2]


@dataclass(slots=True)
class PolicyDivergenceArgs:
    """Validated inputs of one streamed `attention_divergence`, as every backend receives them."""

    # The op has no spans, so backends find these fields empty.
    policy: PolicyArgs = field(
        metadata=part(absent={"span_ids": None, "span_bias": None, "num_spans": 0})
    )
    reference: ReferenceArgs = field(metadata=part(prefix="reference_"))
    kind: str  # one of KINDS of ops/divergence/arguments.py
    target: TargetArgs = field(default_factory=TargetArgs, metadata=part(prefix="target_"))

    @property
    def has_target(self) -> bool:
        return self.target.values is not None


@dataclass(slots=True)
class PolicyDivergenceOutputs:
    """What the forward of `policy_divergence` writes; float32 (float64 with float64 q)."""

    value: Tensor  # [B, T], the divergence of each row
    norm: Tensor  # as in PolicyOutputs
    z: Tensor
    reference_norm: Tensor  # [2, B, Hr, T]; Hr is 0 with a target
    reference_z: Tensor  # [B, T]; with a target, its weight on the row's valid keys
    u: Tensor  # [B, H, T], equation (3) of divergence.md, times the head's weight
    w: Tensor  # [B, H, T], likewise


@dataclass(slots=True)
class PolicyDivergenceGradients:
    """What arrives at the backward of `policy_divergence`, and what it writes."""

    dvalue: Tensor  # [B, T]
    dq: Tensor  # as the policy's q
    dk: Tensor  # as the policy's k
    dhead_weights: Tensor | None  # as in PolicyGradients


@dataclass(slots=True)
class LossOutputs:
    """What the loss of `policy_divergence` writes."""

    value: Tensor  # [B, T], the divergence of each row
    reference_norm: Tensor  # [2, B, Hr, T], an input if `normalised`
    reference_z: Tensor  # [B, T], likewise
    dq: Tensor  # gradients of Σ weight * divergence over rows
    dk: Tensor
    dhead_weights: Tensor | None  # as in PolicyGradients
