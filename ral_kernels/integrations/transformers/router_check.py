"""Whether a mixture's router chooses its experts by a softmax: decided by what it computes.

`capture_router` calls it. A router of transformers returns (logits, weights, experts) for each
token, and many kinds of it return the same names: with sigmoids, biases of the choice, or groups of
experts. The names say nothing, so the numbers are compared.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_TOKENS = 64  # of a trial: enough that no other rule agrees by chance
_SHARP = 2.0  # standard deviation of its logits
# Routers that passed. A trainer opens captures at every step.
_passed: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Routing = tuple[Tensor, Tensor, Tensor]


def check_router(op: str, router: nn.Module, hidden_size: int) -> None:
    """Try the router on random tokens, with random weights on the CPU.

    Its own weights may be zero before training, sharded, or on no device. And a bias of the choice
    that is still zero would not show.

    Raises:
        NotImplementedError: it does not choose by a softmax. A router that cannot be tried passes,
            and `check_call` judges its first call.
    """
    if router in _passed:
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu()
        scale = _SHARP * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
        return scale * torch.randn(tuple(tensor.shape), generator=generator)

    was_training = router.training
    router.eval()  # noise of training, such as jitter, is no part of the distribution
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            own = [*router.named_parameters(), *router.named_buffers()]
            if not own:  # a wrapper has made them its own
                return
            tensors = {name: drawn(tensor) for name, tensor in own}
            tokens = torch.randn(_TOKENS, hidden_size, generator=generator)
            output = functional_call(router, tensors, (tokens,))
    except Exception:  # more arguments, or parameters of another form than its own
        return
    finally:
        router.train(was_training)
    _judge(op, router, routing_of(op, router, output))
    _passed.add(router)


def check_call(op: str, router: nn.Module, routing: Routing) -> None:
    """As `check_router`, from a call of the model's own, unless the router has passed."""
    if router in _passed:
        return
    _judge(op, router, routing)
    if routing[2].numel() >= _TOKENS:
        _passed.add(router)


def routing_of(op: str, router: nn.Module, output: Any) -> Routing:
    """A router's output as (logits [n, E], weights [n, k], experts [n, k]) of its n tokens.

    Raises:
        NotImplementedError: it returns something else.
    """
    if isinstance(output, tuple) and len(output) == 3 and all(map(torch.is_tensor, output)):
        logits, weights, experts = output
        if not experts.is_floating_point() and experts.shape == weights.shape and experts.dim() > 1:
            return logits.flatten(0, -2), weights.flatten(0, -2), experts.flatten(0, -2)
    raise NotImplementedError(
        f"{op}: a router must return the logits of all experts, and weights and numbers of those "
        f"that it chose; {type(router).__name__} returns {_described(output)}"
    )


def _described(output: Any) -> str:
    if torch.is_tensor(output):
        return f"a tensor {tuple(output.shape)}"
    parts = output if isinstance(output, (tuple, list)) else [output]
    shapes = (str(tuple(x.shape)) if torch.is_tensor(x) else type(x).__name__ for x in parts)
    return f"{len(parts)} values: {', '.join(shapes)}"


@torch.no_grad()
def _judge(op: str, router: nn.Module, routing: Routing) -> None:
    logits, weights, experts = routing
    if len(experts) == 0:
        return
    scores = logits.float()
    probabilities = scores.softmax(-1)
    reason = None
    if not _weighs_by(probabilities, weights, experts):
        reason = "does not weigh its experts by a softmax over its logits"
        if _weighs_by(scores.sigmoid(), weights, experts):
            reason = (
                "weighs its experts by sigmoids, each of its own logit, which are no distribution "
                "over experts"
            )
    else:
        last = probabilities.topk(experts.shape[-1]).values[..., -1:]
        if (probabilities.gather(-1, experts) < last * (1 - 1e-5)).any():
            reason = (
                "does not choose the most probable experts: a bias of the choice, or groups of "
                "experts, has a say in it"
            )
    if reason is not None:
        raise NotImplementedError(
            f"{op}: a router must choose its top-k experts by a softmax over its logits; "
            f"{type(router).__name__} {reason}"
        )


def _weighs_by(scores: Tensor, weights: Tensor, experts: Tensor) -> bool:
    """Whether weights are the scores of the chosen experts, times a factor, or renormalised."""
    tolerance = 2e-2 if weights.dtype in (torch.bfloat16, torch.float16) else 1e-4
    weights, chosen = weights.float(), scores.gather(-1, experts)

    def alike(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * 1e-2)

    factor = weights.sum() / chosen.sum()
    if alike(weights, factor * chosen):
        return True
    if experts.shape[-1] == 1:  # renormalised over one expert: always the same
        return alike(weights, weights.mean().expand_as(weights))
    sums = weights.sum(-1, keepdim=True)
    return alike(weights, sums * chosen / chosen.sum(-1, keepdim=True))
