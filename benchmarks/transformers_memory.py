"""Peak memory and time of a padded forward of one decoder layer, under "ral" and under "sdpa".

    python -m benchmarks.transformers_memory                # 16k tokens
    python -m benchmarks.transformers_memory --seqlen 4096

A left-padded batch goes through a Llama of one layer (narrow MLP, one logit a sample), with each
attention implementation in a fresh process. Under "sdpa" transformers writes a [B, 1, T, T] mask of
bools, 256 MiB a sample at 16k tokens, and PyTorch's kernel may copy it into the dtype of the
scores. Under "ral" padding and causality are arguments of the kernel. The floor is the same model
on the same tokens without padding, where neither has a mask. All logits must agree, or the exit
status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import cpu_bench, machine, results
from benchmarks.harness.cpu_bench import CPU, DTYPES

IMPLEMENTATIONS = ("ral", "sdpa")
VOCABULARY = 256
AGREEMENT = {"bfloat16": 5e-2, "float32": 1e-4}  # of logits, relative to the largest


def model_of(implementation: str, options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from ral_kernels.integrations.transformers import register

    register()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.heads * options.head_dim,
        intermediate_size=options.head_dim,
        num_hidden_layers=1,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=2 * options.seqlen,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM._from_config(
        config, attn_implementation=implementation, dtype=DTYPES[options.dtype]
    )
    return model.eval()


def batch_of(options: argparse.Namespace, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.seqlen)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    if padded:
        mask[:, : options.seqlen // 8] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def measure(implementation: str, padded: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory above what the model itself takes, seconds, and the last logits."""
    model, batch = model_of(implementation, options), batch_of(options, padded)
    short = {name: tensor[:, -64:] for name, tensor in batch.items()}
    model(**short, use_cache=False)  # libraries and threads start outside the measurement
    before = machine.reset_peak_memory(CPU)
    began = time.perf_counter()
    logits = model(**batch, use_cache=False, logits_to_keep=1).logits
    seconds = time.perf_counter() - began
    return {
        "implementation": implementation,
        "padded": padded,
        "peak_bytes": machine.peak_memory(CPU) - before,
        "seconds": seconds,
        "logits": logits.float(),
    }


def in_fresh_process(
    implementation: str, padded: bool, arguments: Sequence[str], folder: Path
) -> dict[str, Any]:
    file = folder / f"{implementation}-{padded}.pt"
    command = [sys.executable, "-m", "benchmarks.transformers_memory", *arguments]
    command += ["--child", implementation, str(file), *(["--padded"] if padded else [])]
    subprocess.run(command, check=True, cwd=machine.ROOT)
    record: dict[str, Any] = torch.load(file)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seqlen", type=int, help="default: 16384")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--padded", action="store_true", help=argparse.SUPPRESS)
    cpu_bench.add_arguments(parser, quick="4096 tokens")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = cpu_bench.parse(parser, arguments)
    options.seqlen = options.seqlen or (4096 if options.quick else 16384)
    if options.child is not None:
        implementation, file = options.child
        torch.save(measure(implementation, options.padded, options), file)
        return 0

    names = ("seqlen", "batch", "heads", "kv_heads", "head_dim", "dtype")
    settings = {name: getattr(options, name) for name in names}
    run = results.begin("transformers_memory", options, settings)
    mask_bytes = options.batch * options.seqlen**2
    print(
        f"{options.batch} x {options.seqlen} tokens, {options.heads}:{options.kv_heads} heads of "
        f"{options.head_dim}, {options.dtype}, forward; a dense mask of bools takes "
        f"{mask_bytes / 2**20:.0f} MiB\n"
    )
    print(f"{'attention':10} {'batch':12} {'peak MiB':>9} {'seconds':>8}")
    logits: dict[bool, torch.Tensor] = {}
    run["rows"], wrong = [], False
    with tempfile.TemporaryDirectory(prefix="ral-bench-") as folder:
        for padded in (False, True):
            for implementation in IMPLEMENTATIONS:
                record = in_fresh_process(implementation, padded, arguments, Path(folder))
                got = record.pop("logits")
                ours = logits.setdefault(padded, got)
                record["off"] = off = float((got - ours).abs().max() / ours.abs().max())
                wrong |= not off <= AGREEMENT[options.dtype]
                run["rows"].append(record)
                print(
                    f"{implementation:10} {'left-padded' if padded else 'no padding':12} "
                    f"{record['peak_bytes'] / 2**20:9.0f} {record['seconds']:8.2f}"
                    f"{f'  WRONG, off by {off:.1e}' if wrong else ''}",
                    flush=True,
                )
    results.finish(run, options)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
