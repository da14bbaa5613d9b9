"""The arguments of the `policy` op, bundled once for every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyArgs:
    """Validated inputs and options of one `attention_policy` call, as every backend receives them.

    Row `t` of the T chosen rows stands at the key position `d = query_start + t`: that key is its
    "self", if there is one (d may lie outside [0, N)). It sees the keys `j` with

        d - window_left <= j <= d + window_right    and    key_padding_mask[b, j],

    a bound of -1 meaning "no bound"; causal is `window_right = 0`. Its *valid* keys, over which the
    policy is renormalised, are those it sees that are in the scope and, with `exclude_self`, are
    not its self.
    """

    q: Tensor  # [B, H, T, D] the chosen rows alone, float32 | bfloat16 | float16 (reference: also
    #            float64), a strided view with unit last stride
    k: Tensor  # [B, Hk, N, D], unit last stride
    span_ids: Tensor | None  # int32 [N] or [B, N], -1 = no span; None: the policy is over keys
    span_bias: Tensor | None  # float32 (float64 with float64 q) [B, H, T, S], with span_ids only;
    #                           strides of 0 broadcast
    scope: Tensor | None  # bool [B or 1, N], True = in the scope; None: every key is
    key_padding_mask: Tensor | None  # bool [B, N], True = a real key
    num_spans: int  # 0 without span_ids
    query_start: int  # key position of row 0; negative where rows stand before the first key
    scale: float
    window_left: int
    window_right: int
    softcap: float  # 0 = off
    exclude_self: bool

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
    def num_outcomes(self) -> int:
        """Length of a row of the policy: spans, or keys without spans."""
        return self.seqlen_k if self.span_ids is None else self.num_spans
