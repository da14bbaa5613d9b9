"""What each of two gloo processes, or one, does in test_two_processes.

    python -m tests.trainer.two_processes MODEL FOLDER NAME...

A NAME is "<case>:<how>,<how>", of `CASES` and `WAYS`: one process or two, on the same rollouts.
Each writes FOLDER/<case>/<how>.pt: what was logged, the weights, and how the model was wrapped.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import TrainerCallback

from ral import RALTrainer
from ral.interrupts import interruptible
from tests.integrations import mixtures
from tests.trainer import evidence_case, tiny
from tests.trainer.test_launch import resolved

ROLLOUTS = 16  # of a rollout batch, on all processes together
SETTINGS: dict[str, Any] = {
    "attn_coef": 20.0,
    "num_generations": 4,
    "steps_per_generation": 1,
    "num_iterations": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,  # 2 rollout batches x 2 iterations
    "logging_nan_inf_filter": False,
    # Adam would turn the rounding of gradients that are zero into whole steps.
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
}
CASES: dict[str, dict[str, Any]] = {
    "token mean": {},
    "accumulating": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "sequence mean": {
        "attn_reduction": "sequence_mean",
        "loss_type": "grpo",
        "attn_reference": "ref",
        "beta": 0.1,
    },
    "teacher": {"attn_coef": 0.0, "distill_attn_coef": 5.0, "distill_logit_coef": 1.0},
    "lora": {"peft_config": tiny.lora()},
    "pictures": {"attn_map_every": 2, "report_to": ["tensorboard"], "attn_map_rows": 1},
    "mixed": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 2,
        "eval_temperature": 0.0,
        # DDP then looks for no unused parameters, and the encoder is trained.
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "resampling": {"resample_equal_groups": 9},
    "objectives": {
        "evidence_coef": 0.5,
        "evidence_schedule": "linear",
        "attention_reward": 3.0,
        "credit": "looking",
        "credit_top_share": 0.7,
    },
    # Of a mixture, in prompts of text. Its balance loss is no sum over tokens: TRL averages it.
    "router": {"attn_coef": 0.0, "router_coef": 20.0, "router_aux_loss_coef": 0.0},
    "resuming": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "evaluating": {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.dataset(4)},
}


class FixedRollouts(RALTrainer):
    """Writes a response that the prompt, the index in the group and the step determine.

    Greedy answers of evaluations are the model's own.
    """

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training and self.args.eval_temperature == 0:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        first = self.accelerator.process_index * len(prompt_ids)
        return [
            self._response(ids, (first + row) % self.num_generations)
            for row, ids in enumerate(prompt_ids)
        ], None

    def _response(self, prompt: list[int], index: int) -> list[int]:
        generator = torch.Generator().manual_seed(31 * sum(prompt) + self.state.global_step)
        shared = torch.randint(10, 250, (8,), generator=generator)
        generator.manual_seed(index)
        own = torch.randint(10, 250, (8,), generator=generator)
        # The first two tokens are the group's; lengths are 2 to 8, by prompt and index.
        length = 2 + (sum(prompt) + 3 * index) % 7
        return torch.cat([shared[:2], own])[:length].tolist()


def dataset(case: str) -> Dataset:
    """Prompts of many lengths: the processes pad differently. Some are without images if mixed."""
    rows = list(evidence_case.dataset() if case == "objectives" else tiny.dataset(8))
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] = "the cat " * number + row["prompt"][0]["content"]
        if case == "router" or (case == "mixed" and number not in (4, 6)):
            row["images"] = None
    return Dataset.from_list(rows)


def reward(completions: Any, problem_id: Any, **columns: Any) -> list[float]:
    """As in `tiny`, but for every second prompt, whose rollouts get the same."""
    values = tiny.reward(completions)
    return [1.0 if int(n) % 2 else x for n, x in zip(problem_id, values, strict=True)]


def _train(model: str, case: str, how: str, folder: Path) -> dict[str, Any]:
    processes = 1 if how == "one" else 2
    wrapper, _, what = how.partition(" ")
    settings = {**WAYS[how], "output_dir": str(folder / wrapper)}
    merged = {**SETTINGS, **CASES[case], **settings}
    merged["per_device_train_batch_size"] = ROLLOUTS // processes // merged["steps_per_generation"]
    merged["per_device_eval_batch_size"] = ROLLOUTS // processes
    teacher = None
    if case == "teacher":
        teacher = tiny.checkpoint(folder.parent, num_hidden_layers=3)
    rows = dataset(case)
    if case == "router":
        model, rows = str(mixtures.checkpoint(folder / "mixture")), rows.remove_columns("images")
        if merged.get("fsdp"):
            layers = {"transformer_layer_cls_to_wrap": ["Qwen3MoeDecoderLayer"]}
            merged["fsdp_config"] = {**merged["fsdp_config"], **layers}
    if case == "mixed":
        merged["eval_dataset"] = rows.select(range(5))
    trainer = tiny.trainer(
        model, folder, trainer_class=FixedRollouts, train_dataset=rows,
        reward_funcs=reward if case == "resampling" else tiny.reward,
        teacher_model=None if teacher is None else str(teacher), **merged,
    )  # fmt: skip
    start = {name: _whole(parameter) for name, parameter in trainer.model.named_parameters()}
    if what == "stopped":
        trainer.add_callback(_Send())
        with interruptible(trainer):
            trainer.train()
    checkpoint = folder / wrapper / "checkpoint-2"
    trainer.train(resume_from_checkpoint=checkpoint if what == "resumed" else None)
    if how.startswith("zero"):
        trainer.save_model(str(folder / f"{how} saved"))
    return _result(trainer, start)


def _result(trainer: RALTrainer, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    weights = {}
    for name, parameter in trainer.model.named_parameters():
        weights[name.removeprefix("module.")] = _whole(parameter)
    wrapped = {type(module).__name__ for module in trainer.model_wrapped.modules()}
    return {
        "log": trainer.state.log_history,
        "start": start,
        "weights": weights,
        "wrapped": sorted(wrapped),
        "type": str(trainer.accelerator.distributed_type),
        "processes": trainer.accelerator.num_processes,
    }


def _whole(parameter: Any) -> torch.Tensor:
    """A copy of a parameter, which FSDP2 or ZeRO-3 may have sharded."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    copy: torch.Tensor = whole.detach().clone()
    return copy


def _join(rank: int, folder: Path, how: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    store = f"file://{folder}/{how}.store"
    limit = timedelta(seconds=120)  # for a process that waits for one that is gone
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    if how.startswith("fsdp2"):
        _let_fsdp_have_cpus()
    if how.startswith("zero"):
        _enter_deepspeed(int(how[4]))


def _let_fsdp_have_cpus() -> None:
    """accelerate makes FSDP out of several GPUs only: on CPUs it takes DDP, and does not say so."""
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def _enter_deepspeed(stage: int) -> None:
    """What `accelerate launch` does with ral/launch/deepspeed_zero<stage>.yaml, in float32."""
    os.environ.update(resolved(f"deepspeed_zero{stage}")[1])
    os.environ.update(ACCELERATE_MIXED_PRECISION="no", DS_ACCELERATOR="cpu")
    del os.environ["ACCELERATE_USE_CPU"]  # accelerate would leave DeepSpeed out
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # It would first compile its own collectives in shared memory, for minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


DDP: dict[str, Any] = {"ddp_backend": "gloo"}
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"],
        "reshard_after_forward": True,
    },
}
SHARDED = {
    **FSDP2,
    "fsdp_config": {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"},
}
SAVING = {"save_strategy": "steps", "save_steps": 100}
# How a case runs; "stopped" leaves the checkpoint of step 2 that "resumed" goes on from.
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": DDP,
    "ddp stopped": {**DDP, **SAVING},
    "ddp resumed": {**DDP, **SAVING},
    "fsdp2": FSDP2,
    "fsdp2 stopped": {**FSDP2, **SAVING},
    "fsdp2 resumed": {**FSDP2, **SAVING},
    "fsdp2-sharded stopped": {**SHARDED, **SAVING},
    "fsdp2-sharded resumed": {**SHARDED, **SAVING},
    **{
        f"zero{stage}{what}": SAVING if what else {}
        for stage in (2, 3)
        for what in ("", " stopped", " resumed")
    },
}


class _Send(TrainerCallback):
    """SIGTERM in the first step, for one process alone."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _child(model: str, case: str, how: str, rank: int, folder: Path) -> None:
    log = os.open(folder / f"{how}.{rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    status = 1
    try:
        if how != "one":
            _join(rank, folder, how)
        result = _train(model, case, how, folder)
        if rank == 0:
            torch.save(result, folder / f"{how}.pt")
        if how != "one":
            dist.barrier()
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def main(model: str, folder: str, *names: str) -> None:
    gc.freeze()
    for name in names:
        case, _, ways = name.partition(":")
        own = Path(folder) / case
        own.mkdir()
        for how in (ways).split(","):
            children = []
            for rank in range(1 if how == "one" else 2):
                child = os.fork()
                if child == 0:
                    _child(model, case, how, rank, own)
                children.append(child)
            for rank, child in enumerate(children):
                _, status = os.waitpid(child, 0)
                code = str(os.waitstatus_to_exitcode(status))
                (own / f"{how}.{rank}.status").write_text(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
