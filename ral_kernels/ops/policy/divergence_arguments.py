"""The arguments of the `policy_divergence` op, bundled once for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .arguments import PolicyArgs


@dataclass(frozen=True)
class ReferenceArgs:
    """The reference side: what an `AttentionSnapshot` holds.

    Heads, kv heads, head dim and dtype may differ from the policy's. The batch, rows and their key
    positions, number of keys, scope, key padding and `exclude_self` are the policy's. Key j < N0 of
    sample b is `k_prefix[prefix_index[b], :, j]`, key j >= N0 is `k[b, :, j - N0]`.
    """

    q: Tensor  # [B, Hr, T, Dr] contiguous
    k: Tensor  # [B, Hkr, N - N0, Dr] contiguous; N0 = 0 without k_prefix
    k_prefix: Tensor | None  # [P, Hkr, N0, Dr] contiguous, the keys that samples share
    prefix_index: Tensor | None  # int64 [B] contiguous, into k_prefix; None without k_prefix
    scale: float
    window_left: int
    window_right: int
    softcap: float

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def prefix_length(self) -> int:
        return 0 if self.k_prefix is None else self.k_prefix.shape[2]


@dataclass(frozen=True)
class PolicyDivergenceArgs:
    """Validated inputs of one streamed `attention_divergence`, as every backend receives them."""

    policy: PolicyArgs  # without spans: span_ids and span_bias are None
    reference: ReferenceArgs
    kind: str  # divergence.arguments.KINDS
