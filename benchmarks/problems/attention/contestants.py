"""The contestants: attention with span marginals, and what a PyTorch user would do instead.

Every contestant is written as a careful user would write it, and none is made slower on purpose.
`prepare` gets the problem and returns `attend(q, k, v) -> (out, marginals or None)`, which is
timed. Masks and one-hot matrices that do not depend on q, k, v are made before the clock starts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import ral_kernels as rk
from ral_kernels.ops.attention.cuda import HEAD_DIMS
from ral_kernels.runtime import cuda_library
from ral_kernels.runtime.backends import BackendName

from ...harness.layouts import FRAME_TOKENS, LABELS, spans_of
from ...harness.objective import Contestant
from .problem import AttentionProblem, in_layout

Attend = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor | None]"]
CHUNK_ROWS = 256


def ral(problem: AttentionProblem, *, backend: BackendName | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        result = rk.attention(q, k, v, problem.spans, is_causal=True, backend=backend)
        return result.out, result.marginals

    return attend


def ral_plain(problem: AttentionProblem, *, backend: BackendName | None = None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return rk.attention(q, k, v, is_causal=True, backend=backend).out, None

    return attend


def no_cuda_kernels(
    problem: Any, backward: bool, head_dims: Sequence[int] = cuda_library.HEAD_DIMS
) -> str | None:
    """Why the CUDA C++ kernels, which have these head dims, cannot take part."""
    if not problem.q.is_cuda:
        return "CUDA C++ kernels"
    reason = rk.available_backends()["cuda"]
    if reason != "yes":
        return reason
    return cuda_library.cannot_run(problem.q, problem.k, head_dims=head_dims)


def _causal_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, repeat: bool = False
) -> Tensor:
    """Causal SDPA of grouped heads, by a fused kernel where one exists.

    CUDA's efficient kernel, the only one in float32, does not support grouped heads. With
    `enable_gqa` SDPA would use the full matrix there. `repeat` asks for repeated kv heads.
    """
    if repeat or (q.is_cuda and q.dtype == torch.float32):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def sdpa(problem: AttentionProblem) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return _causal_sdpa(q, k, v), None

    return attend


def sdpa_backend(problem: AttentionProblem, *, backend: SDPBackend) -> Attend:
    """One CUDA backend of SDPA, forced."""
    repeat = backend is SDPBackend.EFFICIENT_ATTENTION

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(backend):
            return _causal_sdpa(q, k, v, repeat=repeat), None

    return attend


def needs_cuda(problem: AttentionProblem, backward: bool) -> str | None:
    return None if problem.q.is_cuda else "an SDPA backend of CUDA"


def eager(problem: AttentionProblem) -> Attend:
    """What transformers does for `output_attentions=True` (eager), plus one matmul."""
    group = problem.heads.num_heads // problem.heads.num_kv_heads
    scale = problem.heads.head_dim**-0.5
    shape, one_hot = (problem.seqlen, problem.seqlen), problem.one_hot
    lowest = torch.finfo(problem.q.dtype).min
    mask = torch.full(shape, lowest, dtype=problem.q.dtype, device=problem.q.device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(2, 3) * scale + mask
        probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return probabilities @ v, probabilities @ one_hot

    return attend


def eager_bytes(problem: AttentionProblem, backward: bool) -> int:
    # Alive at the peak, in H x N x N matrices: scores and the sum with the mask in the dtype, the
    # float32 softmax and its input; the backward adds the gradients of both. Measured on CPU in
    # bfloat16: 10 and 16 bytes an element.
    size = problem.q.element_size()
    matrix = problem.heads.num_heads * problem.seqlen**2
    return matrix * (3 * size + 12 if backward else 2 * size + 8)


def sdpa_one_hot(problem: AttentionProblem) -> Attend:
    """Marginals as attention output against one-hot values: SDPA with V + one-hot(span).

    Up to S = D the one-hot columns are appended to V. q and k are padded with zeros, because SDPA's
    fused kernels need one head dim. For S > D, further calls with blocks of D one-hot columns as
    values are cheaper and stay in the kernels' range.
    """
    dim, seqlen = problem.heads.head_dim, problem.seqlen
    num_spans, scale = problem.num_spans, problem.heads.head_dim**-0.5
    sdpa_call = functools.partial(_causal_sdpa, scale=scale)
    shape = (1, problem.heads.num_kv_heads, seqlen)
    if num_spans <= dim:
        extra = -(-num_spans // 32) * 32
        columns = F.pad(problem.one_hot, (0, extra - num_spans)).expand(*shape, extra)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            both = sdpa_call(
                F.pad(q, (0, extra)), F.pad(k, (0, extra)), torch.cat([v, columns], -1)
            )
            return both[..., :dim], both[..., dim : dim + num_spans]

        return attend

    padded = F.pad(problem.one_hot, (0, -num_spans % dim))
    blocks = [block.expand(*shape, dim) for block in padded.split(dim, dim=1)]

    def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        marginals = torch.cat([sdpa_call(q, k, block) for block in blocks], -1)
        return sdpa_call(q, k, v), marginals[..., :num_spans]

    return attend_in_blocks


@functools.cache
def _compiled_flex() -> Any:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    # A sweep compiles it for every size; beyond dynamo's default limit of 8 it would quietly run
    # FlexAttention's eager stand-in, which holds the full matrix.
    config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex_one_hot(problem: AttentionProblem) -> Attend:
    """FlexAttention with V + one-hot(span). It supports Dv != D, so nothing is padded."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    dim, seqlen = problem.heads.head_dim, problem.seqlen
    mask = create_block_mask(causal, None, None, seqlen, seqlen, device=str(problem.q.device))
    columns = problem.one_hot.expand(1, problem.heads.num_kv_heads, seqlen, problem.num_spans)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        values = torch.cat([v, columns], -1)
        both = _compiled_flex()(q, k, values, block_mask=mask, enable_gqa=True)
        return both[..., :dim], both[..., dim:]

    return attend


def flex_refuses(problem: AttentionProblem, backward: bool) -> str | None:
    if backward and not problem.q.is_cuda:
        return "FlexAttention has no backward on CPU"
    return None


def _flash_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SDPA's own flash kernel with the log-sum-exp, which the public function does not return."""
    aten = torch.ops.aten
    if not q.is_cuda:
        result = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask
        )
        return result[0], result[1]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask is None and q.dtype != torch.float32:
        result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
        return result[0], result[1]
    if mask is not None:
        mask = mask.expand(1, q.shape[1], -1, -1)
    result = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)
    return result[0], result[1][..., : q.shape[2]]  # its LSE comes padded to full warps


def per_span(problem: AttentionProblem) -> Attend:
    """One call for each span, over its keys alone: marginals = exp(LSE of the span - LSE).

    A contiguous span needs no mask: the queries after it see all of it, and those inside it see a
    causal square. Keys of a scattered span (a tile) are gathered and masked.
    """
    span_keys = [
        (problem.span_ids == span).nonzero().squeeze(1) for span in range(problem.num_spans)
    ]
    bounds = [(int(keys[0]), int(keys[-1]) + 1, keys) for keys in span_keys]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = _flash_with_lse(q, k, v, is_causal=True)
        marginals = torch.zeros(*lse.shape, problem.num_spans, device=lse.device)
        for span, (start, stop, keys) in enumerate(bounds):
            if stop - start == keys.numel():
                k_span, v_span = k[:, :, start:stop], v[:, :, start:stop]
                pieces = [(start, stop, True), (stop, q.shape[2], False)]
                mask = None
            else:
                k_span, v_span = k.index_select(2, keys), v.index_select(2, keys)
                pieces = [(start, q.shape[2], False)]
                rows = torch.arange(start, q.shape[2], device=keys.device)
                hidden = rows[:, None] < keys
                mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
                mask = mask.masked_fill_(hidden, -torch.inf)[None, None]
            for first, last, is_causal in pieces:
                if first == last:
                    continue
                rows_q = q[:, :, first:last]
                _, span_lse = _flash_with_lse(
                    rows_q, k_span, v_span, is_causal=is_causal, mask=mask
                )
                marginals[:, :, first:last, span] = (span_lse - lse[:, :, first:last]).exp()
        return out, marginals

    return attend


def per_span_refuses(problem: AttentionProblem, backward: bool) -> str | None:
    return "SDPA's LSE carries no gradient" if backward else None


def chunked(problem: AttentionProblem) -> Attend:
    """Rows in chunks against the keys they can see, each recomputed in the backward.

    Grouped heads share one matmul with their kv head, and out and marginals come from one product
    with V + one-hot.
    """
    group = problem.heads.num_heads // problem.heads.num_kv_heads
    dim, scale = problem.heads.head_dim, problem.heads.head_dim**-0.5
    columns = problem.one_hot.expand(
        1, problem.heads.num_kv_heads, problem.seqlen, problem.num_spans
    )

    def chunk(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        grouped = q.unflatten(1, (-1, group)).flatten(2, 3)  # [1, Hk, G * rows, D]
        scores = (grouped * scale @ k.transpose(2, 3)).unflatten(2, (group, rows))
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(F.pad(hidden, (keys - rows, 0)), -torch.inf)
        probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (probabilities.flatten(2, 3) @ values).unflatten(2, (group, rows)).flatten(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        values = torch.cat([v, columns], -1)
        parts = []
        for start in range(0, q.shape[2], CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, q.shape[2])
            inputs = (q[:, :, start:stop], k[:, :, :stop], values[:, :, :stop])
            parts.append(
                checkpoint(chunk, *inputs, use_reentrant=False)
                if torch.is_grad_enabled()
                else chunk(*inputs)
            )
        both = torch.cat(parts, 2)
        return both[..., :dim], both[..., dim:]

    return attend


def in_every_layout(ours: Contestant) -> tuple[Contestant, ...]:
    """One of ours with the spans of each layout in place of the problem's."""

    def refuse(layout: str, problem: AttentionProblem, backward: bool) -> str | None:
        if spans_of(layout, problem.seqlen).num_spans == 0:
            return f"no frame fits into {problem.seqlen} keys"
        return ours.refuse(problem, backward)

    def bytes_needed(layout: str, problem: AttentionProblem, backward: bool) -> int:
        # marginals, their gradient, and its copy for the gate
        num_spans = spans_of(layout, problem.seqlen).num_spans
        return 3 * 4 * problem.heads.num_heads * problem.seqlen * num_spans

    return tuple(
        dataclasses.replace(
            ours,
            name=f"{ours.name}_{layout}",
            label=LABELS[layout],
            answer=layout,
            on=(),
            view=functools.partial(in_layout, layout=layout),
            refuse=functools.partial(refuse, layout),
            bytes_needed=functools.partial(bytes_needed, layout),
        )
        for layout in FRAME_TOKENS
    )


def wrong(problem: AttentionProblem) -> Attend:
    """Deliberately wrong, to show that the gate works: every marginal is one span too far."""
    right = eager(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, marginals = right(q, k, v)
        assert marginals is not None
        return out, marginals.roll(1, -1)

    return attend


# ours with marginals -> the same without
LAYOUT_PAIRS = {"ral": "ral_plain", "ral_cuda": "ral_plain_cuda"}
SAME_SPANS = (  # those of the problem
    Contestant("sdpa", "SDPA, no marginals", sdpa, answer="out_only"),
    Contestant("ral", "ral_kernels, marginals", ral, ours=True),
    Contestant("ral_plain", "ral_kernels, no marginals", ral_plain, "out_only", ours=True),
    *(
        Contestant(
            f"{prepare.__name__}_cuda",
            f"the same in CUDA C++, {what}",
            functools.partial(prepare, backend="cuda"),
            answer=answer,
            on=("cuda",),
            refuse=functools.partial(no_cuda_kernels, head_dims=HEAD_DIMS),
            ours=True,
        )
        for prepare, what, answer in (
            (ral, "marginals", "all"),
            (ral_plain, "no marginals", "out_only"),
        )
    ),
    Contestant("sdpa_one_hot", "SDPA, V + one-hot", sdpa_one_hot),
    Contestant(
        "flex_one_hot",
        "FlexAttention, V + one-hot",
        flex_one_hot,
        compiles=True,
        refuse=flex_refuses,
    ),
    Contestant("per_span", "SDPA per span, exp(LSE)", per_span, refuse=per_span_refuses),
    Contestant("chunked", "chunked, checkpointed", chunked),
    Contestant("eager", "eager, full matrix", eager, bytes_needed=eager_bytes),
    *(
        Contestant(
            f"sdpa_{name}",
            f"SDPA {label}, no marginals",
            functools.partial(sdpa_backend, backend=backend),
            answer="out_only",
            on=("cuda",),
            refuse=needs_cuda,
        )
        for name, label, backend in (
            ("cudnn", "cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("flash", "flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", "efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    ),
    Contestant("wrong", "deliberately wrong", wrong, on=(), bytes_needed=eager_bytes),
)
CONTESTANTS = SAME_SPANS + tuple(
    contestant
    for ours in SAME_SPANS
    if ours.name in LAYOUT_PAIRS
    for contestant in in_every_layout(ours)
)
