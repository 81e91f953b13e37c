"""An expert's own class with the language model taken out.

Enters: the expert's own config, and the media tensors that its own processor makes. Leaves: features (tokens, hidden)
in the order of the placeholders. Invariant: the tower runs the expert's own code on the expert's own tensors, so its
features are bit-equal to those the expert's language model received.
"""

import copy
import inspect
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from configuration_mmer.composed_config_mmer import ComposedConfig

from .composed_mmer import ComposedModel

# the tensors whose presence means "there is media of this modality", in the words of the experts' processors
MEDIA_INPUTS = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values"),
    "point_cloud": ("point_clouds",),
}


def language_model_name(model: PreTrainedModel) -> str:
    """The name of the child that is the language model. Found by identity with `get_decoder()`, since the names
    differ.
    """
    decoder = model.get_decoder()
    names = [name for name, child in model.named_children() if child is decoder]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} has no language model of its own among {[n for n, _ in model.named_children()]}: "
            "it can not be an expert's tower"
        )
    return names[0]


def _without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the expert's config whose language model costs nothing to build: it is removed right after."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    text.vocab_size = 1
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, token, None)
    return config


def build_tower(config: PreTrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The expert's own model class (`AutoModel`) without its language model, randomly initialised.

    Raises ValueError when transformers has no class for `config`, or the class has no language model inside.
    """
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    emptied = _without_layers(config)
    if config.model_type == ComposedConfig.model_type:  # on the Hub each file may have a ComposedConfig of its own
        tower: PreTrainedModel = ComposedModel._from_config(emptied, **kwargs)
    else:
        tower = AutoModel.from_config(emptied, **kwargs)
    name = language_model_name(tower)
    delattr(tower, name)
    tower.register_module(name, None)
    # the tower answers for the expert's real config, not for the emptied one
    tower.config = config
    return tower


def has_media(modality: str, inputs: dict[str, torch.Tensor]) -> bool:
    return any(inputs.get(name) is not None for name in MEDIA_INPUTS[modality])


def tower_features(tower: PreTrainedModel, modality: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Features (tokens of all items, hidden) of one modality, in the order of the placeholders.

    `inputs` are the tensors of the expert's own processor, under its own names. Asked through the class's public
    `get_<modality>_features`; `OWN_FEATURES` holds the classes that have none, or do more.
    """
    own = OWN_FEATURES.get((tower.config.model_type, modality))
    inputs = _in_tower_dtype(tower, inputs)
    if own is not None:
        return own(tower, inputs)
    method = getattr(tower, f"get_{modality}_features", None)
    if method is None:
        raise ValueError(f"{type(tower).__name__} has no get_{modality}_features: it can not encode {modality} media")
    wanted = inspect.signature(method).parameters
    given = {name: value for name, value in inputs.items() if name in wanted}
    if modality == "image" and "pixel_values_images" in inputs and "pixel_values" in wanted:
        given.pop("pixel_values_images", None)
        given["pixel_values"] = inputs["pixel_values_images"]
    return _flat(method(**given, return_dict=True).pooler_output)


def _in_tower_dtype(tower: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dtype, device = tower.dtype, tower.device
    whole = getattr(tower, "full_precision_inputs", ())
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            cast = value.is_floating_point() and name not in whole
            # an offloaded tower's tensors are nowhere yet: its hooks move the inputs
            to = value.device if device.type == "meta" else device
            value = value.to(to, dtype) if cast else value.to(to)
        moved[name] = value
    return moved


def _flat(features: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(items, tokens, hidden), a list of (tokens, hidden), or (tokens, hidden) -> (all tokens, hidden)."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([item.reshape(-1, item.shape[-1]) for item in features])


def _qwen2_audio_features(tower: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What Qwen2AudioModel.forward does before its language model: the class has no `get_audio_features`.

    input_features (audios, mels, frames), feature_attention_mask (audios, frames) -> (tokens of all audios, hidden);
    the encoder halves the frames twice, and frames of padding give no token.
    """
    input_features, frames = inputs["input_features"], inputs["feature_attention_mask"].sum(-1)
    lengths, output_lengths = tower.audio_tower._get_feat_extract_output_lengths(frames)
    longest = (input_features.shape[-1] - 2) // 2 + 1
    heard = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]  # (audios, longest)
    mask = create_bidirectional_mask(
        config=tower.audio_tower.config,
        inputs_embeds=torch.zeros((*heard.shape, 1), dtype=tower.dtype, device=heard.device),
        attention_mask=heard.long(),
    )
    encoded = tower.audio_tower(input_features, attention_mask=mask).last_hidden_state
    features = tower.multi_modal_projector(encoded)  # (audios, tokens, hidden)
    kept = (
        torch.arange(features.shape[1], device=features.device)[None, :] < output_lengths.to(features.device)[:, None]
    )
    return features[kept]


def _granite_speech_features(tower: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """GraniteSpeechModel.forward leaves out the tokens of padded frames itself.

    input_features (audios, frames, mels), input_features_mask (audios, tokens) -> (tokens of all audios, hidden).
    """
    features = tower.get_audio_features(inputs["input_features"], return_dict=True).pooler_output
    mask = inputs.get("input_features_mask")
    return _flat(features if mask is None else features[mask.bool()])


def _video_llama_3_features(tower: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """VideoLlama3Model.forward leaves out the tokens that a frame shares with the one before.

    video_compression_mask (tokens of all videos) -> (tokens kept, hidden).
    """
    names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")
    made = tower.get_video_features(**{name: inputs[name] for name in names}, return_dict=True)
    features, mask = _flat(made.pooler_output), inputs.get("video_compression_mask")
    return features if mask is None else features[mask.bool()]


def _fuyu_features(tower: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """FuyuModel has a linear over patches and no encoder: its features are a last hidden state."""
    return _flat(tower.get_image_features(inputs["pixel_values"], return_dict=True).last_hidden_state)


# (model type, modality) -> features, where they are not what `get_<modality>_features` gives
OWN_FEATURES = {
    ("qwen2_audio", "audio"): _qwen2_audio_features,
    ("granite_speech", "audio"): _granite_speech_features,
    ("granite_speech_plus", "audio"): _granite_speech_features,
    ("video_llama_3", "video"): _video_llama_3_features,
    ("fuyu", "image"): _fuyu_features,
}
