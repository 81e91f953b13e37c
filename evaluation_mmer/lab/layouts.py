"""What the lab's towers differ in: class, encoder, connector, config and processor of each expert.

`LAYOUTS[name]` is all that `write_tower` and the training know of an expert. *image* and *digits* are a
`LlavaForConditionalGeneration` (56 px, 16 tokens: DINOv2's hidden state 10 without CLS), *audio* a
`Qwen2AudioForConditionalGeneration` (1 s of 16 kHz, up to 25 tokens), *video* a
`LlavaOnevisionForConditionalGeneration` (8 frames of 56 px through the same DINOv2, 4 tokens a frame and one behind
them), *point_cloud* our `ComposedForConditionalGeneration` (512 points through a small Point-BERT, 33 tokens).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    BitImageProcessorPil,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.point_clouds_mmer import PointCloudProcessor

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

IMAGE_SIZE = 56
VISION_LAYER = 10  # the package's DINOv2 was tuned for saliency: its last layers are the weaker features
AUDIO_SECONDS = 1
FRAMES_PER_POSITION = 2  # Whisper's second convolution has stride 2
FRAMES = 8
POINTS = 512
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Layout:
    """`encoder` and `projector` are attributes of the model's inner class; `media` is what a prompt says."""

    model: Any
    encoder: str
    projector: str
    media: str
    media_type: str  # the `type` of a content item
    added_tokens: tuple[str, ...]  # the placeholder first
    shapes: Callable[[int, int], Shapes]  # (encoder's width, LLM's width) -> the connector's tensors
    config: Callable[[PreTrainedConfig, Path, PreTrainedTokenizerBase], Any]
    processor: Callable[[PreTrainedTokenizerBase, Any, str], ProcessorMixin]
    features: Callable[[Path], State]  # the encoder's tensors, as the tower holds them
    width: Callable[[Path], int]
    head: bool = False  # the class declares no tied weights: its head has a tensor of its own


def two_layers(width: int, hidden: int) -> Shapes:
    """Linear, GELU, Linear."""
    prefix = "multi_modal_projector"
    return {
        f"{prefix}.linear_1.weight": (hidden, width),
        f"{prefix}.linear_1.bias": (hidden,),
        f"{prefix}.linear_2.weight": (hidden, hidden),
        f"{prefix}.linear_2.bias": (hidden,),
    }


def encoder_width(encoder: Path) -> int:
    return int(AutoConfig.from_pretrained(encoder).hidden_size)


# pictures


def dino_config(encoder: Path, image_size: int | None = None) -> Dinov2Config:
    values = AutoConfig.from_pretrained(encoder).to_dict()
    for backbone_only in ("out_features", "out_indices", "stage_names"):
        values.pop(backbone_only, None)
    values["num_hidden_layers"] = VISION_LAYER  # later layers would be computed and not used
    if image_size is not None:
        values["image_size"] = image_size
    return Dinov2Config(**values)


def dino_features(encoder: Path) -> State:
    features: State = AutoModel.from_pretrained(encoder, dtype=torch.bfloat16).state_dict()
    return {key: value for key, value in features.items() if layer_of(key) < VISION_LAYER}


def layer_of(key: str) -> int:
    """The layer a parameter's name belongs to, 0 for those outside the layers."""
    found = re.search(r"\blayers?\.(\d+)\.", key)
    return int(found[1]) if found else 0


def image_config(text_config: PreTrainedConfig, encoder: Path, tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    vision_config: Any = dino_config(encoder)
    side = IMAGE_SIZE // int(vision_config.patch_size)
    return LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=side * side,
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def image_processor(tokenizer: PreTrainedTokenizerBase, config: Any, chat_template: str) -> LlavaProcessor:
    pixels = BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=_MEAN,
        image_std=_STD,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


# sounds


def audio_config(text_config: PreTrainedConfig, encoder: Path, tokenizer: PreTrainedTokenizerBase) -> Qwen2AudioConfig:
    config = AutoConfig.from_pretrained(encoder)
    config.max_source_positions = 100 * AUDIO_SECONDS // FRAMES_PER_POSITION  # 10 ms a frame
    media_id = tokenizer.get_vocab()["<|AUDIO|>"]
    return Qwen2AudioConfig(text_config=text_config, audio_config=config, audio_token_index=media_id)


def audio_processor(tokenizer: PreTrainedTokenizerBase, config: Any, chat_template: str) -> Qwen2AudioProcessor:
    mel_bins = config.audio_config.num_mel_bins
    mel = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=AUDIO_SECONDS, return_attention_mask=True)
    return Qwen2AudioProcessor(feature_extractor=mel, tokenizer=tokenizer, chat_template=chat_template)


def audio_features(encoder: Path) -> State:
    features: State = AutoModel.from_pretrained(encoder, dtype=torch.bfloat16).state_dict()
    kept = 100 * AUDIO_SECONDS // FRAMES_PER_POSITION
    features["embed_positions.weight"] = features["embed_positions.weight"][:kept].clone()
    return features


def audio_shapes(width: int, hidden: int) -> Shapes:
    prefix = "multi_modal_projector.linear"
    return {f"{prefix}.weight": (hidden, width), f"{prefix}.bias": (hidden,)}


# clips


def video_config(
    text_config: PreTrainedConfig, encoder: Path, tokenizer: PreTrainedTokenizerBase
) -> LlavaOnevisionConfig:
    words = tokenizer.get_vocab()
    return LlavaOnevisionConfig(
        text_config=text_config,
        vision_config=dino_config(encoder, IMAGE_SIZE),
        image_token_index=words["<image>"],
        video_token_index=words["<video>"],
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=True,
    )


def video_processor(tokenizer: PreTrainedTokenizerBase, config: Any, chat_template: str) -> LlavaOnevisionProcessor:
    settings: dict[str, Any] = {
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    pinpoints = config.image_grid_pinpoints
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, **settings),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(num_frames=FRAMES, **settings),
        num_image_tokens=(IMAGE_SIZE // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
    )


def video_features(encoder: Path) -> State:
    """DINOv2's, its position table brought to 56 px as its own class does it for every picture of that size."""
    features, name = dino_features(encoder), "embeddings.position_embeddings"
    positions = features[name].float()
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wanted = IMAGE_SIZE // int(AutoConfig.from_pretrained(encoder).patch_size)
    grid = torch.nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    resized = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, wanted * wanted, -1)], 1)
    return {**features, name: resized.to(features[name].dtype)}


def video_shapes(width: int, hidden: int) -> Shapes:
    return {**two_layers(width, hidden), "image_newline": (hidden,)}


# point clouds


def point_settings(encoder: Path) -> dict[str, Any]:
    return json.loads((encoder / "encoder.json").read_text(encoding="utf-8"))


def point_cloud_config(
    text_config: PreTrainedConfig, encoder: Path, tokenizer: PreTrainedTokenizerBase
) -> ComposedConfig:
    settings, hidden = point_settings(encoder), text_config.hidden_size
    return ComposedConfig(
        text_config=text_config.to_dict(),
        encoders={"point_cloud": settings},
        connectors={"point_cloud": {"widths": [settings["width"], hidden, hidden]}},
        point_cloud_token_id=tokenizer.get_vocab()["<point_patch>"],
    )


def point_cloud_processor(tokenizer: PreTrainedTokenizerBase, config: Any, chat_template: str) -> ComposedProcessor:
    settings = config.encoders["point_cloud"]
    return ComposedProcessor(
        tokenizer,
        parts={"point_cloud": PointCloudProcessor(points=POINTS, dims=settings["point_dims"])},
        features={"point_cloud": {"count": settings["groups"] + 1}},
        point_cloud_token="<point_patch>",
        chat_template=chat_template,
    )


def point_cloud_shapes(width: int, hidden: int) -> Shapes:
    prefix = "connectors.point_cloud"
    shapes: Shapes = {f"{prefix}.0.weight": (hidden, width), f"{prefix}.0.bias": (hidden,)}
    return {**shapes, f"{prefix}.2.weight": (hidden, hidden), f"{prefix}.2.bias": (hidden,)}


_PICTURE = Layout(
    LlavaForConditionalGeneration, "vision_tower", "multi_modal_projector", "<image>", "image", ("<image>",),
    two_layers, image_config, image_processor, dino_features, encoder_width,
)  # fmt: skip
LAYOUTS = {
    "image": _PICTURE,
    "digits": _PICTURE,
    "audio": Layout(
        Qwen2AudioForConditionalGeneration, "audio_tower", "multi_modal_projector",
        "<|audio_bos|><|AUDIO|><|audio_eos|>", "audio", ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
        audio_shapes, audio_config, audio_processor, audio_features, encoder_width, head=True,
    ),
    "video": Layout(
        LlavaOnevisionForConditionalGeneration, "vision_tower", "multi_modal_projector",
        "<video>", "video", ("<video>", "<image>"),
        video_shapes, video_config, video_processor, video_features, encoder_width,
    ),
    "point_cloud": Layout(
        ComposedForConditionalGeneration, "encoders.point_cloud", "connectors.point_cloud",
        "<point_patch>", "point_cloud", ("<point_patch>",),
        point_cloud_shapes, point_cloud_config, point_cloud_processor,
        lambda encoder: load_file(encoder / "encoder.safetensors"), lambda encoder: point_settings(encoder)["width"],
    ),
}  # fmt: skip
