"""What every backend of `attention` receives: arguments, outputs, gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class AttentionArgs:
    """Validated inputs and options of one `attention` call, as every backend receives them.

    Packed (varlen) calls have `cu_seqlens_q` and `cu_seqlens_k`; their tensors have batch size 1
    and the packed sequences along the token dimension. Row `t` of a sequence with `T` queries and
    `N` keys sits at the key position `t + offset`. `offset` is `N - T` (bottom-right) or 0
    (`top_left`). The row sees the keys `j` with

        t + offset - window_left <= j <= t + offset + window_right,

    a bound of -1 meaning "no bound". Causal attention is `window_right = 0`.
    """

    # float32 | bfloat16 | float16 (reference backend: also float64), unit last stride
    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hk, N, D]
    v: Tensor  # [B, Hk, N, Dv]
    span_ids: Tensor | None  # int32 [N] or [B, N] (packed: [total_k]), -1 = no span
    # float32 (float64 with float64 q) [B, H, T, S], natural units; strides of 0 broadcast
    span_bias: Tensor | None
    # bool (True = attend) or floating (added to the scores) [B, H, T, N]; strides of 0 allowed
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None  # bool [B, N], True = a real key, False = padding
    cu_seqlens_q: Tensor | None  # int32 [num_sequences + 1]
    cu_seqlens_k: Tensor | None  # int32 [num_sequences + 1]
    num_spans: int
    scale: float
    window_left: int
    window_right: int
    top_left: bool
    softcap: float  # 0 = off; else scores = softcap * tanh(scores / softcap), before bias and masks
    row_start: int  # queries [row_start, row_stop) get marginals
    row_stop: int

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
    def seqlen_q(self) -> int:
        return self.q.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[3]

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start


@dataclass(slots=True)
class AttentionOutputs:
    """What the forward writes."""

    out: Tensor  # [B, H, T, Dv], q's dtype, unit last stride
    marginals: Tensor  # float32 (float64 with float64 q) [B, H, R, S] contiguous
    lse: Tensor  # the same dtype, [B, H, T] contiguous


@dataclass(slots=True)
class AttentionGradients:
    """What arrives at the backward (None counts as zero), and what it writes."""

    dout: Tensor | None  # as out
    dmarginals: Tensor | None  # as marginals; None without spans
    dlse: Tensor | None  # as lse
    dq: Tensor  # as q
    dk: Tensor  # as k
    dv: Tensor  # as v
    dspan_bias: Tensor | None  # as span_bias, contiguous; None where it is not wanted
