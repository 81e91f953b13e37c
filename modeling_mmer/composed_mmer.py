"""Experts that transformers has no class for: an encoder and a connector a modality, in front of a language model.

Enters: token ids and, by modality, what the expert's processor makes of its media. In order: encoder -> connector ->
learnt tokens around -> features at the placeholders -> language model -> logits. The classes have the shape of a
stock multimodal model (`ComposedModel` with `get_decoder()` and `get_<modality>_features`,
`ComposedForConditionalGeneration` with a head), so that they are merged, trained and loaded like one.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from configuration_mmer.composed_config_mmer import ComposedConfig

from .beats_mmer import Beats, GatedAttention, PositionConv
from .cache_mmer import CACHE, one_cache
from .head_scales_mmer import scaled_hidden, scaled_logits
from .point_bert_mmer import PointBert
from .qformer_mmer import QFormer

# what the encoders take, by modality, in the words of transformers' processors
MEDIA_ARGUMENTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
    "point_cloud": "point_clouds",
}


class ClipVision(nn.Module):
    """CLIP's own class, asked for the hidden states of one layer, with its class token or without.

    Settings: `config` (of a CLIPVisionModel), `layer` (default -2), `class_token` (default False).
    """

    def __init__(self, settings: dict[str, Any]):
        # imported where it is wanted: most models have no CLIP, and importing it takes longer than building them
        from transformers import CLIPVisionModel

        super().__init__()
        config: Any = CLIPVisionConfig.from_dict(dict(settings["config"]))
        self.layer, self.class_token = settings.get("layer", -2), settings.get("class_token", False)
        self.width = config.hidden_size
        self.tokens = (config.image_size // config.patch_size) ** 2 + int(self.class_token)
        self.vision = CLIPVisionModel(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, tokens, width)."""
        hidden = self.vision(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return hidden if self.class_token else hidden[:, 1:]


def _language_bind_video(settings: dict[str, Any]) -> nn.Module:
    from .language_bind_mmer import LanguageBindVideo  # CLIP again

    return LanguageBindVideo(settings)


ENCODERS: dict[str, Any] = {
    "beats": Beats,
    "clip_vision": ClipVision,
    "language_bind_video": _language_bind_video,
    "point_bert": PointBert,
}


class SoftTokens(nn.Module):
    """Learnt tokens around an item's features (ModelCompose's prefix_tokens and suffix_tokens)."""

    def __init__(self, prefix: int, suffix: int, width: int):
        super().__init__()
        self.prefix, self.suffix = nn.Parameter(torch.zeros(prefix, width)), nn.Parameter(torch.zeros(suffix, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        items = len(features)
        return torch.cat([self.prefix.expand(items, -1, -1), features, self.suffix.expand(items, -1, -1)], 1)


def connector(settings: dict[str, Any]) -> nn.Module:
    """Linear layers from width to width with GELU between them, numbered 0, 2, 4 as in LLaVA and PointLLM; a Q-Former
    where the kind says so.
    """
    if settings.get("kind", "mlp") == "qformer":
        return QFormer(settings)
    widths = settings["widths"]
    layers: list[nn.Module] = []
    for width, following in zip(widths, widths[1:]):
        layers += [nn.Linear(width, following), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class ComposedPreTrainedModel(PreTrainedModel):
    config: ComposedConfig
    config_class = ComposedConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "audio", "point_cloud", "text")
    # places of points that are rounded to half precision would form other groups
    full_precision_inputs = ("point_clouds",)
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SoftTokens):
            init.normal_(module.prefix, std=0.02)
            init.normal_(module.suffix, std=0.02)
        elif isinstance(module, PointBert):
            init.zeros_(module.cls_token)
            init.normal_(module.cls_pos, std=0.02)
        elif isinstance(module, (PositionConv, GatedAttention, QFormer)):
            module.initialise()


class ComposedModel(ComposedPreTrainedModel):
    """Encoders, connectors, soft tokens and the language model, without a head."""

    def __init__(self, config: ComposedConfig):
        super().__init__(config)
        unknown = sorted({settings["kind"] for settings in config.encoders.values()} - set(ENCODERS))
        if unknown:
            raise ValueError(f"encoders: unknown kinds {unknown}, expected some of {sorted(ENCODERS)}")
        self.encoders = nn.ModuleDict({m: ENCODERS[own["kind"]](own) for m, own in config.encoders.items()})
        for modality, own in config.connectors.items():
            width = self.encoders[modality].width
            if own["widths"][0] != width:
                raise ValueError(
                    f"connectors.{modality}.widths: starts at {own['widths'][0]}, its encoder has {width}"
                )
        self.connectors = nn.ModuleDict({m: connector(own) for m, own in config.connectors.items()})
        hidden = config.text_config.hidden_size
        self.soft_tokens = nn.ModuleDict(
            {m: SoftTokens(own["prefix"], own["suffix"], hidden) for m, own in config.soft_tokens.items()}
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _features(self, modality: str, **inputs: torch.Tensor) -> BaseModelOutputWithPooling:
        """pooler_output (items, tokens, hidden), last_hidden_state what the encoder gave."""
        if modality not in self.encoders:
            raise ValueError(f"this expert takes {list(self.encoders)}, found {modality}")
        encoder: Any = self.encoders[modality]
        joined = self.connectors[modality]
        encoded = encoder(**inputs)
        frames = inputs.get("feature_attention_mask")
        heard = None if frames is None else encoder.token_mask(frames)  # (items, tokens)
        if isinstance(joined, QFormer):
            features = joined(encoded, heard)
        elif heard is None or heard.all():
            features = joined(encoded)
        else:
            raise ValueError(
                f"{modality}: the batch holds padding, and this connector makes a feature of each token, padding too; "
                "give media of one length, or one at a time"
            )
        if modality in self.soft_tokens:
            features = self.soft_tokens[modality](features)
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=features)

    def get_image_features(self, pixel_values: torch.Tensor, return_dict: bool = True) -> BaseModelOutputWithPooling:
        """pixel_values (images, 3, height, width) -> pooler_output (images, tokens, hidden)."""
        return self._features("image", pixel_values=pixel_values)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, return_dict: bool = True
    ) -> BaseModelOutputWithPooling:
        """pixel_values_videos (clips, frames, 3, height, width) -> pooler_output (clips, tokens, hidden)."""
        return self._features("video", pixel_values_videos=pixel_values_videos)

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        feature_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """input_features (sounds, frames, mels), mask (sounds, frames) -> pooler_output (sounds, tokens, hidden)."""
        masks = {} if feature_attention_mask is None else {"feature_attention_mask": feature_attention_mask}
        return self._features("audio", input_features=input_features, **masks)

    def get_point_cloud_features(
        self, point_clouds: torch.Tensor, return_dict: bool = True
    ) -> BaseModelOutputWithPooling:
        """point_clouds (clouds, points, 3|6) -> pooler_output (clouds, tokens, hidden)."""
        return self._features("point_cloud", point_clouds=point_clouds)

    def embed(self, input_ids: torch.Tensor, media: dict[str, torch.Tensor]) -> torch.Tensor:
        """(batch, sequence, hidden): the rows of the ids, the features at their placeholders.

        Raises ValueError where placeholders and features differ in number, and for media that this expert cannot take.
        """
        embeds, placeholders = self.get_input_embeddings()(input_ids), self.config.token_ids()
        strangers = [
            name for m, name in MEDIA_ARGUMENTS.items() if media.get(name) is not None and m not in placeholders
        ]
        if strangers:
            raise ValueError(f"this expert takes {sorted(placeholders)}, found {', '.join(strangers)}")
        for modality, token in placeholders.items():
            name = MEDIA_ARGUMENTS[modality]
            if media.get(name) is None:
                if bool((input_ids == token).any()):
                    raise ValueError(f"{modality} tokens stand in the text, but there is no {name}")
                continue
            inputs = {name: media[name]}
            if modality == "audio" and media.get("feature_attention_mask") is not None:
                inputs["feature_attention_mask"] = media["feature_attention_mask"]
            features = getattr(self, f"get_{modality}_features")(**inputs).pooler_output
            features = features.reshape(-1, features.shape[-1]).to(embeds.device, embeds.dtype)
            here = input_ids == token
            if int(here.sum()) != len(features):
                raise ValueError(f"{int(here.sum())} {modality} tokens stand in the text for {len(features)} features")
            embeds = embeds.masked_scatter(here.unsqueeze(-1), features)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if input_ids is not None:
            media = {
                "pixel_values": pixel_values,
                "pixel_values_videos": pixel_values_videos,
                "input_features": input_features,
                "feature_attention_mask": feature_attention_mask,
                "point_clouds": point_clouds,
            }
            inputs_embeds = self.embed(input_ids, {name: given for name, given in media.items() if given is not None})
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: one_cache(cache, past_key_values)},
            **kwargs,
        )


class ComposedForConditionalGeneration(ComposedPreTrainedModel, GenerationMixin):
    """A `ComposedModel` with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: ComposedConfig):
        super().__init__(config)
        self.model = ComposedModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits (batch, kept positions, vocabulary); with `labels` (batch, sequence) also the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            point_clouds=point_clouds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        text = self.config.text_config
        logits = scaled_logits(text, self.lm_head(scaled_hidden(text, outputs.last_hidden_state[:, kept])))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            # their features are in the cache
            for name in (*MEDIA_ARGUMENTS.values(), "feature_attention_mask"):
                inputs.pop(name, None)
        return inputs


__all__ = ["ENCODERS", "ComposedForConditionalGeneration", "ComposedModel"]
