"""What each of two gloo processes does in the tests of `capture` under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ral_kernels as rk
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations.models import build

SETUPS = ["ddp", "fsdp1", "fsdp2", "fsdp2 checkpointed"]


def main(rank: int, folder: str) -> None:
    """Entry point of a process; rank 0 writes out.pt."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        given = torch.load(f"{folder}/in.pt")
        snapshot = rk.AttentionSnapshot.load(Path(folder) / "snapshot.safetensors")
        batch = {name: x.chunk(2)[rank] for name, x in given["batch"].items()}
        job = (batch, snapshot[rank : rank + 1], given["advantages"].chunk(2)[rank], given["rows"])
        out: dict[str, Any] = {how: _gradients(how, *job) for how in SETUPS}
        try:
            _backward(_wrap("fsdp2"), *job, with_logits=False)
            out["fsdp2 without logits"] = "no error"
        except RuntimeError as error:
            out["fsdp2 without logits"] = str(error)
        if rank == 0:
            torch.save(out, f"{folder}/out.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _wrap(how: str) -> Any:
    model = build("qwen2_5_vl", "sdpa").train()
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    layers = model.model.language_model.layers
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({type(layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    from torch.distributed.fsdp import fully_shard

    if how.endswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def _backward(
    model: Any,
    batch: dict[str, Tensor],
    snapshot: rk.AttentionSnapshot,
    advantages: Tensor,
    rows: tuple[int, int],
    with_logits: bool = True,
) -> None:
    with capture(model, rows=rows) as captured:
        logits = model(**batch, use_cache=False).logits
    loss = 10 * captured.ral_loss(snapshot, advantages)
    if with_logits:
        loss = loss + logits.logsumexp(-1).mean()
    loss.backward()


def _gradients(how: str, *job: Any) -> dict[str, Tensor]:
    model = _wrap(how)
    _backward(model, *job)
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return _named(model)
    return _named(model)


def _named(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found
