"""Clips of any length and size to the frames that LanguageBind's video encoder was trained on.

Enters: clips, each a path, a list of frames or an array (T, H, W, 3) uint8. Leaves: pixel_values_videos (clips,
frames, 3, size, size) float32. In order: frames at equal steps from the first to the last, both among them; 1/255;
CLIP's mean and deviation; the short side to `size`, bilinear without antialiasing; the middle square. Invariant: the
same clip gives the same pixels. The original also mirrors every second clip at random, at evaluation too
(`RandomHorizontalFlipVideo(p=0.5)`), so that left and right mean nothing; this is left out on purpose.

transformers' own video processors cannot give these pixels: they resize with antialiasing, round to 256 levels after
it, and cut an odd remainder elsewhere.
"""

import os
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .media_mmer import is_item, read_video, uniform_frames
from .processor_classes_mmer import own_class


@own_class
class LanguageBindVideoProcessor:
    r"""Clips to one tensor, as LanguageBind, Video-LLaVA and ModelCompose do it, but never mirrored.

    Args:
        num_frames: frames of a clip; a shorter clip shows some of them more than once.
        size: height and width in pixels.
        image_mean, image_std: of red, green, blue; CLIP's when absent.
        include_last: the last frame is among the frames (see `uniform_frames`).
    """

    model_input_names = ["pixel_values_videos"]

    def __init__(
        self,
        num_frames: int = 8,
        size: int = 224,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        include_last: bool = True,
    ):
        if num_frames < 1 or size < 1:
            raise ValueError(f"found num_frames {num_frames}, size {size}; expected 1 or more")
        self.num_frames, self.size, self.include_last = num_frames, size, include_last
        self.image_mean, self.image_std = list(image_mean or OPENAI_CLIP_MEAN), list(image_std or OPENAI_CLIP_STD)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "LanguageBindVideoProcessor":
        return cls(**settings)

    def __call__(
        self,
        videos: Any,
        return_tensors: str | None = "pt",
        do_sample_frames: bool = True,
        video_metadata: Any = None,
    ) -> BatchFeature:
        """One clip or a list of them -> pixel_values_videos (clips, num_frames, 3, size, size) float32.

        What was sampled before (`do_sample_frames` False, with its `video_metadata`) is sampled again: num_frames of
        num_frames are the same frames. Raises ValueError for what is no clip.
        """
        clips = [videos] if is_item("video", videos) else list(videos)
        pixels = torch.stack([self._one(clip) for clip in clips])
        return BatchFeature({"pixel_values_videos": pixels.numpy() if return_tensors == "np" else pixels})

    def _one(self, clip: Any) -> torch.Tensor:
        is_file = isinstance(clip, (str, os.PathLike))
        frames = read_video(clip, self.num_frames if is_file else None, include_last=self.include_last)[0]
        frames = np.asarray(frames.detach().cpu() if hasattr(frames, "detach") else frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"video: found {frames.dtype} of shape {frames.shape}, expected uint8 (T, H, W, 3)")
        frames = frames[uniform_frames(len(frames), self.num_frames, self.include_last)]
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels = (pixels - mean) / deviation
        height, width = pixels.shape[-2:]
        short = min(height, width)
        scaled = [self.size if side == short else int(side / short * self.size) for side in (height, width)]
        pixels = torch.nn.functional.interpolate(pixels, scaled, mode="bilinear", align_corners=False)
        # halves go to the even number, as in the torchvision that the original used
        top, left = (round((side - self.size) / 2) for side in scaled)
        return pixels[..., top : top + self.size, left : left + self.size].contiguous()
