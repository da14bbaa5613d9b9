"""Where a rollout looked: shares of attention, the reward and the credit made of them. No TRL here.

The forms are ours. They follow the abstracts of SAYO (arXiv 2602.08241, a reward on attention),
AT-RL (2602.11455) and KAWHI (2603.27375, credit by attention on the image).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ral_kernels as rk

from .losses import Captured, PolicyView

_ROWS_AT_ONCE = 64  # rows of a dense policy, [B, 64, N] float32
_TINY = 1e-30  # below any share of attention that counts


class Evidence(NamedTuple):
    """The keys that show what a rollout's answer rests on.

    Attributes:
        ids: int64 [B, K], keys; -1 = none. A row without evidence has none.
        weights: float32 [B, K], how much of each key's area is evidence, in [0, 1].
    """

    ids: Tensor
    weights: Tensor

    @property
    def given(self) -> Tensor:
        """bool [B], which rollouts have evidence."""
        return ((self.ids >= 0) & (self.weights > 0)).any(-1)

    def total(self) -> Tensor:
        """[B], the sum of the weights."""
        return torch.where(self.ids >= 0, self.weights, 0.0).sum(-1)

    def of(self, p: Tensor) -> Tensor:
        """Σ_i weight_i p_i of [B, C, N] rows: [B, C]."""
        rows = p.gather(-1, self.ids.clamp(min=0)[:, None].expand(-1, p.shape[1], -1))
        return (rows * torch.where(self.ids >= 0, self.weights, 0.0)[:, None]).sum(-1)


class Looks(NamedTuple):
    """Where each response token's query looked, the mean over layers; float32 [B, C] each.

    Attributes:
        visual: share of attention on visual tokens, sinks left out.
        evidence: Σ_i w_i p̂_i, with p̂ the attention renormalised over visual tokens and w the
            evidence.
        entropy: of p̂, as a share of its largest value log n over n visual tokens; in [0, 1].
    """

    visual: Tensor
    evidence: Tensor
    entropy: Tensor


def without_sinks(mask: Tensor, visual: Tensor, count: int) -> Tensor:
    """The keys that count as looked at: bool [B, N].

    The first tokens of a sequence draw attention whatever they are (attention sinks,
    arXiv 2309.17453). They would hide how a row divides the rest.

    Args:
        mask: [B, N], 0 where there is padding.
        visual: bool [B, N]; a visual token is never left out.
        count: how many of the first tokens of each sequence are left out, if they are text.
    """
    valid = mask.bool()
    return valid & (visual | (valid.long().cumsum(-1) > count))


@torch.no_grad()
def look(
    captured: Captured,
    layers: Sequence[int],
    view: PolicyView,
    visual: Tensor,
    kept: Tensor,
    evidence: Evidence | None,
) -> Looks:
    """Where the rows of a forward look. It holds 64 rows of attention at a time.

    Args:
        captured: a forward.
        layers: the numbers of the layers that are averaged.
        view: gives the C rows; its spans and scope are not used.
        visual: bool [B, N], the keys that show an image.
        kept: bool [B, N], the keys that attention is renormalised over.
        evidence: of the B rollouts; without, their share on evidence is 0.
    """
    start, stop = view.rows
    most = visual.sum(-1)[:, None].float().log()
    total = torch.zeros(3, visual.shape[0], stop - start, device=visual.device)
    for first in range(start, stop, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, stop)
        for layer in layers:
            p = captured.policy(
                layer=layer, rows=(first, last), scope=kept, exclude_self=view.exclude_self,
                backend=view.backend, steered=False,
            )  # fmt: skip
            seen = p * visual[:, None]
            share = seen.sum(-1)
            seen = seen / share.clamp(min=_TINY)[..., None]
            on = torch.zeros_like(share) if evidence is None else evidence.of(seen)
            # Of one visual token the entropy is 0, but for rounding.
            entropy = torch.where(most > 0, torch.special.entr(seen).sum(-1) / most, 0.0)
            total[..., first - start : last - start] += torch.stack([share, on, entropy])
    return Looks(*(total / len(layers)))


@contextmanager
def looking(
    model: nn.Module,
    layers: Sequence[int],
    view: PolicyView,
    visual: Tensor,
    kept: Tensor,
    evidence: Evidence | None,
) -> Iterator[list[Looks]]:
    """Measure `look` in each forward of `model` inside the block, for its rollouts in their order.

    Args: as in `look`, of the whole rollout batch.

    Yields:
        What the forwards gave so far. It costs one attention policy of the response's rows.
    """
    found: list[Looks] = []
    done = 0
    with rk.capture(model, list(layers), detach=True) as capture:
        captured: Any = capture

        def measure(*_: Any) -> None:
            nonlocal done
            chunk = slice(done, done + captured.q(layers[0]).shape[0])
            done = chunk.stop
            of_chunk = None if evidence is None else Evidence(*(x[chunk] for x in evidence))
            found.append(look(captured, layers, view, visual[chunk], kept[chunk], of_chunk))
            captured.clear()

        hook = model.register_forward_hook(measure)
        try:
            yield found
        finally:
            hook.remove()


def joined(found: Sequence[Looks]) -> Looks:
    """One `Looks` of the rollouts of several."""
    return Looks(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def attention_reward(looks: Looks, evidence: Evidence, visual: Tensor, mask: Tensor) -> Tensor:
    """How much more a response looks at the evidence than uniform attention would: float32 [B].

        R = Σ_t c_t (s_t − u) / Σ_t c_t,    c_t = 1 − H_t / log n,    u = Σ_i w_i / n

    s_t is the share of row t's attention on the evidence, of that on the n visual tokens
    (`Looks.evidence`), w the evidence's weights, and H_t the entropy of row t over visual tokens.
    u is what uniform attention would have. A row that looks everywhere says little of where the
    answer comes from, so it counts little: the reward is aware of entropy. R lies in (−1, 1), and
    is 0 where all rows are uniform. The form is ours, after the abstract of SAYO
    (arXiv 2602.08241).

    Args:
        looks, evidence: of B rollouts.
        visual: bool [B, N].
        mask: [B, C], 1 for a response token that counts.

    Returns:
        R; NaN for a rollout without evidence or without visual tokens, which TRL leaves out.
    """
    tokens = visual.sum(-1)
    uniform = evidence.total() / tokens.clamp(min=1)
    certain = (1 - looks.entropy).clamp(min=0) * mask
    total = certain.sum(-1)
    # Rounding leaves a uniform row some 1e-7 of certainty, which is none.
    mean = (certain * (looks.evidence - uniform[:, None])).sum(-1) / total.clamp(min=1e-6)
    return mean.masked_fill(~evidence.given | (tokens == 0), math.nan)


def credit_weights(share: Tensor, mask: Tensor, top_share: float = 1.0) -> Tensor:
    """Weights of a response's tokens in its advantage, by where they look: float32 [B, C].

        w_t = n x_t / Σ_t x_t

    x is the share of attention, n the number of tokens that count. The weights of a response sum to
    n, as GRPO's do, so the mean |advantage| of its tokens does not change. A response without any
    such attention keeps weights of 1. The form is ours, after the abstracts of AT-RL
    (arXiv 2602.11455) and KAWHI (2603.27375).

    Args:
        share: [B, C], >= 0, x.
        mask: [B, C], 1 for a response token that counts.
        top_share: which share of a response's tokens get weight, those with the most attention,
            rounded up; equal ones in their order.
    """
    counted = mask.float()
    chosen = share * counted
    count = counted.sum(-1, keepdim=True)
    if top_share < 1:
        order = torch.where(mask.bool(), share, -1.0).argsort(stable=True, dim=-1, descending=True)
        rank = order.argsort(-1)
        # 0.3 · 10 is 3.0000000000000004
        chosen = chosen * (rank < (top_share * count.double() - 1e-9).ceil())
    total = chosen.sum(-1, keepdim=True)
    return torch.where(total > 0, chosen * (count / total.clamp(min=_TINY)), counted)
