"""Swap SDPA or flash-attn in your own model, and get where it attends, with a gradient.

    python examples/swap_sdpa_or_flash_attn.py

Both calls keep their signature and their result. With `spans=` they also return the share of each
span of keys: here text, two frames, and a question. On a CPU and on a GPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import ral_kernels as rk

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


class Attention(nn.Module):
    """A layer as many models have it; `spans` is what is new."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, width)
        self.marginals: Tensor | None = None

    def forward(self, x: Tensor, spans: rk.Spans | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # [B, heads, T, D]
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        # Before: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        attended = rk.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, spans=spans
        )
        if spans is not None:
            attended, self.marginals = attended  # marginals: float32 [B, heads, T, spans]
        return self.out(attended.transpose(1, 2).flatten(2))


torch.manual_seed(0)
spans = rk.Spans.from_lengths([16, 64, 64, 16])  # text, frame 1, frame 2, question
layer, x = Attention(), torch.randn(2, spans.seqlen_k, 256)
output = layer(x, spans)
assert layer.marginals is not None
print("last token, share of each span:", layer.marginals[0, :, -1].mean(0).tolist())

# The marginals train: this loss asks the last token to look at frame 2.
loss = -layer.marginals[:, :, -1, 2].log().mean()
loss.backward()
print("gradient of the projection:", layer.qkv.weight.grad.norm().item())

# It is SDPA's result, and flash-attn's function does the same in its own layout [B, T, heads, D].
q, k, v = (torch.randn(2, heads, 160, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
theirs = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
ours = rk.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
# Before: flash_attn.flash_attn_func(q, k, v, causal=True)
flash, marginals = rk.flash_attn_func(
    *(each.transpose(1, 2) for each in (q, k, v)), causal=True, spans=spans
)
print("largest difference from SDPA:", (ours - theirs).abs().max().item())
print("of flash_attn_func:", (flash.transpose(1, 2) - theirs).abs().max().item())
