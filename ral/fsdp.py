"""The LM head under FSDP2, whose weight TRL uses outside of the head's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from .distillation import backbone_of


@contextmanager
def gathered_head(model: nn.Module) -> Iterator[None]:
    """Gather the LM head's weight for forwards of `model`, so that its gradient is reduced.

    TRL multiplies by the weight itself, without the head's forward. accelerate makes an untied head
    of a vision-language model its own unit, and TRL gathers it with `full_tensor()`. The backward
    of that takes each process's gradient for the gradient of all. So each shard of the head would
    learn only from the rollouts of its own process (TRL 1.16, accelerate 1.15). FSDP reduces a unit
    that it gathers itself with the others, at the end of the backward.

    Args:
        model: any; if its head is not a unit of FSDP2, nothing changes.
    """
    from torch.distributed.fsdp import FSDPModule

    head: Any = None
    if isinstance(model, FSDPModule):
        head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, FSDPModule):
        yield
        return

    def gather(*_: Any) -> None:  # inside the forward of the root, which sets FSDP up
        head.unshard()

    handle = backbone_of(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
        if not torch.is_grad_enabled():
            head.reshard()  # no backward will
