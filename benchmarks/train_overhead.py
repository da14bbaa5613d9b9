"""What RAL adds to the GRPO step that it extends, by frames: time and peak memory.

    python -m benchmarks.train_overhead                     # 4 to 32 frames
    python -m benchmarks.train_overhead --frames 16 --worked-out
    python -m benchmarks.train_overhead --objectives        # also evidence, reward and credit

A camera pans over a picture. Each frame is an image of a prompt for a small random Qwen2.5-VL. The
same trainer runs in turn with attn_coef=0, which is TRL's GRPO, and with attn_coef=1: rollouts of a
fixed length, the old policy's forward, and two updates. Peak memory is that of a fresh process,
above the model's. `attn_metrics_every=0`; the divergence is logged.

`--objectives` runs the same trainer with each objective of docs/objectives.md too, without RAL, and
with all of them. Their ratios are over the same GRPO step, of the same turn.

`--worked-out` also measures the op, a layer's attention and matrix products at the sizes of
Qwen2.5-VL-7B with 32k visual tokens. From these it computes the ratio for this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ral_kernels as rk
from benchmarks.harness import cpu_bench, machine, results
from benchmarks.harness.cpu_bench import CPU
from benchmarks.harness.measure import quantiles

FRAMES = (4, 8, 16, 32)
GRID = (6, 10)  # visual tokens of a frame
KINDS: dict[str, dict[str, Any]] = {"grpo": {"attn_coef": 0.0}, "ral": {"attn_coef": 1.0}}
_WITHOUT_RAL: dict[str, dict[str, Any]] = {
    "evidence": {"evidence_coef": 0.1, "evidence_on": "all"},
    "attention_reward": {"attention_reward": 0.2},
    "credit": {"credit": "looking"},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"attn_coef": 0.0, **settings} for name, settings in _WITHOUT_RAL.items()},
    "all, and RAL": {
        "attn_coef": 1.0,
        **{name: value for of in _WITHOUT_RAL.values() for name, value in of.items()},
    },
}  # fmt: skip
ROLLOUTS = 4
PARTS = ("rollout", "old_policy", "update")

# Qwen2.5-VL-7B: the language model's numbers, and the paper's length of a response
LAYERS, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 28, 3584, 18944, 28, 4, 128, 152064
VISUAL_TOKENS, RESPONSE = 32768, 768


class Cycle:
    """A trainer that runs one rollout batch and its updates at each call."""

    def __init__(self, kind: str, frames: int, options: argparse.Namespace, folder: Path) -> None:
        from ral import RALConfig, RALTrainer
        from ral.digits.model import make_model, make_processor

        config = RALConfig(
            output_dir=str(folder / f"{kind}-{frames}"),
            attn_metrics_every=0,
            **{**KINDS, **OBJECTIVES}[kind],
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            num_iterations=2,
            max_completion_length=options.response,
            generation_kwargs={"min_new_tokens": options.response},
            learning_rate=1e-5,
            max_steps=1 << 20,
            gradient_checkpointing=options.checkpointing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        model = make_model(num_layers=options.layers, hidden_size=options.width)
        model.config.text_config.max_position_embeddings = 1 << 16
        self.trainer: Any = RALTrainer(
            model,
            _reward,
            config,
            train_dataset=_dataset(frames),
            processing_class=make_processor(),
        )
        self.trainer.create_optimizer_and_scheduler(1 << 20)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self.batches = self._again_and_again()

    def _again_and_again(self) -> Iterator[Any]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def __call__(self) -> dict[str, float]:
        """Seconds of the parts of one rollout batch with its two updates."""
        trainer = self.trainer
        trainer._metrics["train"].clear()
        started = time.perf_counter()
        for _ in range(2):
            trainer.training_step(trainer.model, next(self.batches))
            trainer.optimizer.step()
            trainer.model.zero_grad()
        seconds = {"step": time.perf_counter() - started}
        for part in PARTS:
            seconds[part] = sum(trainer._metrics["train"][f"time/{part}"])
        return seconds


def _reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]


def _dataset(frames: int) -> Any:
    from datasets import Dataset

    from benchmarks.harness.inputs import TOKEN_PIXELS
    from benchmarks.harness.photographs import pan

    pictures = list(pan(frames, GRID[0] * TOKEN_PIXELS, GRID[1] * TOKEN_PIXELS))
    prompt = [{"role": "user", "content": "Which digit is in the red cell?"}]
    row = {"prompt": prompt, "images": pictures, "evidence": [{"image": 0}]}
    return Dataset.from_list([row] * 2)


def peak_of(kind: str, frames: int, options: argparse.Namespace, folder: Path) -> int:
    """Bytes above what the trainer holds before its first step."""
    cycle = Cycle(kind, frames, options, folder)
    before = machine.reset_peak_memory(CPU)
    cycle()
    return machine.peak_memory(CPU) - before


def peak_in_fresh_process(kind: str, frames: int, arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.train_overhead", *arguments]
    command += ["--child", kind, str(frames)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=machine.ROOT)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def measure(frames: int, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """All kinds in turn, and the memory of each."""
    kinds = [*KINDS, *(OBJECTIVES if options.objectives else ())]
    with tempfile.TemporaryDirectory(prefix="ral-bench-") as folder:
        cycles = {kind: Cycle(kind, frames, options, Path(folder)) for kind in kinds}
        taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for cycle in cycles.values():
            cycle()
        for repeat in range(options.repeats):
            for kind in kinds[:: 1 if repeat % 2 else -1]:
                taken[kind].append(cycles[kind]())
    row: dict[str, Any] = {"frames": frames, "visual_tokens": frames * GRID[0] * GRID[1]}
    row["sequence"] = 0
    for kind, cycle in cycles.items():
        held = cycle.trainer._buffered_inputs[0]
        row["sequence"] = held["prompt_ids"].shape[1] + held["completion_ids"].shape[1]
        row[kind] = {
            part: quantiles([seconds[part] for seconds in taken[kind]]) for part in ("step", *PARTS)
        }
        row[kind]["peak_bytes"] = peak_in_fresh_process(kind, frames, arguments)
    ratios: dict[str, dict[str, Any]] = {}
    for kind in kinds[1:]:
        ratios[kind] = {
            f"{part}_ratio": quantiles(
                [x[part] / grpo[part] for x, grpo in zip(taken[kind], taken["grpo"], strict=True)]
            )
            for part in ("step", "old_policy", "update")
        }
        ratios[kind]["peak_ratio"] = row[kind]["peak_bytes"] / row["grpo"]["peak_bytes"]
    row.update(ratios.pop("ral"))
    row["objectives"] = ratios
    return row


def objectives_table(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios over the GRPO step, by objective and frames."""
    lines = [f"{'objective':>16} {'frames':>6} {'step':>7} {'update':>7} {'old':>6} {'memory':>7}"]
    lines += [
        f"{kind:>16} {row['frames']:6} {of['step_ratio']['median']:7.3f} "
        f"{of['update_ratio']['median']:7.3f} {of['old_policy_ratio']['median']:6.3f} "
        f"{of['peak_ratio']:7.3f}"
        for kind in OBJECTIVES
        for row in rows
        if (of := row["objectives"].get(kind))
    ]
    return "\n".join(lines)


def worked_out(options: argparse.Namespace) -> dict[str, Any]:
    """The ratio for Qwen2.5-VL-7B at 32k visual tokens, from what this machine does.

    One response, one update: forward, recomputed forward (gradient checkpointing) and backward of
    28 layers, whose matrix products run at the measured rate of a large one and whose attention
    takes 28 times the measured time of one layer's (scaled by length² from `measured_at`). RAL adds
    `ral_loss` on the last layer, measured at full size, and the divergence that is logged.
    """
    length = VISUAL_TOKENS + 256 + RESPONSE
    dtype, at = torch.bfloat16, options.measured_at
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        made = torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(dtype)
        return made.requires_grad_()

    rate = machine.gemm_gflops(dtype, CPU) * 1e9
    weights = LAYERS * (WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * MLP)
    # forward, recomputed forward, backward twice
    products = 4 * 2 * weights * length / rate
    products += 3 * 2 * WIDTH * VOCABULARY * RESPONSE / rate

    q, k, v = tensor(HEADS, at), tensor(KV_HEADS, at), tensor(KV_HEADS, at)

    def attend() -> None:
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        out.sum().backward()

    attend()
    one_layer = min(machine.clock(attend, CPU) for _ in range(2)) * (length / at) ** 2

    q_rows, keys = tensor(HEADS, RESPONSE), tensor(KV_HEADS, length)
    with torch.no_grad():
        old_q = q_rows + 0.05 * torch.randn(q_rows.shape, generator=generator).to(dtype)
    advantages = torch.ones(1)
    snapshot = rk.AttentionSnapshot(old_q, keys)

    def loss() -> None:
        rk.ral_loss(q_rows, keys, snapshot, advantages).backward()

    def divergence() -> None:
        with torch.no_grad():
            rk.attention_divergence(q_rows, keys, snapshot)

    loss()
    seconds = {
        "products": products,
        "attention": LAYERS * one_layer,
        "ral_loss": min(machine.clock(loss, CPU) for _ in range(3)),
        "divergence": min(machine.clock(divergence, CPU) for _ in range(3)),
    }
    step = seconds["products"] + seconds["attention"]
    added = seconds["ral_loss"] + seconds["divergence"]
    activations = LAYERS * length * WIDTH * 2  # what checkpointing keeps, one tensor a layer
    result = {
        "tokens": length,
        "gemm_gflops": rate / 1e9,
        "seconds": seconds,
        "step_ratio": 1 + added / step,
        "snapshot_bytes": snapshot.nbytes,
        "checkpointed_bytes": activations,
        "memory_ratio": 1 + snapshot.nbytes / activations,
    }
    print(
        f"\nQwen2.5-VL-7B, {length:,} tokens of which {RESPONSE} are the response, on this machine"
        f"\n  update      {step:8.1f} s ({seconds['products']:.1f} matrix products at "
        f"{rate / 1e9:.0f} GFLOP/s, {seconds['attention']:.1f} attention, from {at:,} tokens)"
        f"\n  ral_loss    {seconds['ral_loss']:8.2f} s, divergence {seconds['divergence']:.2f} s, "
        f"both measured: step ratio {result['step_ratio']:.4f}"
        f"\n  snapshot    {snapshot.nbytes / 2**20:8.1f} MiB a response; the layers' checkpointed "
        f"activations are {activations / 2**30:.1f} GiB: memory ratio {result['memory_ratio']:.4f}"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", help=f"default: {FRAMES}")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: 4)")
    parser.add_argument("--width", type=int, default=256, help="hidden size (default: 256)")
    parser.add_argument("--response", type=int, default=32, help="tokens (default: 32)")
    parser.add_argument("--repeats", type=int, help="rollout batches (default: 7)")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--objectives", action="store_true", help="also those besides RAL")
    parser.add_argument("--worked-out", action="store_true", help="also for 7B at 32k tokens")
    parser.add_argument("--measured-at", type=int, default=4096, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    cpu_bench.add_arguments(parser, quick="4 frames, 3 rollout batches")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = cpu_bench.parse(parser, arguments)
    options.frames = options.frames or (FRAMES[:1] if options.quick else FRAMES)
    options.repeats = options.repeats or (3 if options.quick else 7)
    if options.child is not None:
        with tempfile.TemporaryDirectory(prefix="ral-bench-") as folder:
            peak = peak_of(options.child[0], int(options.child[1]), options, Path(folder))
        print(json.dumps({"peak": peak}))
        return 0
    names = ("frames", "layers", "width", "response", "repeats", "checkpointing", "objectives")
    settings = {name: getattr(options, name) for name in names}
    run = results.begin("train_overhead", options, settings)
    print(
        f"{ROLLOUTS} rollouts of {options.response} tokens, two updates; {options.layers} layers, "
        f"{options.width} wide; seconds are medians, ratios RAL / GRPO of the same turn\n"
    )
    print(
        f"{'frames':>6} {'tokens':>7} {'GRPO step':>10} {'rollout':>8} {'old':>7} {'update':>7}"
        f" {'step':>7} {'update':>7} {'old':>6} {'GRPO MiB':>9} {'memory':>7}"
    )
    run["rows"] = []
    for frames in options.frames:
        row = measure(frames, options, arguments)
        run["rows"].append(row)
        grpo = row["grpo"]
        print(
            f"{frames:6} {row['sequence']:7} {grpo['step']['median']:10.2f} "
            f"{grpo['rollout']['median']:8.2f} {grpo['old_policy']['median']:7.2f} "
            f"{grpo['update']['median']:7.2f} {row['step_ratio']['median']:7.3f} "
            f"{row['update_ratio']['median']:7.3f} {row['old_policy_ratio']['median']:6.3f} "
            f"{grpo['peak_bytes'] / 2**20:9.0f} {row['peak_ratio']:7.3f}",
            flush=True,
        )
    if options.objectives:
        print("\n" + objectives_table(run["rows"]))
    if options.worked_out:
        run["worked_out"] = worked_out(options)
    results.finish(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
