"""Pictures by their numbers: a frozen vision tower encodes each of them once.

All arms keep the start's vision tower and projector frozen, as in the paper. So the features of a
picture never change. All arms of a seed train on the same pictures, and are evaluated on the same.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Pictures(nn.Module):
    """Features that a frozen tower gave for pictures, in place of the tower.

    `pixel_values` are the pictures' numbers, [patches, 1] float32, as `processor_of` writes them.

    Args:
        tower: the vision tower, which is not changed.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self._tower = (copy.deepcopy(tower).eval().requires_grad_(False),)  # not a submodule
        self.spatial_merge_size: int = self._tower[0].spatial_merge_size  # type: ignore[assignment]
        self._numbers: dict[bytes, int] = {}
        self._features: list[Tensor] = []  # [visual tokens, hidden size] of each picture
        self._grids: list[Tensor] = []  # [3]: time, height, width in patches

    @property
    def tower(self) -> nn.Module:
        """The frozen tower."""
        return self._tower[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    def __len__(self) -> int:
        return len(self._features)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **_: Any) -> Any:
        """The features of some pictures, [visual tokens, hidden size] as `pooler_output`."""
        patches = grid_thw.prod(-1)
        numbers = pixel_values[patches.cumsum(0) - patches, 0].long().tolist()
        return BaseModelOutputWithPooling(
            pooler_output=torch.cat([self._features[number] for number in numbers])
        )

    def processor_of(self, processor: Any) -> Any:
        """A copy of a processor that writes the numbers of pictures in the place of pixels."""
        made = copy.copy(processor)
        pixels = processor.image_processor
        stock: Any = type(pixels)
        pictures = self

        class Numbers(stock):
            def __call__(self, images: Any, *_: Any, **__: Any) -> BatchFeature:
                groups = [group if isinstance(group, list) else [group] for group in images]
                return pictures._look([image for group in groups for image in group], pixels)

        Numbers.__name__ = stock.__name__
        made.image_processor = copy.copy(pixels)
        made.image_processor.__class__ = Numbers
        return made

    @torch.no_grad()
    def _look(self, images: list[Any], pixels: Any) -> BatchFeature:
        keys = [
            hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
            for image in images
        ]
        new = {
            key: image for key, image in zip(keys, images, strict=True) if key not in self._numbers
        }
        if new:
            made = pixels(images=list(new.values()), return_tensors="pt").to(self.device)
            grids = made["image_grid_thw"]
            seen = self._tower[0](made["pixel_values"], grid_thw=grids).pooler_output
            tokens = (grids.prod(-1) // self.spatial_merge_size**2).tolist()
            for key, features, grid in zip(new, seen.split(tokens), grids, strict=True):
                self._numbers[key] = len(self._features)
                self._features.append(features.clone())
                self._grids.append(grid)
        numbers = [self._numbers[key] for key in keys]
        grids = torch.stack([self._grids[number] for number in numbers])
        patches = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(grids.prod(-1))
        return BatchFeature({"pixel_values": patches[:, None], "image_grid_thw": grids})
