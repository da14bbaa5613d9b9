"""Attention maps: where a vision-language model looks as it writes each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import is_int
from ..pictures import as_rgb, read_pictures
from .processors import token_texts
from .registration import check_transformers
from .spans import VisionRegion, VisionSpans, spans_for

_OP = "attention_map"
ROWS = ("writing", "reading")


@dataclass(frozen=True)
class AttentionMap:
    """Where a model attends at each of T tokens of its response. All tensors are on the CPU.

    Attributes:
        tokens: the T tokens as text.
        token_ids: int64 [T].
        text: the whole response.
        grids: for each image float32 [T, rows, columns], the policy of each visual token. Where a
            model sees a picture twice, in small and in tiles, the small one's policy is spread over
            the tiles' finer grid.
        boxes: for each image the (top, left, bottom, right) of its grid in the picture, as
            fractions; outside [0, 1] where the processor padded.
        image_shares: float32 [T, images], the part of the policy on each image.
        text_shares: float32 [T], the part on text; with the images' it adds up to 1.
        images: the pictures as the model saw them, as Pillow images.
        layers: the layers whose policies were averaged.
    """

    tokens: tuple[str, ...]
    token_ids: Tensor
    text: str
    grids: tuple[Tensor, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    image_shares: Tensor
    text_shares: Tensor
    images: tuple[Any, ...]
    layers: tuple[int, ...]

    def select(self, tokens: Sequence[int]) -> AttentionMap:
        """The map of some of its tokens, by their numbers.

        Raises:
            IndexError: there is no such token, or none is named.
        """
        chosen = list(tokens)
        if not chosen or not all(0 <= token < len(self.tokens) for token in chosen):
            raise IndexError(
                f"AttentionMap.select: tokens must lie in [0, {len(self.tokens)}); got {chosen}"
            )
        return replace(
            self,
            tokens=tuple(self.tokens[token] for token in chosen),
            token_ids=self.token_ids[chosen],
            grids=tuple(grid[chosen] for grid in self.grids),
            image_shares=self.image_shares[chosen],
            text_shares=self.text_shares[chosen],
        )


@torch.no_grad()
def attention_map(
    model: Any,
    processor: Any,
    images: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    response: str | None = None,
    max_new_tokens: int = 32,
    layers: int | list[int] | tuple[int, ...] | str = -1,
    rows: str = "writing",
    exclude_self: bool = True,
    generate_options: Mapping[str, Any] | None = None,
    processor_options: Mapping[str, Any] | None = None,
    on_token: Callable[[], None] | None = None,
) -> AttentionMap:
    """Where a model attends in each image, for each token that it writes or is given.

    A map is the policy of a layer (eq. (1) of arXiv 2602.04884): attention averaged over heads,
    without the row's own key, renormalised. For several layers it is the mean. The model keeps its
    own attention implementation. First it generates. Then one forward over prompt and response
    gives the queries and keys of the chosen layers. Only rows of the response become maps, so
    nothing of size N x N is made.

    Args:
        model: a vision-language model of transformers, of a family that `spans_for` supports. In
            training mode its dropout changes the map.
        processor: its processor. Images do not need torchvision: see `load_processor`.
        images: one picture or several, as Pillow images, files or uint8 arrays [H, W, 3]. The
            frames of a video are several images; of an animated file the first frame is taken.
            Pictures are turned upright (EXIF), and put on white where they are transparent.
        prompt: the question, which the processor's chat template puts after the images; or text
            with the processor's image token for each image; or messages of a chat.
        response: text to look at instead of generating.
        max_new_tokens: tokens to generate at most.
        layers: decoder layers, negative from the end, or "all"; as in `capture`.
        rows: "writing" for the query that predicts the token, one position before it; or
            "reading" for the token's own query, as in eq. (1) of arXiv 2602.04884.
        exclude_self: leave out each row's own key, which is text.
        generate_options: further arguments of `model.generate`; default greedy.
        processor_options: further arguments of the processor's call.
        on_token: called after each generated token, for a progress bar.

    Returns:
        AttentionMap.

    Raises:
        ImportError: transformers is missing or older than supported.
        OSError: a file cannot be opened.
        TypeError, ValueError: an argument of a wrong type or value; a file that is no picture
            (`viz.PictureError`); a processor without a chat template; images that the prompt does
            not hold.
        NotImplementedError: a model family that is not supported, or a layer that `capture` cannot
            reproduce.
    """
    check_transformers(_OP)
    from .capture import capture  # imports transformers

    capture(model, layers)  # checks the layers before minutes of generating
    pictures = _pictures(images)
    if response is not None and not isinstance(response, str):
        raise TypeError(f"{_OP}: response must be None or a str; got {type(response).__name__}")
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"{_OP}: max_new_tokens must be an int >= 1; got {max_new_tokens!r}")
    if rows not in ROWS:
        raise ValueError(f"{_OP}: rows must be one of {', '.join(ROWS)}; got {rows!r}")
    inputs = _inputs(model, processor, pictures, prompt, processor_options or {})
    seen = spans_for(processor, inputs, "image").num_items()
    if seen != len(pictures):
        raise ValueError(
            f"{_OP}: the prompt must hold each of the {len(pictures)} images once; the processor "
            f"made {seen} of them (pan and scan: turn it off in processor_options)"
        )
    sizes = [(picture.height, picture.width) for picture in pictures]
    found = spans_for(processor, inputs, "image", image_sizes=sizes)
    if response is None:
        options = {"do_sample": False, **(generate_options or {})}
        written = _generate(model, inputs, max_new_tokens, options, on_token)
    else:
        ids = processor.tokenizer(response, add_special_tokens=False)["input_ids"]
        written = torch.tensor(ids, dtype=torch.int64)
    if len(written) == 0:
        raise ValueError(f"{_OP}: the response must have at least one token; got none")
    placeholder = inputs["input_ids"][0, found.regions[0].keys[0, 0]].cpu()
    if bool((written == placeholder).any()):
        # In the forward over prompt and response it would need a picture that is not there.
        raise ValueError(
            f"{_OP}: the response must not hold the placeholder of images; token "
            f"{int((written == placeholder).nonzero()[0])} is one (generate_options="
            f"{{'suppress_tokens': [{int(placeholder)}]}} keeps it out)"
        )
    policy, used = _policy(model, inputs, written, layers, rows, exclude_self)
    ids = [int(token) for token in written]
    return AttentionMap(
        tokens=tuple(token_texts(processor.tokenizer, ids)),
        token_ids=written,
        text=processor.tokenizer.decode(ids),
        **_grids(found, policy, len(pictures)),
        images=tuple(pictures),
        layers=used,
    )


def _pictures(images: Any) -> list[Any]:
    from PIL import Image

    given = list(images) if isinstance(images, (list, tuple)) else [images]
    pictures = []
    for image in given:
        if isinstance(image, (str, Path)):
            pictures += read_pictures(image)
        elif isinstance(image, Image.Image):
            pictures.append(as_rgb(image))
        elif hasattr(image, "__array_interface__") or isinstance(image, Tensor):
            array = image.cpu().numpy() if isinstance(image, Tensor) else image
            if str(array.dtype) != "uint8" or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(
                    f"{_OP}: an image as an array must be uint8 [H, W, 3]; got {array.dtype} "
                    f"{tuple(array.shape)}"
                )
            pictures.append(Image.fromarray(array))
        else:
            raise TypeError(
                f"{_OP}: images must be Pillow images, files or uint8 arrays; got "
                f"{type(image).__name__}"
            )
    if not pictures:
        raise ValueError(f"{_OP}: images must hold at least one picture; got none")
    return pictures


def _inputs(
    model: Any, processor: Any, pictures: Sequence[Any], prompt: Any, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the model takes: the processor's tensors of one sample, on its device in its dtype."""
    text = _prompt_text(processor, len(pictures), prompt)
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and text.startswith(bos):
        options = {"add_special_tokens": False, **options}  # chat templates write it themselves
    processed = processor(images=[list(pictures)], text=[text], return_tensors="pt", **options)
    first = next(model.parameters())
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)
        for name, value in processed.items()
        if isinstance(value, Tensor)
    }


def _prompt_text(processor: Any, images: int, prompt: Any) -> str:
    token = getattr(processor, "image_token", None)
    if isinstance(prompt, str):
        if token and token in prompt:
            return prompt
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{_OP}: processor must have a chat template, or prompt hold {token!r} where each "
                f"image goes; got {prompt!r}"
            )
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    elif not isinstance(prompt, (list, tuple)):
        raise TypeError(f"{_OP}: prompt must be text or messages; got {type(prompt).__name__}")
    return str(
        processor.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    )


def _generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    options: Mapping[str, Any],
    on_token: Callable[[], None] | None,
) -> Tensor:
    """The generated ids [T]."""
    if on_token is not None:
        options = {"streamer": _Progress(on_token), **options}
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    sequence = made if isinstance(made, Tensor) else made.sequences
    return sequence[0, inputs["input_ids"].shape[1] :].cpu()


class _Progress:
    """A streamer that counts: `generate` passes the prompt first, then each token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.begun = False

    def put(self, value: Any) -> None:
        if self.begun:
            self.on_token()
        self.begun = True

    def end(self) -> None:
        """Nothing is left to write."""


def _policy(
    model: Any,
    inputs: Mapping[str, Tensor],
    written: Tensor,
    layers: Any,
    rows: str,
    exclude_self: bool,
) -> tuple[Tensor, tuple[int, ...]]:
    """The policies [T, N] of the response's rows, averaged over layers, and the layers."""
    from .capture import capture  # imports transformers

    prompt = inputs["input_ids"]
    # The query that writes the last token is at the token before it.
    appended = written[:-1] if rows == "writing" else written
    start = prompt.shape[1] - (1 if rows == "writing" else 0)
    batch: dict[str, Any] = dict(inputs)
    for name, value in inputs.items():
        if value.shape != prompt.shape:
            continue  # pixels and sizes
        fill = 1 if name == "attention_mask" else 0  # token types: text
        added = appended if name == "input_ids" else torch.full_like(appended, fill)
        batch[name] = torch.cat([value, added[None].to(value)], dim=1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    with capture(model, layers, detach=True, rows=(start, start + len(written))) as captured:
        model(**batch, use_cache=False)
    policies = [captured.policy(i, exclude_self=exclude_self)[0] for i in captured.layers]
    return torch.stack(policies).mean(0).float().cpu(), tuple(captured.layers)


def _grids(found: VisionSpans, policy: Tensor, images: int) -> dict[str, Any]:
    """The parts of an AttentionMap from a policy [T, N]; keys after the prompt are text."""
    ids = found.spans.ids.flatten().cpu()
    shares = torch.stack(
        [policy[:, : len(ids)][:, ids == item].sum(-1) for item in range(images)], dim=-1
    )
    items = [found.of_item(item) for item in range(images)]
    return {
        "grids": tuple(_grid(policy, regions) for regions in items),
        "boxes": tuple(regions[-1].box for regions in items),
        "image_shares": shares,
        "text_shares": policy.sum(-1) - shares.sum(-1),
    }


def _grid(policy: Tensor, regions: Sequence[VisionRegion]) -> Tensor:
    """The policy [T, N] on an image, in the grid of its finest view."""
    rows, columns = regions[-1].keys.shape
    total = policy.new_zeros(len(policy), rows, columns)
    for region in regions:
        down = _spread(region.keys.shape[0], rows)
        across = _spread(region.keys.shape[1], columns)
        total += down @ policy[:, region.keys] @ across.T
    return total


def _spread(coarse: int, fine: int) -> Tensor:
    """[fine, coarse]: the fraction of each of `coarse` equal parts of a side in each fine part.

    Columns add up to 1, so spreading keeps sums.
    """
    # In units of 1 / (coarse * fine) of the side, so that all is exact.
    starts, firsts = torch.arange(coarse)[None] * fine, torch.arange(fine)[:, None] * coarse
    shared = torch.minimum(starts + fine, firsts + coarse) - torch.maximum(starts, firsts)
    return shared.clamp(min=0) / fine
