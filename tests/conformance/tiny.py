"""A tiny random model of any family of transformers: its own configuration with small numbers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 320
IMAGE_TOKEN, FIRST_FREE_TOKEN = 300, 301
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2
WIDTH, VISION_WIDTH = HEADS * HEAD_DIM, 32
SPREAD = 0.15  # initializer_range: attention is far from uniform

SIZES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "num_layers": LAYERS,
    "depth": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "n_heads": HEADS,
    "attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "swa_num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "global_head_dim": 2 * HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8,
    "qk_head_dim": HEAD_DIM + 8,
    "v_head_dim": HEAD_DIM,
    "index_topk": 8,
    "index_head_dim": HEAD_DIM,
    "index_n_heads": HEADS,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_head_dim": HEAD_DIM,
    "linear_num_heads": HEADS,
    "linear_num_key_heads": KV_HEADS,
    "linear_num_value_heads": HEADS,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "mlp_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "max_position_embeddings": 512,
    "num_position_embeddings": 64,
    "out_hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "projection_hidden_size": VISION_WIDTH,
    "num_query_tokens": 4,
    "base_channels": 32,
    "text_hidden_size": WIDTH,
    "projector_hidden_size": WIDTH,
    "initializer_range": SPREAD,
    "init_std": SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTHS = {"hidden_size", "d_model", "embed_dim", "hidden_dim", "n_embd", "word_embed_proj_dim"}
DROPPED = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
    "_name_or_path", "_attn_implementation", "attn_implementation", "per_layer_config",
}  # fmt: skip
# Where layers of a family need numbers that fit together: path in the configuration -> value.
MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
HALF_MROPE = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
NO_GROUPS = {"text_config.num_key_value_heads": HEADS}
IMAGE_VOCABULARY = {"<image>": IMAGE_TOKEN} | {f"IMGIMG{x}Z": 256 + i for i, x in enumerate("ABCD")}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4, 64: 8}},
    "blip-2": {"image_token_index": IMAGE_TOKEN},
    "chameleon": {"vocabulary_map": IMAGE_VOCABULARY, "vq_config.num_embeddings": 4},
    "cohere_compass": {
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "cosmos3_edge": MROPE,
    "cosmos3_omni": MROPE,
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.n_routed_experts": 4,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {
        "vision_config.adapter_in_dim": VISION_WIDTH,
        "vision_config.adapter_out_dim": WIDTH,
        "audio_config.adapter_input_size": WIDTH,
        "audio_config.adapter_out_dim": WIDTH,
    },
    "emu3": {
        "vocabulary_map": IMAGE_VOCABULARY,
        "vq_config.hidden_size": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
        "vq_config.codebook_size": 4,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.moe_k": 2,
    },
    "florence2": {
        "vision_config.embed_dim": [16, 16, 32, 32],
        "vision_config.depths": [1, 1, 1, 1],
        "vision_config.num_heads": [2, 2, 2, 2],
        "vision_config.num_groups": [2, 2, 2, 2],
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": HALF_MROPE,
    "glm5_next": {
        "text_config.index_topk": 16,
        "text_config.index_kpool": 4,
        "text_config.qk_rope_head_dim": 0,
        "text_config.qk_head_dim": HEAD_DIM,
        "text_config.head_dim": 0,
    },
    "glm_ocr": MROPE,
    "glmga": MROPE,
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 1]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "qformer_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
    },
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM} | MROPE,
    "inkling_mm_model": {"vision_config.n_layers": 2, "vision_config.patch_size": 4},
    "instructblip": {"image_token_index": IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "janus": {"vq_config.image_token_embed_dim": WIDTH},
    "kimi_k25": {"text_config.head_dim": 8},
    "llama4": {
        "vision_config.intermediate_size": 4 * VISION_WIDTH,
        "vision_config.projector_input_dim": WIDTH,
        "vision_config.projector_output_dim": WIDTH,
        "vision_config.vision_output_dim": WIDTH,
    },
    "mllama": {
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 3 * VISION_WIDTH,
        "vision_config.num_global_layers": 1,
        "text_config.cross_attention_layers": [1],
    },
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "paddleocr_vl": MROPE,
    "qwen2_5_omni_thinker": {**MROPE, "vision_start_token_id": FIRST_FREE_TOKEN + 15},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": FIRST_FREE_TOKEN + 15},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": {**MROPE, "vision_config.hidden_size": WIDTH},
    "qwen3_5": HALF_MROPE,
    "qwen3_5_moe": HALF_MROPE,
    "qwen4_exp": {
        "text_config.indexer_n_heads": HEADS,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD_DIM,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
        "text_config.ngram_vocab_size_base": 200,
    },
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config.sliding_window": 8},
    "unlimited_ocr": NO_GROUPS,
    "vipllava": {"vision_feature_layer": [-1, -2]},
}


class Shrink:
    """Makes a configuration small; special tokens get ids of their own within the vocabulary."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def __call__(self, config: dict[Any, Any], of_vision: bool = False) -> dict[str, Any]:
        layers = config.get("num_hidden_layers")
        kinds = len(set(config.get("layer_types") or ()))
        count = max(LAYERS, kinds)
        small: dict[str, Any] = {}
        for name, value in config.items():
            if not isinstance(name, str):  # a table, not a part
                return dict(config)
            if name in DROPPED or value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if "rope" in name and isinstance(value, dict):
                small[name] = value
            elif isinstance(value, dict):
                vision = of_vision or "vision" in name or "sam" in name or "image_size" in value
                small[name] = self(value, vision)
            elif isinstance(value, list) and layers and len(value) == layers:
                several = [*dict.fromkeys(value)] if isinstance(value[0], str) else value
                small[name] = (several * count)[:count]
            elif not is_number:
                small[name] = value
            elif name in WIDTHS:
                small[name] = VISION_WIDTH if of_vision else WIDTH
            elif name == "num_hidden_layers":
                small[name] = count
            elif "dropout" in name or name in ("layerdrop", "drop_path_rate"):
                small[name] = 0.0
            elif name in SIZES:
                small[name] = SIZES[name]
            elif name.endswith(("_token_id", "_token_index", "_id")) and value > 2:
                small[name] = self._token(name)
            else:
                small[name] = value
        if "kv_lora_rank" in small:  # latent attention has no grouped heads
            small["num_key_value_heads"] = HEADS
        if of_vision:
            _picture(small)
        return small

    def _token(self, name: str) -> int:
        if name in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
            return IMAGE_TOKEN
        return self.tokens.setdefault(name, FIRST_FREE_TOKEN + len(self.tokens))


def _picture(vision: dict[str, Any]) -> None:
    """Pictures of four by four patches, heads that fit the width."""
    patch, size = vision.get("patch_size"), vision.get("image_size")
    if "head_dim" in vision:
        vision["head_dim"] = VISION_WIDTH // HEADS
    if isinstance(patch, int) and isinstance(size, int):
        vision["image_size"] = 4 * patch
    elif isinstance(size, (list, tuple)) and patch is not None:
        side = 4 * (patch if isinstance(patch, int) else patch[0])
        vision["image_size"] = [side, side]


def families() -> dict[str, str]:
    """Every family of the installed transformers that reads pictures and text -> its model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(family: str, attn_implementation: str | dict[str, str]) -> Any:
    """The model with a head, in float32 and eval mode; the same weights at every call."""
    import transformers
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    small = Shrink()(config_class().to_dict())
    for path, value in OVERRIDES.get(family, {}).items():
        *parents, name = path.split(".")
        part = small
        for parent in parents:
            part = part[parent]
        part[name] = value
    if "image_grid_pinpoints" in small:  # pictures of one tile
        small["image_grid_pinpoints"] = [[small["vision_config"]["image_size"]] * 2]
    config = config_class.from_dict(small)
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, families()[family])
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            # Zeros hide what is behind them, as does memory that no layer has initialised.
            if parameter.dim() > 1 and not (parameter.any() and parameter.isfinite().all()):
                parameter.normal_(std=SPREAD)
            elif not parameter.isfinite().all():
                parameter.zero_()
    if model.can_generate():  # never stops before its last token
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def parameters_of(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def picture(model: Any) -> tuple[dict[str, Tensor], int]:
    """One picture as the model takes it, and how many tokens stand for it in the prompt."""
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
    body = model if hasattr(model, "get_image_features") else getattr(model, "model", model)
    features = getattr(body, "get_image_features", None)
    names = parameters_of(model)
    patch = getattr(vision, "patch_size", None) or 14
    patch = int(patch if isinstance(patch, int) else patch[0])
    size = getattr(vision, "image_size", None) or 64
    size = int(size if isinstance(size, int) else size[0])

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(3))

    if config.model_type in PICTURES:
        given = PICTURES[config.model_type](noise, patch, size)
    elif "image_grid_thw" in names:
        names_of_times = ("temporal_patch_size", "patch_temporal")
        times = next((getattr(vision, x) for x in names_of_times if hasattr(vision, x)), 1)
        given = {
            "pixel_values": noise(16, 3 * patch**2 * times),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    else:
        given = {"pixel_values": noise(1, 3, size, size)}
        if "image_sizes" in names:
            given["image_sizes"] = torch.tensor([[size, size]])
        if hasattr(config, "image_grid_pinpoints"):  # the whole picture and its one tile
            given["pixel_values"] = noise(1, 2, 3, size, size)
    if features is None or "image_patches" in given:
        return given, 4 if "image_patches" in given else 0
    with torch.no_grad():
        return given, _count(features(**given), config.get_text_config().hidden_size)


def _frames(noise: Any, patch: int, size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": noise(1, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool),
    }


def _patches(noise: Any, patch: int, size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": noise(16, 3, patch, patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _row_of_patches(noise: Any, patch: int, size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": noise(1, 3, patch, 16 * patch),
        "target_sizes": torch.tensor([[4, 4]]),
    }


def _with_question(noise: Any, patch: int, size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": noise(1, 3, size, size),
        "qformer_input_ids": torch.tensor([[5, 6, 7, 8]]),
    }


# Model types that take pictures in a form of their own.
PICTURES: dict[str, Any] = {
    "fuyu": lambda noise, patch, size: {"image_patches": noise(1, 4, 3 * patch**2)},
    "idefics2": _frames,
    "idefics3": _frames,
    "smolvlm": _frames,
    "instructblip": _with_question,
    "instructblipvideo": lambda noise, patch, size: {
        "pixel_values": noise(1, 1, 3, size, size),
        "qformer_input_ids": torch.tensor([[5, 6, 7, 8]]),
    },
    "kimi_k25": _patches,
    "paddleocr_vl": _patches,
    "lfm2_vl": lambda noise, patch, size: {
        "pixel_values": noise(1, 16, 3 * patch**2),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "minicpm_ocr": _row_of_patches,
    "minicpmv4_6": _row_of_patches,
    "minicpmv4_7": _row_of_patches,
    "mllama": lambda noise, patch, size: {
        "pixel_values": noise(1, 1, 4, 3, size, size),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
    },
    "pix2struct": lambda noise, patch, size: {"flattened_patches": noise(1, 8, 770).abs()},
    "video_llama_3": lambda noise, patch, size: {
        "pixel_values": noise(16, 3 * patch**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "image_merge_sizes": torch.tensor([2]),
    },
}


def _count(features: Any, width: int) -> int:
    """The rows of what `get_image_features` returns, in any of its forms."""
    if hasattr(features, "last_hidden_state"):
        pooled = getattr(features, "pooler_output", None)
        features = features.last_hidden_state if pooled is None else pooled
    if isinstance(features, (list, tuple)):
        if all(isinstance(x, Tensor) for x in features) and features[0].shape[-1] == width:
            return sum(x.numel() // width for x in features)
        return _count(features[0], width)
    return int(features.numel() // width)
