"""Tiny random mixtures of experts: the families of `capture_router`'s tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integrations import tiny_checkpoint
from tests.integrations.models import HEAD_DIM, MROPE, TEXT, _qwen3_vl

EXPERTS, CHOSEN, WIDTH = 6, 2, 24

# Layer 1 of 3 is dense in Qwen3-MoE and Qwen3-VL-MoE.
OPTIONS: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "head_dim": HEAD_DIM,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": WIDTH,
    "router_aux_loss_coef": 0.05,
}
# Routers that choose by something else than a softmax.
REFUSED: dict[str, dict[str, Any]] = {
    "DeepseekV3": {
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": EXPERTS,
    },
    "Glm4Moe": {
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": EXPERTS,
    },
    "Ernie4_5_Moe": {"moe_num_experts": EXPERTS, "moe_k": CHOSEN, "moe_layer_start_index": 1},
    "Llama4": {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    "Lfm2Moe": {"layer_types": ["full_attention"] * 3, "num_dense_layers": 1},
}  # fmt: skip


def qwen3_moe(**options: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return _seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**OPTIONS, **options}))


def checkpoint(folder: Path) -> Path:
    """A random Qwen3-MoE with a tokenizer, as a folder."""
    tokenizer = tiny_checkpoint.tokenizer()
    tokenizer.chat_template = tiny_checkpoint.CHAT_TEMPLATE
    end, pad = tokenizer.convert_tokens_to_ids([tiny_checkpoint.END, tiny_checkpoint.PAD])
    model = qwen3_moe(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mixtral(**options: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _seeded(MixtralForCausalLM, MixtralConfig(**{**OPTIONS, **options}))


def qwen3_vl_moe(**options: Any) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    dense = _qwen3_vl()
    text = {**OPTIONS, **options, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=dense.vision_config.to_dict(),
        **{
            name: getattr(dense, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id",
                         "vision_end_token_id")
        },
    )  # fmt: skip
    return _seeded(Qwen3VLMoeForConditionalGeneration, config)


def refused(family: str) -> Any:
    """A model whose routers are no distribution, by the beginning of its classes' names."""
    import transformers

    prefix = "Llama4Text" if family == "Llama4" else family
    config = getattr(transformers, f"{prefix}Config")(**{**OPTIONS, **REFUSED[family]})
    return _seeded(getattr(transformers, f"{family}ForCausalLM"), config)


def _seeded(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).eval()


FAMILIES = {"qwen3_moe": qwen3_moe, "qwen3_vl_moe": qwen3_vl_moe, "mixtral": mixtral}
