"""Videos of Qwen-VL's kind without torchvision, which transformers' own video processors need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class FrameProcessor:
    """Patches of videos, by the image processor of a model whose patches span several frames.

    It stands for the `video_processor` of a processor of transformers. Frames are resized by
    Pillow, as images are, which differs from torchvision by a few grey levels in places. The caller
    has chosen the frames: it samples none.

    Args:
        image_processor: of Pillow, with `patch_size`, `merge_size` and `temporal_patch_size`.
        settings: of the model's `video_preprocessor_config.json`: `size` in pixels, default that
            of the image processor.
        all_frames: whether `size` limits the pixels of all frames together, as in Qwen3-VL, and not
            those of each frame.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(
        self, image_processor: Any, settings: Mapping[str, Any], *, all_frames: bool = False
    ) -> None:
        self.image_processor = image_processor
        self.all_frames = all_frames
        self.patch_size = int(image_processor.patch_size)
        self.merge_size = int(image_processor.merge_size)
        self.temporal_patch_size = int(image_processor.temporal_patch_size)
        size = settings.get("size") or image_processor.size
        edges = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}  # old names
        self.size = {edge: int(settings.get(old) or size[edge]) for edge, old in edges.items()}

    def __call__(self, videos: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The pixels and grids of videos.

        Args:
            videos: uint8 arrays [T, H, W, 3].
            options: of a processor's call: `video_metadata` and `size`. Others are ignored.

        Returns:
            pixel_values_videos float32 [patches, C * temporal * patch * patch]; video_grid_thw
            int64 [videos, 3]; video_metadata, a list of transformers' VideoMetadata.
        """
        size = {**self.size, **(options.get("size") or {})}
        made = [self._patches(video, size) for video in videos]
        from transformers.video_utils import VideoMetadata

        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in made]),
            "video_grid_thw": torch.tensor([grid for _, grid in made]),
            "video_metadata": [
                VideoMetadata(**each) if isinstance(each, dict) else each
                for each in options.get("video_metadata") or ()
            ],
        }

    def _patches(self, video: Any, size: Mapping[str, int]) -> tuple[torch.Tensor, list[int]]:
        from PIL import Image

        steps = math.ceil(len(video) / self.temporal_patch_size)
        together = len(video) if self.all_frames else 1
        limits = {edge: max(1, pixels // together) for edge, pixels in size.items()}
        frames = [Image.fromarray(frame) for frame in video]
        frames += frames[-1:] * (steps * self.temporal_patch_size - len(frames))
        # Each as a picture that stands still over one step: its patches repeat it.
        done = self.image_processor(images=frames, size=limits, return_tensors="pt")
        _, rows, columns = done["image_grid_thw"][0].tolist()
        length = self.temporal_patch_size
        pixels = done["pixel_values"].view(
            steps, length, rows * columns, -1, length, self.patch_size**2
        )
        # Of frame t of a step, the slot t of each patch.
        slots = [pixels[:, slot, :, :, slot] for slot in range(length)]
        patches = torch.stack(slots, dim=3)
        return patches.reshape(steps * rows * columns, -1), [steps, rows, columns]
