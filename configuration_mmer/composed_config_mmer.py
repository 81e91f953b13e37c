"""ComposedConfig: an expert that transformers has no class for.

Holds the language model's own config, and by modality an encoder, a connector and learnt tokens around the features.
It has the shape of a stock multimodal config, so what works for Llava works for it. Invariant: a config that is built
is consistent; one that is not names the field.
"""

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .routes_mmer import MODALITIES

CONNECTORS = ("mlp", "qformer")


class ComposedConfig(PreTrainedConfig):
    r"""
    Args:
        text_config: the language model's own config.
        encoders: modality -> {"kind": str, …}, the settings of the encoder; the kinds are those of `ENCODERS` in
            composed_mmer.py.
        connectors: modality -> {"widths": [in, …, out]}: linear layers with GELU between them, from the encoder's
            width to the language model's; or {"kind": "qformer", "widths": [in, out], …}: a Q-Former, whose settings
            are those of `DEFAULTS` in qformer_mmer.py.
        soft_tokens: modality -> {"prefix": int, "suffix": int}: learnt tokens before and after an item's features
            (ModelCompose has 5 and 5).
        image_token_id, video_token_id, audio_token_id, point_cloud_token_id: the id at which features stand.

    Raises:
        ValueError: for an unknown modality, or one that lacks its encoder, connector or token id.
    """

    model_type = "mmer_composed"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    connectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    soft_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    point_cloud_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        for name in ("encoders", "connectors", "soft_tokens"):
            strangers = sorted(set(getattr(self, name)) - set(MODALITIES))
            if strangers:
                raise ValueError(f"{name}: found {strangers}, expected some of {list(MODALITIES)}")
        if set(self.connectors) != set(self.encoders) or set(self.soft_tokens) - set(self.encoders):
            raise ValueError(
                f"encoders are {sorted(self.encoders)}, connectors {sorted(self.connectors)}, soft_tokens "
                f"{sorted(self.soft_tokens)}: each encoder needs its connector, and soft tokens their encoder"
            )
        for modality, settings in self.encoders.items():
            if "kind" not in settings:
                raise ValueError(f"encoders.{modality}: no kind, found {sorted(settings)}")
            kind, widths = self.connectors[modality].get("kind", "mlp"), self.connectors[modality].get("widths", [])
            if kind not in CONNECTORS:
                raise ValueError(f"connectors.{modality}.kind: found {kind!r}, expected one of {list(CONNECTORS)}")
            if kind == "qformer" and len(widths) != 2:
                raise ValueError(
                    f"connectors.{modality}.widths: found {widths}, expected two numbers for a Q-Former, the "
                    "encoder's width and the language model's"
                )
            if len(widths) < 2 or widths[-1] != self.text_config.hidden_size:
                raise ValueError(
                    f"connectors.{modality}.widths: found {widths}, expected at least two numbers, the last one "
                    f"{self.text_config.hidden_size}, the language model's width"
                )

    def token_ids(self) -> dict[str, int]:
        """Modality -> the id at which its features stand. Raises ValueError where an encoder has none."""
        ids = {modality: getattr(self, f"{modality}_token_id") for modality in self.encoders}
        homeless = sorted(modality for modality, token in ids.items() if token is None)
        if homeless:
            raise ValueError(f"{', '.join(f'{m}_token_id' for m in homeless)}: not set, but there is an encoder")
        return ids


__all__ = ["ComposedConfig"]
