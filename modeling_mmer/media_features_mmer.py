"""Which expert's encoder reads which media, and their features.

Enters: media tensors under "<expert>.<name>", or those of one expert's own processor. Leaves: features (tokens,
hidden) in the order of the placeholders.
"""

from typing import Any

import torch

from configuration_mmer.routes_mmer import named_route

from .towers_mmer import tower_features


class MediaFeatures:
    """Mixed into the model that has the encoders."""

    config: Any
    experts: Any
    check_left: Any

    def media_inputs(self, kwargs: dict) -> dict[str, dict[str, torch.Tensor]]:
        """Take the "<expert>.<name>" entries out of `kwargs`: {expert: {name: tensor}}. Raises ValueError for an
        unknown expert.
        """
        media: dict[str, dict[str, torch.Tensor]] = {}
        for key in [key for key in kwargs if "." in key]:
            expert, _, name = key.partition(".")
            if expert not in self.config.experts:
                raise ValueError(f"{key!r} is for an expert {expert!r}, but this model has {self.config.expert_names}")
            value = kwargs.pop(key)
            if value is not None:
                media.setdefault(expert, {})[name] = value
        return media

    def get_media_features(self, expert: str, modality: str, **inputs: torch.Tensor) -> torch.Tensor:
        """Features (tokens of all items, hidden) by the expert's own tower, from the tensors of its own processor."""
        self.check_left([named_route(expert, self.config.expert_names)])
        return tower_features(self.experts[expert], modality, inputs)

    def get_image_features(self, expert: str | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        return self.get_media_features(expert or self._default_expert("image"), "image", **inputs)

    def get_video_features(self, expert: str | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        return self.get_media_features(expert or self._default_expert("video"), "video", **inputs)

    def get_audio_features(self, expert: str | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        return self.get_media_features(expert or self._default_expert("audio"), "audio", **inputs)

    def get_point_cloud_features(self, expert: str | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        return self.get_media_features(expert or self._default_expert("point_cloud"), "point_cloud", **inputs)

    def _default_expert(self, modality: str) -> str:
        if modality not in self.config.default_experts:
            raise ValueError(f"no expert of this model takes {modality}: it has {self.config.default_experts}")
        return self.config.default_experts[modality]
