"""The LM head under FSDP2, whose weight is used by others than its own forward."""

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

    TRL multiplies by the weight itself, without the head's forward. Where accelerate makes the head
    a unit of its own (vision-language models with a head that is not tied), TRL gathers it with
    `full_tensor()`, whose backward takes each process's gradient for everyone's: each shard of the
    head would learn from its own process's rollouts alone (TRL 1.16, accelerate 1.15). A unit that
    FSDP gathers itself is reduced with the others, at the end of the backward.

    Args:
        model: any; nothing is done to one whose head is not a unit of FSDP2.
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
