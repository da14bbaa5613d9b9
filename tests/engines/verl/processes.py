"""What each of one or two gloo processes does in test_update.

    python -m tests.engines.verl.processes FOLDER WORLD_SIZE RANK CASE...

They run with `rollouts.ENVIRONMENT`. FOLDER holds a model for each family. Each case takes old
log-probabilities of the same rollouts and then updates on them. Rank 0 writes
FOLDER/<case>-<world size>.pt: the metrics and the gradient's norm of each update, and the weights
before it.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import (
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from ral.engines.verl import NAME, RALActorConfig
from tests.engines.verl import on_cpu, rollouts
from tests.engines.verl.rollouts import CASES, WORKER, Case

UPDATES = 3


def configured(case: Case, folder: Path) -> tuple[Any, Any, Any]:
    """The configurations of the actor, its model and its optimizer."""
    actor = RALActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_epochs=2,
        ppo_mini_batch_size=2,
        ppo_micro_batch_size_per_gpu=case.micro,
        fsdp_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision={"param_dtype": case.dtype, "reduce_dtype": "fp32"},
            ulysses_sequence_parallel_size=case.ulysses,
        ),
        ral={"coef": rollouts.COEFFICIENT, **dict(case.ral)},
    )
    model = HFModelConfig(
        path=str(folder / case.family),
        load_tokenizer=False,
        override_config={"attn_implementation": case.attention},
        use_remove_padding=case.packed,
        enable_gradient_checkpointing=case.checkpointing,
        lora_rank=case.lora,
    )
    optimizer = FSDPOptimizerConfig(
        optimizer="SGD", optimizer_impl="torch.optim", lr=rollouts.LEARNING_RATE,
        weight_decay=0.0, clip_grad=1e9, total_training_steps=10,
    )  # fmt: skip
    return actor, model, optimizer


def engine_of(case: Case, folder: Path) -> Any:
    actor, model, optimizer = configured(case, folder)
    engine = EngineRegistry.new(
        "language_model", NAME, model, actor.engine, optimizer, CheckpointConfig()
    )
    engine.initialize()
    return engine


def batch_of(case: Case, mine: list[int]) -> Any:
    """The rollouts `mine`, as verl's trainer hands them to a worker."""
    rows = [rollouts.rows(case.family)[i] for i in mine]

    def nested(xs: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(xs, layout=torch.jagged)

    tensors: dict[str, Any] = {
        "input_ids": nested([row.ids for row in rows]),
        "position_ids": nested([row.position_ids for row in rows]),
        "prompts": nested([row.ids[: -row.response] for row in rows]),
        "responses": nested([row.ids[-row.response :] for row in rows]),
        "loss_mask": nested([row.mask for row in rows]),
        "response_mask": nested([row.mask for row in rows]),
        "advantages": nested([row.advantage * row.mask.float() for row in rows]),
    }
    if rows[0].pictures:
        tensors["multi_modal_inputs"] = [row.pictures for row in rows]
    else:
        tensors["uid"] = [f"prompt {i // 2}" for i in mine]
    settings = {
        "temperature": 1.0,
        "use_remove_padding": case.packed,
        "pad_mode": DatasetPadMode.NO_PADDING,
        "use_dynamic_bsz": case.tokens > 0,
        "max_token_len_per_gpu": case.tokens,
        "micro_batch_size_per_gpu": min(case.micro, len(mine)),
        "global_batch_size": len(rollouts.LENGTHS),
    }
    return tu.get_tensordict(tensors, settings)


def token_loss(model_output: Any, data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
    """-mean over response tokens of A_t log p_t: verl's vanilla policy loss in its first update."""
    log_p = no_padding_2_padding(model_output["log_probs"], data)
    weights = torch.nested.to_padded_tensor(data["advantages"], 0.0)
    return -(log_p * weights).sum() / data["batch_num_tokens"] * data["dp_size"], {}


def run(case: Case, folder: Path) -> dict[str, Any]:
    engine = engine_of(case, folder)
    size, rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    mine = [i for i in range(len(rollouts.LENGTHS)) if i % size == rank]
    other = mine[1:] + mine[:1] if case.shuffled else mine
    with engine.eval_mode():
        engine.infer_batch(batch_of(case, mine))
    if case.lora:
        with engine.train_mode():  # after it the adapter matters
            engine.train_batch(batch_of(case, mine), token_loss)
        with engine.eval_mode():
            engine.infer_batch(batch_of(case, mine))
            with engine.disable_adapter():  # the reference policy, which must not be taken for it
                engine.infer_batch(batch_of(case, mine))
    written: dict[str, Any] = {"updates": []}
    for _ in range(UPDATES):
        weights = {
            name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
            for name, x in engine.module.named_parameters()
        }
        with engine.train_mode():
            out = engine.train_batch(batch_of(case, other), token_loss)
        sums: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sums, {k: v for k, v in out["metrics"].items() if "attn/" in k})
        written["updates"].append(
            {
                "weights": weights,
                "grad_norm": float(out["metrics"].get("grad_norm", float("nan"))),
                "loss": sum(out["loss"]),
                "metrics": [{k: _total(v) for k, v in each.items()} for each in sums],
            }
        )
    engine.get_per_tensor_param()
    written["kept"] = len(engine._snapshots)
    return written


def run_worker(folder: Path) -> dict[str, Any]:
    """verl's worker on one batch: its own loss, dynamic micro-batches, 2 mini-batches, 2 epochs."""
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="", MASTER_PORT="")
    actor, model, optimizer = configured(Case(), folder)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=actor.engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    for name, value in {
        "use_dynamic_bsz": True, "max_token_len_per_gpu": 64, "infer_max_token_len_per_gpu": 64,
    }.items():  # fmt: skip
        setattr(worker.engine_config, name, value)
    worker.reset()
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    batch = batch_of(Case(), [0, 1, 2, 3])
    for name in ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu"):
        tu.pop(batch, name)
    tu.assign_non_tensor(batch, compute_loss=False, calculate_entropy=True)
    old = tu.get(worker.infer_batch(batch), "log_probs")
    batch["old_log_probs"] = response_from_nested(old, batch["response_mask"])
    tu.pop(batch, "global_batch_size")
    settings = {
        "global_batch_size": 2, "mini_batch_size": 2, "epochs": actor.ppo_epochs, "seed": 1,
        "dataloader_kwargs": {"shuffle": True},
    }  # fmt: skip
    tu.assign_non_tensor(batch, **settings, compute_loss=True)
    trained = worker.train_mini_batch(batch)
    worker.engine._snapshots.clear()
    try:
        worker.engine.train_batch(batch, worker.loss_fn)
        refused = "no error"
    except RuntimeError as error:
        refused = str(error)
    return {"metrics": tu.get(trained, "metrics"), "refused": refused}


def _total(metric: Any) -> float:
    """The sum over micro-batches, as verl's trainer forms it."""
    if isinstance(metric, list):
        return sum(_total(x) for x in metric)
    return float(metric.aggregate())


def main(folder: Path, world_size: int, rank: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    on_cpu.flash_attention()
    try:
        for name in cases:
            written = run_worker(folder) if name == WORKER else run(CASES[name], folder)
            if rank == 0:
                torch.save(written, folder / f"{name}-{world_size}.pt")
            dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
