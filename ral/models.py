"""Models and processors for training: loading, freezing, LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ral_kernels.integrations.transformers as rk_transformers

# Modules of a vision-language model that make visual tokens, by the names that families give them.
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vision_backbone)$")
_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|mm_projector|vision_projector|connector)$")


def load_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model for training, with the head that its configuration names.

    Args:
        name: a folder, or a name on the Hub; also a folder of adapters, whose base model is loaded.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16", or None for
            `default_dtype()`.
        attn_implementation: as in transformers; "ral" is registered first.
        trust_remote_code: whether Python code beside the weights may run.

    Raises:
        OSError: there is no such model.
        ValueError: transformers does not support the dtype or the attention, or the model needs
            code that is not trusted.
        ImportError: a package that the attention needs is not installed.
    """
    from trl.trainer.utils import create_model_from_path

    base = _base_of_adapters(name)
    if base is not None:
        from peft import PeftModel

        model = load_model(
            base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return PeftModel.from_pretrained(model, str(name), is_trainable=True)
    options: dict[str, Any] = {
        "dtype": dtype or default_dtype(),
        "device_map": None,
        "trust_remote_code": trust_remote_code,
    }
    if attn_implementation is not None:
        if attn_implementation == "ral":
            rk_transformers.register()
        options["attn_implementation"] = attn_implementation
    return create_model_from_path(str(name), **options)


def default_dtype() -> str:
    """The dtype of training on this machine: "bfloat16" on a GPU that has it, else "float32"."""
    return "bfloat16" if has_bfloat16() else "float32"


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load_processor(
    name: str | Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model's processor (for images only, without torchvision), with limits on images.

    Args:
        name: a folder, or a name on the Hub.
        min_pixels, max_pixels: images are enlarged or shrunk to lie within; None leaves the
            processor's own limits.
        trust_remote_code: whether Python code beside the processor may run.

    Raises:
        OSError: there is no such processor.
        ValueError: the processor does not support these limits, or it needs code that is not
            trusted.
    """
    processor = rk_transformers.load_processor(
        _base_of_adapters(name) or name, trust_remote_code=trust_remote_code
    )
    limit_pixels(processor, min_pixels=min_pixels, max_pixels=max_pixels)
    return processor


def _base_of_adapters(name: str | Path) -> str | None:
    """The model that a folder of peft's adapters belongs to; None for any other folder or name."""
    described = Path(name) / "adapter_config.json"
    if not described.is_file() or (Path(name) / "config.json").is_file():
        return None
    return str(json.loads(described.read_text("utf-8"))["base_model_name_or_path"])


def limit_pixels(
    processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> None:
    """Set the limits on the size of images; None leaves a limit unchanged.

    Raises:
        ValueError: the processor does not resize to a range of pixels, or the range is empty.
    """
    if min_pixels is None and max_pixels is None:
        return
    images: Any = getattr(processor, "image_processor", None)
    size = dict(getattr(images, "size", None) or {})
    if not {"shortest_edge", "longest_edge"} <= size.keys() or not hasattr(images, "merge_size"):
        raise ValueError(
            "limit_pixels: processor must resize images within a range of pixels, as Qwen-VL's; "
            f"got {type(images).__name__}"
        )
    # Qwen's processors keep areas under these names.
    if min_pixels is not None:
        size["shortest_edge"] = min_pixels
    if max_pixels is not None:
        size["longest_edge"] = max_pixels
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"limit_pixels: min_pixels must be <= max_pixels; got {size['shortest_edge']} > "
            f"{size['longest_edge']}"
        )
    images.size = type(images.size)(**size) if not isinstance(images.size, dict) else size
    for attribute, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and hasattr(images, attribute):
            setattr(images, attribute, value)


def vision_modules(model: nn.Module) -> list[str]:
    """Names of the modules that turn images into visual tokens: encoder and projector."""
    names = [
        name for name, _ in model.named_modules() if _VISION.search(name) or _PROJECTOR.search(name)
    ]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def freeze_vision(model: nn.Module) -> int:
    """Freeze the vision encoder and its projector.

    Returns:
        The number of frozen weights.

    Raises:
        ValueError: no such module is found.
    """
    names = vision_modules(model)
    if not names:
        raise ValueError(
            "freeze_vision: model must have a vision encoder under one of the names that "
            f"transformers gives them, or freeze_vision=false; got {type(model).__name__}"
        )
    frozen = 0
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def lora_config(
    model: nn.Module,
    *,
    rank: int,
    targets: list[str],
    alpha: int | None = None,
    dropout: float = 0.0,
    vision: bool = False,
) -> Any:
    """peft's `LoraConfig` for some linear layers of a model.

    Args:
        model: the model that will get the adapters.
        rank: at least 1.
        targets: ends of the names of linear layers.
        alpha: scale, divided by the rank; None = 2 · rank.
        dropout: on the input of the adapters.
        vision: whether layers of the vision encoder and projector count, too. Names such as
            gate_proj occur in both.

    Raises:
        ValueError: no layer of the model has such a name.
        ImportError: peft is missing.
    """
    from peft import LoraConfig

    kept_out = [] if vision else vision_modules(model)
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == target or name.endswith(f".{target}") for target in targets)
        and not any(name.startswith(f"{prefix}.") for prefix in kept_out)
    ]
    if not chosen:
        raise ValueError(
            f"lora_config: targets must name linear layers of the model; got {', '.join(targets)}"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        task_type="CAUSAL_LM",
    )
