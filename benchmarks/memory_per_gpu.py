"""Memory per GPU of a RAL run of Qwen2.5-VL-7B, computed from shapes; nothing is measured.

    python -m benchmarks.memory_per_gpu                                # 8 GPUs, 32k visual tokens
    python -m benchmarks.memory_per_gpu --gpus 4 --visual-tokens 8192 --lora-rank 64

Parameters are counted on the model class, on the meta device. Activations are those that a decoder
layer keeps for its backward in bfloat16, with gradient checkpointing. The vision encoder is frozen,
as in the paper. Weights, gradients and optimizer states are sharded over all GPUs (FSDP2 or
ZeRO-3). GiB = 2**30 bytes; allocator and NCCL take a few more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30
HALF, SINGLE = 2, 4  # bytes of a bfloat16 and a float32


@dataclass(frozen=True)
class Line:
    """A line of the table: what it is, bytes per GPU, and where the number comes from."""

    what: str
    bytes: float
    why: str


def model_7b() -> Any:
    """Qwen2.5-VL-7B without its numbers: the configuration that its checkpoint declares."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def lines(options: argparse.Namespace) -> list[Line]:
    """The table for one GPU."""
    model = model_7b()
    text, vision = model.config.text_config, model.config.vision_config
    count = dict.fromkeys(("language", "vision", "layer"), 0)
    for name, parameter in model.named_parameters():
        count["vision" if ".visual." in name else "language"] += parameter.numel()
        if ".layers.0." in name:
            count["layer"] += parameter.numel()
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    head_dim = text.hidden_size // heads
    gpus, length = options.gpus, options.visual_tokens + options.text_tokens + options.response
    tokens, per_step = length * options.batch, options.batch * options.steps_per_generation

    lora = options.lora_rank > 0
    if lora:
        per_layer = options.lora_rank * (
            2 * (text.hidden_size + heads * head_dim)
            + 2 * (text.hidden_size + kv_heads * head_dim)
            + 3 * (text.hidden_size + text.intermediate_size)
        )
        trained, frozen = (
            text.num_hidden_layers * per_layer,
            sum(count[name] for name in ("language", "vision")),
        )
    else:
        trained, frozen = count["language"], count["vision"]
    kept = 4 * text.intermediate_size + 6 * text.hidden_size + 2 * (heads + kv_heads) * head_dim
    table = [
        Line(
            "trained weights, gradients, Adam",
            trained * 4 * SINGLE / gpus,
            f"{trained / 1e9:.2f} G parameters, float32, 4 numbers each, over {gpus} GPUs",
        ),
        Line(
            "frozen weights",
            frozen * (HALF if lora else SINGLE) / gpus,
            f"{frozen / 1e9:.2f} G parameters, sharded",
        ),
        Line(
            "two layers gathered",
            2 * count["layer"] * HALF,
            f"{count['layer'] / 1e6:.0f} M parameters each, bfloat16",
        ),
        Line(
            "checkpointed activations",
            text.num_hidden_layers * tokens * text.hidden_size * HALF,
            f"{text.num_hidden_layers} layers x {tokens:,} tokens x {text.hidden_size}",
        ),
        Line(
            "one layer's activations",
            tokens * kept * HALF,
            f"{kept:,} numbers a token; RAL's layer keeps them instead of recomputing: the last "
            "layer's are needed first anyway",
        ),
        Line(
            "vision encoder, forward",
            4 * options.visual_tokens * options.batch
            * (3 * vision.intermediate_size + 5 * vision.hidden_size) * HALF,
            "frozen: one layer's, 4 patches a visual token",
        ),
        Line(
            "RAL: snapshots of a rollout batch",
            per_step * HALF * (length * kv_heads + options.response * heads) * head_dim,
            f"q of {options.response} rows and k of {length:,} keys, {per_step} responses",
        ),
        Line(
            "RAL: gradients of q and k",
            2 * SINGLE * options.batch * (length * kv_heads + options.response * heads) * head_dim,
            "kept between the loss's forward and its backward; float32, and their casts",
        ),
    ]  # fmt: skip
    if not lora:
        table.insert(
            2,
            Line(
                "TRL's reference model (beta > 0)",
                (count["language"] + count["vision"]) * HALF / gpus,
                "bfloat16, sharded; LoRA needs none",
            ),
        )
    if options.vllm:
        cache = 2 * text.num_hidden_layers * kv_heads * head_dim * HALF
        prompt = options.visual_tokens + options.text_tokens
        table.append(
            Line(
                "vLLM, colocated (asleep in updates)",
                (count["language"] + count["vision"]) * HALF
                + cache * (prompt + options.generations * options.response),
                f"bfloat16 weights, and {cache / 1024:.0f} KiB of cache a token for one prompt and "
                f"its {options.generations} rollouts",
            )
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--visual-tokens", type=int, default=32768, help="of a prompt")
    parser.add_argument("--text-tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--response", type=int, default=768, help="tokens")
    parser.add_argument("--batch", type=int, default=1, help="per_device_train_batch_size")
    parser.add_argument("--steps-per-generation", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--no-vllm", dest="vllm", action="store_false")
    options = parser.parse_args(arguments)
    table = lines(options)
    ral = sum(line.bytes for line in table if line.what.startswith("RAL"))
    update = sum(line.bytes for line in table if not line.what.startswith("vLLM"))
    print(
        f"| per GPU of {options.gpus}, {options.visual_tokens:,} visual tokens a prompt | GiB | |"
        "\n|---|---|---|"
    )
    for line in table:
        print(f"| {line.what} | {line.bytes / GIB:.2f} | {line.why} |")
    print(
        f"| **update, in all** | **{update / GIB:.1f}** | of which RAL {100 * ral / update:.1f} % |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
