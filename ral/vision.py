"""Images of a rollout batch, some of whose rows may have none: where they are in its token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ral_kernels as rk

from .config import RALConfig
from .distillation import backbone_of

# Fields of the processor's output that TRL's rollout batch keeps, by the processor's names.
_FIELDS = ("image_grid_thw", "image_sizes")
# Arguments of a model that have a row for each image, patch or tile.
_OF_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
    "image_position_ids",
)  # fmt: skip


def has_images(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows have a column for images, even if it is empty in all of them."""
    return any("images" in row or "image" in row for row in rows)


def image_lists(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose `images` is a list, empty in a row without images: TRL can mix those.

    A row has its images in `images` or `image`. Either may be None or missing, in some rows or in
    all; without a column of images in any row, the rows are as they were.
    """
    if not has_images(rows):
        return list(rows)

    def of(row: dict[str, Any]) -> list[Any]:
        images = row.get("images")
        if images is None:
            images = [] if row.get("image") is None else [row["image"]]
        return list(images)

    return [{**row, "images": of(row)} for row in rows]


def blank_for(trainer: Any) -> dict[str, Any] | None:
    """What processes encode that have no images: a model's arguments for one small image.

    Args:
        trainer: of transformers, made.

    Returns:
        Arguments by names such as `pixel_values`; None for one process, or a model without images.
    """
    from PIL import Image

    backbone = backbone_of(trainer.accelerator.unwrap_model(trainer.model))
    processor: Any = getattr(trainer.processing_class, "image_processor", None)
    reads = processor is not None and hasattr(backbone, "get_image_features")
    if trainer.accelerator.num_processes == 1 or not reads:
        return None
    made = processor(images=[Image.new("RGB", (56, 56))], return_tensors="pt")
    return {name: value for name, value in made.items() if name in _OF_IMAGES}


@contextmanager
def without_empty_images(
    model: nn.Module, blank: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Leave images out of those forwards of `model` whose rows have none.

    TRL cuts the images of a rollout batch to the rows of a forward. Where these have none it leaves
    tensors of no rows, which vision encoders do not take.

    Args:
        model: called with keyword arguments.
        blank: of `blank_for`. A forward without images then encodes it, and adds 0 times the
            result. Several processes need that: FSDP gathers the encoder's weights, and DDP waits
            for its gradients, in all processes or in none.
    """
    encodes = False

    def leave_out(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal encodes
        pixels, cache = kwargs.get("pixel_values"), kwargs.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0  # later tokens show no image
        encodes = begins and (pixels is None or pixels.shape[0] == 0)
        if pixels is None or pixels.shape[0] > 0:
            return None
        return args, {name: value for name, value in kwargs.items() if name not in _OF_IMAGES}

    def add_nothing(module: nn.Module, args: Any, embedded: Tensor) -> Tensor | None:
        nonlocal encodes
        if not encodes or blank is None:
            return None
        encodes = False
        on_device = {name: value.to(embedded.device) for name, value in blank.items()}
        features = tree_leaves(backbone.get_image_features(**on_device))
        sums = [x.sum() for x in features if isinstance(x, Tensor) and x.is_floating_point()]
        return embedded + 0.0 * torch.stack(sums).sum()

    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(leave_out, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        if blank is not None:
            unwrapped = extract_model_from_parallel(model)
            backbone: Any = backbone_of(unwrapped)
            # Where a forward encodes images: the order of collectives is the same everywhere. But
            # `generate` would encode them before the forward.
            embedding = backbone.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(add_nothing).remove)
            stack.enter_context(_replaced(unwrapped, "_supports_mm_encoder_outputs", lambda: False))
        yield


@contextmanager
def _replaced(model: Any, method: str, function: Any) -> Iterator[None]:
    """A method of an object replaced, for that object alone."""
    vars(model)[method] = function
    try:
        yield
    finally:
        del vars(model)[method]


@dataclass(frozen=True)
class VisionLayout:
    """Which keys of a batch are visual, and the spans of the configured granularity.

    Attributes:
        visual: bool [B, N].
        spans: of the configuration's granularity and scope; None for "token", which every family
            of models supports.
    """

    visual: Tensor
    spans: rk.Spans | None


def lay_out(
    config: RALConfig,
    model_config: Any,
    ids: Tensor,
    mask: Tensor,
    fields: dict[str, Any],
    response_length: int = 0,
    needs_images: bool = True,
) -> VisionLayout:
    """Find the images in a batch of token ids.

    Args:
        config: granularity and scope of the attention term.
        model_config: the configuration of the vision-language model.
        ids, mask: int64 [B, N], the attention mask 0 where there is padding.
        fields: the processor's output as far as TRL keeps it.
        response_length: number of tokens at the end that show no image, even if the policy writes a
            placeholder.
        needs_images: whether a batch without images is an error if the configuration asks for
            images. If not, none of its keys is visual, and all of its text is one span.

    Raises:
        ValueError: the configuration asks for images, and the batch has none.
        NotImplementedError: `rk.spans_for` does not support the model's family, and the
            configuration asks for spans.
    """
    asks = config.attn_granularity != "token" or config.attn_scope == "visual"
    inputs = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if fields.get("pixel_values") is None:
        if asks and needs_images:
            raise ValueError(
                f"ral: attn_granularity={config.attn_granularity!r} with attn_scope="
                f"{config.attn_scope!r} needs images in the prompts; got a batch without"
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        if config.attn_granularity == "token":
            return VisionLayout(visual, None)
        text = mask.bool() if config.attn_scope == "context" else visual
        return VisionLayout(visual, rk.Spans(text.int() - 1, 1))
    prompt = slice(0, ids.shape[1] - response_length)
    if config.attn_granularity == "token":
        visual = _placeholders(model_config, ids)
        visual[:, prompt.stop :] = False
        return VisionLayout(visual, None)
    inputs.update(input_ids=ids[:, prompt], attention_mask=mask[:, prompt])
    tile = (config.attn_tile[0], config.attn_tile[1])
    granularity: Any = config.attn_granularity  # RALConfig has checked it
    found = rk.spans_for(
        model_config,
        inputs,
        granularity,
        tile=tile if config.attn_granularity == "tile" else None,
        text=config.attn_scope == "context",
    )
    spans = found.spans.extend_to(ids.shape[1])
    visual = spans.ids >= 0
    if found.text_span is not None:
        visual &= spans.ids != found.text_span
        written = mask.bool().clone()
        written[:, prompt] = False
        spans = rk.Spans(
            torch.where(written, found.text_span, spans.ids).to(torch.int32), spans.num_spans
        )
    return VisionLayout(visual, spans)


def _placeholders(model_config: Any, ids: Tensor) -> Tensor:
    """Which tokens are placeholders of a picture: bool, shaped as `ids`."""
    # The first LLaVA families call it an index.
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {getattr(model_config, name, None) for name in names} - {None}
    if not found:
        raise NotImplementedError(
            f"ral: the configuration of a vision-language model must have one of "
            f"{', '.join(names)}; got {type(model_config).__name__}"
        )
    return torch.isin(ids, torch.tensor(sorted(found), device=ids.device))
