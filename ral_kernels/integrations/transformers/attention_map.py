"""Attention maps: where a vision-language model looks as it writes each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ...ops.policy import attention_policy
from ...runtime.checks import check_flag, is_int
from ...viz.maps import AttentionMap, Parts
from .map_inputs import OP, check_written, gather, model_inputs, placed, question_of
from .processors import token_texts
from .registration import check_transformers
from .spans import VisionRegion, VisionSpans

ROWS = ("writing", "reading")

__all__ = ["AttentionMap", "attention_map"]


@torch.no_grad()
def attention_map(
    model: Any,
    processor: Any,
    images: Any = None,
    prompt: str | Sequence[Mapping[str, Any]] | None = None,
    *,
    videos: Any = None,
    fps: float | None = None,
    num_frames: int | None = None,
    response: str | None = None,
    max_new_tokens: int = 32,
    layers: int | list[int] | tuple[int, ...] | str = -1,
    by_layer: bool = False,
    by_head: bool = False,
    relative_to: AttentionMap | str | None = None,
    rows: str = "writing",
    exclude_self: bool = True,
    generate_options: Mapping[str, Any] | None = None,
    processor_options: Mapping[str, Any] | None = None,
    on_token: Callable[[], None] | None = None,
) -> AttentionMap:
    """Where a model attends in each image and frame, for each token that it writes or is given.

    A map is the policy of a layer (eq. (1) of arXiv 2602.04884): attention averaged over heads,
    without the row's own key, renormalised. For several layers it is the mean. The model keeps its
    own attention implementation. First it generates. Then one forward over prompt and response
    gives the queries and keys of the chosen layers. Only rows of the response become maps, so
    nothing of size N x N is made.

    Args:
        model: a vision-language model of transformers, of a family that `spans_for` supports. In
            training mode its dropout changes the map.
        processor: its processor. Images do not need torchvision, nor do videos of Qwen-VL: see
            `load_processor`.
        images: one picture or several, as Pillow images, files or uint8 arrays [H, W, 3]. Of an
            animated file and of a video file the first frame is taken; a `viz.Video`, which
            `viz.read_video` reads, stands for its frames as several images. Pictures are turned
            upright (EXIF), and put on white where they are transparent.
        prompt: the question, which the processor's chat template puts after the images and videos;
            or text with the processor's token for each image and video; or messages of a chat.
            Their parts {"type": "image"} and {"type": "video"} may hold the media themselves, under
            "image" or "video", "path" or "url" (a local file); then images and videos are None.
        videos: one video or several, through the model's own video path: files such as .mp4 or
            .gif, uint8 arrays [T, H, W, 3], lists of pictures, or `viz.Video`s.
        fps: frames a second that are taken of a video file, default 2; of frames that have no
            times, the rate at which they were taken.
        num_frames: take this many frames of each video instead, evenly spread.
        response: text to look at instead of generating.
        max_new_tokens: tokens to generate at most.
        layers: decoder layers, negative from the end, or "all"; as in `capture`.
        by_layer: also keep each layer's map: `AttentionMap.at(layer=...)`.
        by_head: also keep each head's map: `AttentionMap.at(head=...)`.
        relative_to: divide by a neutral map, as `AttentionMap.relative_to` defines. A text stands
            for the map of the first token that the model writes to this prompt.
        rows: "writing" for the query that predicts the token, one position before it; or
            "reading" for the token's own query, as in eq. (1) of arXiv 2602.04884.
        exclude_self: leave out each row's own key, which is text.
        generate_options: further arguments of `model.generate`; default greedy.
        processor_options: further arguments of the processor's call.
        on_token: called after each generated token, for a progress bar.

    Returns:
        AttentionMap.

    Raises:
        ImportError: transformers is missing or older than supported; PyAV, for a video file.
        OSError: a file cannot be opened.
        TypeError, ValueError: an argument of a wrong type or value; a file that is no picture or
            video (`viz.PictureError`); a processor without a chat template; media that the prompt
            does not hold.
        NotImplementedError: a model family that is not supported, a processor without a video
            path, or a layer that `capture` cannot reproduce.
    """
    check_transformers(OP)
    from .capture import capture  # imports transformers

    capture(model, layers)  # checks the layers before minutes of generating
    for name, flag in (("by_layer", by_layer), ("by_head", by_head)):
        check_flag(OP, name, flag)
    if relative_to is not None and not isinstance(relative_to, (str, AttentionMap)):
        raise TypeError(
            f"{OP}: relative_to must be a prompt or an AttentionMap; got "
            f"{type(relative_to).__name__}"
        )
    media, prompt = gather(images, videos, prompt, fps, num_frames)
    if response is not None and not isinstance(response, str):
        raise TypeError(f"{OP}: response must be None or a str; got {type(response).__name__}")
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"{OP}: max_new_tokens must be an int >= 1; got {max_new_tokens!r}")
    if rows not in ROWS:
        raise ValueError(f"{OP}: rows must be one of {', '.join(ROWS)}; got {rows!r}")
    text, inputs = model_inputs(model, processor, media, prompt, processor_options or {})
    found, pictures = placed(processor, inputs, media, text)
    if response is None:
        options = {"do_sample": False, **(generate_options or {})}
        written = _generate(model, inputs, max_new_tokens, options, on_token)
    else:
        ids = processor.tokenizer(response, add_special_tokens=False)["input_ids"]
        written = torch.tensor(ids, dtype=torch.int64)
    if len(written) == 0:
        raise ValueError(f"{OP}: the response must have at least one token; got none")
    check_written(inputs, found, written)
    views = [shown.regions for shown in pictures]
    policies, parts, used = _policies(
        model, inputs, written, layers, rows, exclude_self, by_layer, by_head, found, views
    )
    grids, image_shares, text_shares = _shares(found, policies, views)
    ids = [int(token) for token in written]
    made = AttentionMap(
        tokens=tuple(token_texts(processor.tokenizer, ids)),
        token_ids=written,
        text=processor.tokenizer.decode(ids),
        grids=grids,
        boxes=tuple(regions[-1].box for regions in views),
        image_shares=image_shares,
        text_shares=text_shares,
        images=tuple(shown.picture.image for shown in pictures),
        layers=used,
        kinds=tuple(shown.picture.kind for shown in pictures),
        times=tuple(shown.picture.time for shown in pictures),
        model=_name_of(model),
        prompt=question_of(prompt),
        parts=parts,
    )
    if isinstance(relative_to, str):
        neutral = attention_map(
            model, processor, prompt=relative_to, **media.again(), max_new_tokens=1, layers=layers,
            by_layer=by_layer, by_head=by_head, rows=rows, exclude_self=exclude_self,
            generate_options=generate_options, processor_options=processor_options,
        )  # fmt: skip
        return made.relative_to(neutral)
    return made if relative_to is None else made.relative_to(relative_to)


def _name_of(model: Any) -> str:
    """The checkpoint's name without its folders, or the class."""
    inner = model
    while not hasattr(inner, "config") and hasattr(inner, "module"):
        inner = inner.module
    path = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    return PurePath(path).name or type(inner).__name__


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


def _policies(
    model: Any,
    inputs: Mapping[str, Tensor],
    written: Tensor,
    layers: Any,
    rows: str,
    exclude_self: bool,
    by_layer: bool,
    by_head: bool,
    found: VisionSpans,
    views: Sequence[tuple[VisionRegion, ...]],
) -> tuple[Tensor, Parts | None, tuple[int, ...]]:
    """The policy [T, N] of the response's rows over all heads and layers, its parts, the layers."""
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
    total: Tensor | None = None
    kept: list[tuple[Any, Any, Any]] = []  # grids and shares [H, T, ...] of each layer
    for index in captured.layers:
        layer = captured.layer(index)
        policy = layer.policy(exclude_self=exclude_self)[0].float().cpu()
        total = policy if total is None else total + policy
        if by_head:
            policy = _head_policies(layer, (start, start + len(written)), exclude_self)
        if by_layer or by_head:
            kept.append(_shares(found, policy if by_head else policy[None], views))
    assert total is not None
    used = tuple(captured.layers)
    return total / len(used), _parts(kept, used if by_layer else (), by_head), used


def _head_policies(layer: Any, rows: tuple[int, int], exclude_self: bool) -> Tensor:
    """The policy of each head by itself, float32 [H, T, N]: heads stand as samples of one head."""
    options = layer.options(rows)
    mask = options.pop("key_padding_mask")
    q, k = layer.q[0][:, None], layer.k[0]
    groups = q.shape[0] // k.shape[0]
    k = k.repeat_interleave(groups, dim=0)[:, None]
    policy = attention_policy(
        q, k, rows=rows, exclude_self=exclude_self, **options,
        key_padding_mask=None if mask is None else mask.expand(q.shape[0], -1).contiguous(),
    )  # fmt: skip
    return policy.float().cpu()


def _parts(
    kept: Sequence[tuple[Any, Any, Any]], layers: tuple[int, ...], by_head: bool
) -> Parts | None:
    if not kept:
        return None
    grids = [torch.stack(each) for each in zip(*(grids for grids, _, _ in kept), strict=True)]
    images, text = (torch.stack([layer[i] for layer in kept]) for i in (1, 2))
    if not layers:
        grids = [grid.mean(0, keepdim=True) for grid in grids]
        images, text = images.mean(0, keepdim=True), text.mean(0, keepdim=True)
    heads = grids[0].shape[1] if by_head else 0
    return Parts(layers, heads, tuple(grids), images, text)


def _shares(
    found: VisionSpans, policy: Tensor, views: Sequence[tuple[VisionRegion, ...]]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Grids, shares of pictures and of text, from a policy [..., T, N]; later keys are text."""
    ids = found.spans.ids.flatten().cpu()
    shares = torch.stack(
        [policy[..., : len(ids)][..., ids == span].sum(-1) for span in range(len(views))], dim=-1
    )
    grids = tuple(_grid(policy, regions) for regions in views)
    return grids, shares, policy.sum(-1) - shares.sum(-1)


def _grid(policy: Tensor, regions: Sequence[VisionRegion]) -> Tensor:
    """The policy [..., T, N] on a picture, in the grid of its finest view."""
    rows, columns = regions[-1].keys.shape
    total = policy.new_zeros(*policy.shape[:-1], rows, columns)
    for region in regions:
        down = _spread(region.keys.shape[0], rows)
        across = _spread(region.keys.shape[1], columns)
        total += down @ policy[..., region.keys] @ across.T
    return total


def _spread(coarse: int, fine: int) -> Tensor:
    """[fine, coarse]: the fraction of each of `coarse` equal parts of a side in each fine part.

    Columns add up to 1, so spreading keeps sums.
    """
    # In units of 1 / (coarse * fine) of the side, so that all is exact.
    starts, firsts = torch.arange(coarse)[None] * fine, torch.arange(fine)[:, None] * coarse
    shared = torch.minimum(starts + fine, firsts + coarse) - torch.maximum(starts, firsts)
    return shared.clamp(min=0) / fine
