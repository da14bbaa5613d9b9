"""`AttentionMap`: where a model attends at each token of its answer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .words import Word, words_of

Box = tuple[float, float, float, float]
FORMAT = "ral_kernels attention map"
VERSION = 1
# A cell of the neutral map counts as at least this part of its mean cell.
FLOOR = 0.01


@dataclass(frozen=True)
class Parts:
    """The policies of single layers and heads, which an `AttentionMap` averages.

    Attributes:
        layers: the number of each of the L layers; empty where they are averaged (then L = 1).
        heads: H, or 0 where heads are averaged (then H = 1 below).
        grids: for each picture float32 [L, H, T, rows, columns]. A head's policy leaves out the
            row's own key and is renormalised by itself, so the mean over heads differs from the
            map's, which is renormalised after averaging.
        image_shares: float32 [L, H, T, pictures].
        text_shares: float32 [L, H, T].
    """

    layers: tuple[int, ...]
    heads: int
    grids: tuple[Tensor, ...]
    image_shares: Tensor
    text_shares: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class AttentionMap:
    """Where a model attends at each of T tokens of its response. All tensors are on the CPU.

    A picture is an image, or a frame of a video: where a model merges two frames into a step of
    time, as Qwen-VL does, the step, shown by its first frame.

    Attributes:
        tokens: the T tokens as text.
        token_ids: int64 [T].
        text: the whole response.
        grids: for each picture float32 [T, rows, columns], the policy of each visual token. Where a
            model sees a picture twice, in small and in tiles, the small one's policy is spread over
            the tiles' finer grid.
        boxes: for each picture the (top, left, bottom, right) of its grid in the picture, as
            fractions; outside [0, 1] where the processor padded.
        image_shares: float32 [T, pictures], the part of the policy on each picture.
        text_shares: float32 [T], the part on text; with the pictures' it adds up to 1.
        images: the pictures as the model saw them, as Pillow images.
        layers: the layers whose policies were averaged.
        kinds: for each picture "image" or "frame"; empty where all are images.
        times: for each picture its time in seconds or None; empty where none has one.
        model: the model's name.
        prompt: the question.
        head: the head, where it is not the mean over all.
        relative: the neutral prompt that `relative_to` divided by; "" for none.
        parts: the policies of single layers and heads, if they were asked for.
    """

    tokens: tuple[str, ...]
    token_ids: Tensor
    text: str
    grids: tuple[Tensor, ...]
    boxes: tuple[Box, ...]
    image_shares: Tensor
    text_shares: Tensor
    images: tuple[Any, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...] = ()
    times: tuple[float | None, ...] = ()
    model: str = ""
    prompt: str = ""
    relative: str = ""
    head: int | None = None
    parts: Parts | None = None

    def __repr__(self) -> str:
        answer = self.text if len(self.text) <= 40 else f"{self.text[:39]}…"
        nouns = [self.noun(image) for image in range(len(self.grids))]
        counts = [f"{nouns.count(n)} {n}{'s' * (nouns.count(n) > 1)}" for n in dict.fromkeys(nouns)]
        share = 100 * float(self.image_shares.sum(-1).mean())
        return (
            f"AttentionMap({len(self.tokens)} tokens {answer!r}, {' and '.join(counts)}, "
            f"{self.source}, {share:.0f} % of the attention on pictures)"
        )

    @property
    def source(self) -> str:
        """The layer and the model in words, such as "layer 27 of Qwen2.5-VL-7B-Instruct"."""
        numbers = sorted(self.layers)
        if len(numbers) == 1:
            what = f"layer {numbers[0]}"
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            what = f"mean of layers {numbers[0]}-{numbers[-1]}"
        else:
            what = f"mean of {len(numbers)} layers"
        what += "" if self.head is None else f", head {self.head}"
        return f"{what} of {self.model}" if self.model else what

    @property
    def words(self) -> tuple[Word, ...]:
        """The response's words, each with the numbers of its tokens: word pieces are joined."""
        return words_of(self.tokens)

    def noun(self, image: int) -> str:
        """What a picture is: "image" or "frame"."""
        return self.kinds[image] if self.kinds else "image"

    def name(self, image: int) -> str:
        """A picture's name: "image", "image 2", or "frame 7, 3.5 s"."""
        time = self.times[image] if self.times else None
        number = f" {image + 1}" if len(self.grids) > 1 else ""
        return f"{self.noun(image)}{number}" + ("" if time is None else f", {time:.1f} s")

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
        parts = self.parts and replace(
            self.parts,
            grids=tuple(grid[:, :, chosen] for grid in self.parts.grids),
            image_shares=self.parts.image_shares[:, :, chosen],
            text_shares=self.parts.text_shares[:, :, chosen],
        )
        return replace(
            self,
            tokens=tuple(self.tokens[token] for token in chosen),
            token_ids=self.token_ids[chosen],
            grids=tuple(grid[chosen] for grid in self.grids),
            image_shares=self.image_shares[chosen],
            text_shares=self.text_shares[chosen],
            parts=parts,
        )

    def at(self, *, layer: int | None = None, head: int | None = None) -> AttentionMap:
        """The map of one layer, one head, or one head of one layer.

        Args:
            layer: the number of a layer; None for the mean over those that were kept.
            head: the number of a head; None for the mean over those that were kept.

        Raises:
            ValueError: it was not kept: `attention_map` needs by_layer=True or by_head=True.
        """
        parts = self.parts
        if layer is None and head is None:
            return self
        kept_layers, heads = (parts.layers, parts.heads) if parts else ((), 0)
        if layer is not None and layer not in kept_layers:
            raise ValueError(
                f"AttentionMap.at: layer must be one of {list(kept_layers)}, which by_layer=True "
                f"keeps; got {layer}"
            )
        if head is not None and not 0 <= head < heads:
            raise ValueError(
                f"AttentionMap.at: head must lie in [0, {heads}), which by_head=True keeps; got "
                f"{head}"
            )
        assert parts is not None
        rows = [kept_layers.index(layer)] if layer is not None else slice(None)
        columns = [head] if head is not None else slice(None)

        def mean(values: Tensor) -> Tensor:
            return values[rows][:, columns].mean((0, 1))

        return replace(
            self,
            grids=tuple(mean(grid) for grid in parts.grids),
            image_shares=mean(parts.image_shares),
            text_shares=mean(parts.text_shares),
            layers=self.layers if layer is None else (layer,),
            head=head,
            parts=None,
        )

    def relative_to(self, neutral: AttentionMap) -> AttentionMap:
        """Divide this map by that of a neutral prompt, so that attention sinks vanish.

        With p[t, i] the policy of visual token i at token t, and n[i] the neutral map's, averaged
        over its tokens,

            r[t, i] = p[t, i] / max(n[i], floor),   floor = 0.01 · mean of n over all visual tokens
            p'[t, i] = r[t, i] · Σ_j p[t, j] / Σ_j r[t, j]

        with sums over the visual tokens of all pictures. So a token's attention on all pictures
        together stays what it was, as does that on text; only where it lies changes. A visual token
        without attention keeps 0, and a row without any stays 0. Where both maps have parts, each
        layer and head is divided by its own.

        Args:
            neutral: a map of the same pictures by the same model.

        Raises:
            TypeError: it is no AttentionMap.
            ValueError: its grids have other shapes, or it lacks this map's parts.
        """
        if not isinstance(neutral, AttentionMap):
            raise TypeError(
                "AttentionMap.relative_to: neutral must be an AttentionMap; got "
                f"{type(neutral).__name__}"
            )
        shapes, others = ([tuple(g.shape[1:]) for g in m.grids] for m in (self, neutral))
        if shapes != others:
            raise ValueError(
                f"AttentionMap.relative_to: neutral must have grids {shapes}; got {others}"
            )
        grids, shares = _divided(self.grids, self.image_shares, neutral.grids)
        parts = self.parts
        if parts is not None:
            other = neutral.parts
            if other is None or (other.layers, other.heads) != (parts.layers, parts.heads):
                raise ValueError(
                    "AttentionMap.relative_to: neutral must keep the same layers and heads; got "
                    f"{(other.layers, other.heads) if other else 'none'}"
                )
            made, part_shares = _divided(parts.grids, parts.image_shares, other.grids)
            parts = replace(parts, grids=made, image_shares=part_shares)
        return replace(
            self, grids=grids, image_shares=shares, parts=parts,
            relative=neutral.prompt or "another map",
        )  # fmt: skip

    def figure(
        self,
        ax: Any = None,
        *,
        token: int | None = None,
        image: int = 0,
        cmap: str = "inferno",
        alpha: float = 0.85,
        clip: float = 98.0,
    ) -> Any:
        """One picture under its attention: `viz.overlay`.

        Args:
            ax: matplotlib axes to draw into; None makes a figure.
            token: number of the token; None for the mean over all.
            image: number of the picture.
            cmap: a colour map of matplotlib.
            alpha: opacity of the colour where attention is highest, in (0, 1].
            clip: as in `viz.overlay`.

        Returns:
            The matplotlib figure, or `ax`.

        Raises:
            ImportError, IndexError, ValueError: as in `viz.overlay`.
        """
        from .figures import overlay

        return overlay(self, image, token, ax=ax, cmap=cmap, alpha=alpha, clip=clip)

    def to_html(
        self, path: str | Path, *, cmap: str = "inferno", max_bytes: int = 20_000_000
    ) -> Path:
        """Write a page that shows the map, in one file that needs no network: `viz.write_html`."""
        from .html import write_html

        return write_html(self, path, cmap=cmap, max_bytes=max_bytes)

    def save(self, path: str | Path) -> Path:
        """Write the map to one .npz file: arrays, the pictures as PNG, and JSON; nothing pickled.

        Args:
            path: the file, written under this very name.

        Returns:
            The path.

        Raises:
            OSError: it cannot be written.
        """
        import numpy as np

        arrays: dict[str, Any] = {"token_ids": self.token_ids, "image_shares": self.image_shares,
                                  "text_shares": self.text_shares}  # fmt: skip
        for number, (grid, picture) in enumerate(zip(self.grids, self.images, strict=True)):
            arrays[f"grid_{number}"] = grid
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            arrays[f"picture_{number}"] = np.frombuffer(stream.getvalue(), np.uint8)
        if self.parts is not None:
            arrays["part_image_shares"] = self.parts.image_shares
            arrays["part_text_shares"] = self.parts.text_shares
            for number, grid in enumerate(self.parts.grids):
                arrays[f"part_grid_{number}"] = grid
        names = (
            "tokens",
            "text",
            "boxes",
            "layers",
            "kinds",
            "times",
            "model",
            "prompt",
            "head",
            "relative",
        )
        head = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in names},
        }
        if self.parts is not None:
            head["parts"] = {"layers": self.parts.layers, "heads": self.parts.heads}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with open(path, "wb") as file:
            saved: Any = {name: np.asarray(value) for name, value in arrays.items()}
            np.savez_compressed(file, **saved)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> AttentionMap:
        """Read what `save` wrote. Nothing in the file is run.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is no saved map, or one of a newer version.
        """
        import zipfile

        import numpy as np
        from PIL import Image

        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(arrays["head"].tobytes())
            if head["format"] != FORMAT:
                raise ValueError(f"its format is {head['format']!r}")
            if head["version"] > VERSION:
                raise ValueError(f"it is of version {head['version']}; this is {VERSION}")

            def tensors(prefix: str) -> tuple[Tensor, ...]:
                return tuple(
                    torch.from_numpy(arrays[f"{prefix}_{i}"]) for i in range(len(head["boxes"]))
                )

            images = []
            for i in range(len(head["boxes"])):
                with Image.open(
                    io.BytesIO(arrays[f"picture_{i}"].tobytes()), formats=["PNG"]
                ) as png:
                    images.append(png.convert("RGB"))
            parts = None
            if "parts" in head:
                parts = Parts(
                    tuple(head["parts"]["layers"]),
                    head["parts"]["heads"],
                    tensors("part_grid"),
                    torch.from_numpy(arrays["part_image_shares"]),
                    torch.from_numpy(arrays["part_text_shares"]),
                )
            return cls(
                tokens=tuple(head["tokens"]),
                token_ids=torch.from_numpy(arrays["token_ids"]),
                text=head["text"],
                grids=tensors("grid"),
                boxes=tuple(tuple(box) for box in head["boxes"]),
                image_shares=torch.from_numpy(arrays["image_shares"]),
                text_shares=torch.from_numpy(arrays["text_shares"]),
                images=tuple(images),
                layers=tuple(head["layers"]),
                kinds=tuple(head["kinds"]),
                times=tuple(head["times"]),
                model=head["model"],
                prompt=head["prompt"],
                head=head["head"],
                relative=head["relative"],
                parts=parts,
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            zipfile.BadZipFile,
            EOFError,
        ) as error:
            raise ValueError(
                f"AttentionMap.load: path must be a map that AttentionMap.save wrote; got {path}: "
                f"{error}"
            ) from error


def _divided(
    grids: Sequence[Tensor], shares: Tensor, neutral: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The formula of `relative_to`, over grids [..., T, rows, columns] and shares [..., T, P]."""
    means = [grid.double().mean(-3, keepdim=True) for grid in neutral]
    cells = torch.cat([mean.flatten(-2) for mean in means], dim=-1)
    floor = (FLOOR * cells.mean(-1)).clamp(min=1e-30)[..., None, None]
    ratios = [grid.double() / torch.maximum(m, floor) for grid, m in zip(grids, means, strict=True)]
    before = torch.stack([grid.double().sum((-2, -1)) for grid in grids], dim=-1)
    after = torch.stack([ratio.sum((-2, -1)) for ratio in ratios], dim=-1)
    total = after.sum(-1)
    scale = torch.where(total > 0, before.sum(-1) / total.clamp(min=1e-300), 0.0)
    made = tuple((ratio * scale[..., None, None]).float() for ratio in ratios)
    moved = after * scale[..., None] - before
    return made, (shares.double() + moved).clamp(min=0).float()
