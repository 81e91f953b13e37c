"""LanguageBind's video encoder: CLIP's vision transformer with attention over time in every layer.

Enters: clips (clips, frames, 3, height, width), normalised as CLIP's images. Leaves: (clips, frames·(1+patches),
width), frame after frame, the class token of a frame before its patches, of one layer's hidden states. The original is
`LanguageBind/LanguageBind_Video_merge` (Zhu et al., ICLR 2024), the encoder of Video-LLaVA and of ModelCompose, with 8
frames of 224×224: 2056 tokens. A layer adds an embedding of the frame's place in time, attends over the frames of each
patch position, and then does what CLIP's layer does; there is no MLP over time. The class that transformers has for
Video-LLaVA takes CLIP's own transformer and so has no attention over time (PKU-YuanGroup/Video-LLaVA, issue 223).

Names: the original's `vision_model.<name>` is `vision.<name>` here; `vision_model.embeddings.position_ids`, where a
checkpoint has it, holds 0, 1, 2 … and is left out, as are `text_model`, the two projections and `logit_scale`, which
serve its contrastive training. Weights with LoRA beside them (`lora_A`, `lora_B`) have to be merged first.

Invariants: a clip in a batch gives what it gives alone, and nothing is drawn at random. The original drops no patches
outside training, but its processor mirrors every second clip (see video_frames_mmer.py).
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers import initialization as init
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
)

# the vision_config of LanguageBind_Video_merge; its activation is not CLIP's quick_gelu
DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
FRAMES = 8
SETTINGS = ("kind", "config", "frames", "layer", "class_token")


class TimeAndSpaceLayer(CLIPEncoderLayer):
    """CLIP's layer, with attention over time before its attention over space."""

    def __init__(self, config: CLIPVisionConfig, frames: int):
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.zeros(1, frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(clips, frames, tokens, width) -> the same shape."""
        clips, frames, tokens, width = hidden.shape
        in_time = hidden.transpose(1, 2).reshape(clips * tokens, frames, width) + self.temporal_embedding
        in_time = in_time + self.temporal_attn(self.temporal_layer_norm1(in_time))[0]
        in_space = in_time.reshape(clips, tokens, frames, width).transpose(1, 2).reshape(-1, tokens, width)
        in_space = super().forward(in_space, attention_mask=None)  # type: ignore[arg-type]
        return in_space.reshape(clips, frames, tokens, width)


class LanguageBindVision(CLIPPreTrainedModel):
    """CLIP's vision transformer of `TimeAndSpaceLayer`s: pixels to the hidden states of one layer."""

    config: CLIPVisionConfig  # type: ignore[assignment]
    main_input_name = "pixel_values_videos"
    input_modalities: Any = ("video",)
    _no_split_modules = ["CLIPVisionEmbeddings", "TimeAndSpaceLayer"]

    def __init__(self, config: CLIPVisionConfig, frames: int):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = [TimeAndSpaceLayer(config, frames) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TimeAndSpaceLayer):
            init.normal_(module.temporal_embedding, std=self.config.hidden_size**-0.5)

    def forward(self, pixel_values_videos: torch.Tensor, layers: int) -> torch.Tensor:  # type: ignore[override]
        """(clips, frames, 3, height, width) -> (clips, frames, 1+patches, width), after the first `layers` layers.

        post_layernorm is for the pooled class token alone, which an expert does not use.
        """
        clips, frames = pixel_values_videos.shape[:2]
        hidden = self.pre_layrnorm(self.embeddings(pixel_values_videos.flatten(0, 1)))
        hidden = hidden.reshape(clips, frames, *hidden.shape[1:])
        for layer in list(self.encoder["layers"].children())[:layers]:
            hidden = layer(hidden)
        return hidden


class LanguageBindVideo(nn.Module):
    """`width` of a token, `tokens` a clip makes.

    Settings: `config`, as a CLIPVisionConfig, the original's `vision_config` for example (left out: `DEFAULTS`);
    `frames` of a clip (the config's num_frames, else 8); `layer`, as an index of the hidden states, 0 before the first
    layer (default -2); `class_token`, whether each frame keeps its own (default True). Raises ValueError for settings
    that it does not know, a layer that is not there, fewer than two frames, or a config without attention over time.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        if strangers := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"language_bind_video: unknown settings {strangers}, expected some of {list(SETTINGS)}")
        own = dict(settings.get("config", {}))
        self.frames: int = settings["frames"] if "frames" in settings else own.get("num_frames", FRAMES)
        if self.frames < 2 or not own.get("add_time_attn", True):
            raise ValueError(
                f"language_bind_video: found {self.frames} frames, add_time_attn {own.get('add_time_attn', True)}; "
                "expected two frames or more and attention over time; an encoder without it is of kind clip_vision"
            )
        config: Any = CLIPVisionConfig.from_dict({**DEFAULTS, **own})
        depth, layer = config.num_hidden_layers, settings.get("layer", -2)
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"language_bind_video: layer {layer}, but {depth} layers have the hidden states {-depth - 1} … {depth}"
            )
        self.layers = layer % (depth + 1)  # the layers after the asked one are not run
        self.class_token = settings.get("class_token", True)
        self.width, self.size = config.hidden_size, config.image_size
        self.tokens = self.frames * ((config.image_size // config.patch_size) ** 2 + int(self.class_token))
        self.vision = LanguageBindVision(config, self.frames)

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """(clips, frames, 3, height, width) -> (clips, tokens, width). Raises ValueError for another shape."""
        wanted = (self.frames, 3, self.size, self.size)
        if pixel_values_videos.ndim != 5 or tuple(pixel_values_videos.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values_videos: found shape {tuple(pixel_values_videos.shape)}, expected (clips, "
                f"{', '.join(map(str, wanted))}); the expert's own processor takes {self.frames} frames of a clip"
            )
        hidden = self.vision(pixel_values_videos, self.layers)
        return (hidden if self.class_token else hidden[:, :, 1:]).flatten(1, 2)
