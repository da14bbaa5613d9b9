"""What each of two gloo processes does in the test of `capture` where ranks share a sequence.

    python -m tests.integrations.sharded_model FILE

The model's attention gathers keys and values, as ring attention computes. A rank runs the model on
its own tokens alone. Its parameters' gradients, summed over ranks, are to be the whole sequence's.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import ral_kernels as rk
from ral_kernels.sharded.exchange import Exchange, cut
from ral_kernels.sharded.layout import Range, resolve_layout
from tests.integrations.eager_maps import perturbed
from tests.integrations.models import build

NAME, LENGTH, ROWS = "ring_test", 24, (13, 23)
LAYOUTS = ("contiguous", "head_tail")
ADVANTAGES = torch.linspace(-1, 1, ROWS[1] - ROWS[0])[None]


def _register(chunks: tuple[tuple[Range, ...], ...]) -> None:
    whole = Exchange(chunks, [[(0, LENGTH)]] * len(chunks), dist.get_rank(), None)

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any
    ) -> Any:
        assert mask is None
        seen = torch.arange(LENGTH) <= given["position_ids"][0][:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, whole(k), whole(v), seen, scale=given["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def _gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


def run(layout: Any, moves: Any) -> dict[str, Any]:
    ids = torch.randint(2, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    old, model = perturbed(build("qwen2")), build("qwen2")
    with torch.no_grad(), rk.capture(old, rows=ROWS) as before:
        old(input_ids=ids, use_cache=False)
    with rk.capture(model, rows=ROWS) as captured:
        logits = model(input_ids=ids, use_cache=False).logits
    ral = captured.ral_loss(before.snapshot(), ADVANTAGES)
    wanted = _gradients(logits.logsumexp(-1).mean() + 10 * ral, model)

    chunks = resolve_layout("test", layout, dist.get_world_size(), LENGTH)
    _register(chunks)
    old, model = perturbed(build("qwen2", NAME)), build("qwen2", NAME)
    own = chunks[dist.get_rank()]
    given = {
        "input_ids": cut(ids, own, 1),
        "position_ids": cut(torch.arange(LENGTH)[None], own, 1),
        "use_cache": False,
    }
    options = {"rows": ROWS, "layout": layout, "moves": moves}
    with torch.no_grad(), rk.capture(old) as before:
        old(**given)
    reference = before.sharded(**options).snapshot()
    with rk.capture(model) as captured:
        logits = model(**given).logits
    loss = captured.sharded(**options).ral_loss(reference, ADVANTAGES)
    found = _gradients(logits.logsumexp(-1).sum() / LENGTH + 10 * loss, model)
    for gradient in found.values():
        dist.all_reduce(gradient)
    return {"loss": loss.item(), "wanted": ral.item(), "found": found, "whole": wanted}


def _rank(rank: int, folder: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        results = {(layout, x): run(layout, x) for layout in LAYOUTS for x in ("keys", "rows")}
        if rank == 1:
            torch.save(results, file)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        start_processes(_rank, (temporary, sys.argv[1]), nprocs=2, start_method="fork")
