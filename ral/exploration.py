"""Noise on attention during a rollout, and its replay: "Exploration" in ral/README.md.

Attention is a deterministic function of the prefix. Without noise of its own, a reward has nothing
to choose between. Each rollout draws one bias per span and layer for its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import ral_kernels as rk


def check_can_explore(trainer: Any) -> None:
    """Check that the trainer writes each rollout itself, in one turn: it draws the noise there.

    Raises:
        ValueError: it has a rollout_func or tools, including those of an environment.
    """
    for name in ("rollout_func", "tools"):
        if getattr(trainer, name):
            raise ValueError(
                f"RALTrainer: attn_explore_sigma > 0 is not supported with {name}: its rollouts "
                "would lack the noise that the update replays"
            )


def draw_bias(
    sigma: float, num_layers: int, spans: rk.Spans, visual: Tensor, generator: Any = None
) -> Tensor:
    """One Gaussian bias per rollout, layer and visual span; float32 [B, num_layers, S].

    It is centred over the spans that a sample has, because a constant would only weigh pictures
    against text. Spans of text, and those that a sample does not have, get 0.

    Args:
        sigma: standard deviation, in natural units of the scores.
        num_layers: number of steered layers.
        spans: ids [B, N].
        visual: bool [B, N], the keys that show a picture.
        generator: of the noise; default torch's own.
    """
    ids = spans.ids.long()
    batch_size = ids.shape[0]
    present = torch.zeros(batch_size, spans.num_spans + 1, device=ids.device)
    present.scatter_(1, torch.where(visual, ids, spans.num_spans), 1.0)
    present = present[:, None, : spans.num_spans]
    noise = torch.randn(
        batch_size, num_layers, spans.num_spans, device=ids.device, generator=generator
    )
    mean = (noise * present).sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1.0)
    return sigma * (noise - mean) * present


@contextmanager
def steered(
    model: nn.Module, layers: list[int], bias: Tensor, spans: rk.Spans
) -> Iterator[list[rk.Spans]]:
    """Run `model` under a bias for each layer, also if a batch runs in several forwards.

    Args:
        model: any module that `rk.steer` takes.
        layers: the steered layers.
        bias: [B, num_layers, S].
        spans: ids [B, N] over the keys of the whole batch.

    Yields:
        The spans of each forward so far, as its steer has them.
    """
    done = 0
    seen: list[rk.Spans] = []
    running = ExitStack()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal done
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        chunk = slice(done, done + ids.shape[0])
        done = chunk.stop
        of_chunk = rk.Spans(spans.ids[chunk], spans.num_spans)
        seen.append(of_chunk)
        for number, layer in enumerate(layers):
            running.enter_context(
                rk.steer(model, bias[chunk, number], spans=of_chunk, layers=layer)
            )

    def end(*_: Any) -> None:
        running.close()

    # The bias must be set before hooks that read the call, and until they have run.
    first = model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    last = model.register_forward_hook(end, always_call=True)
    try:
        yield seen
    finally:
        first.remove()
        last.remove()
        running.close()
