"""The classes of transformers that do not fit as experts, by the rule that says why; configs with few layers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# classes that do not fit -> the rule of merging_mmer/fitness.py that says why, and settings that show it
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("mrope", {}),
    "qwen2_5_vl": ("mrope", {}),
    "qwen3_vl": ("mrope", {}),
    "qwen3_5": ("mrope", {}),
    "qwen2_5_omni_thinker": ("mrope", {}),
    "glm4v": ("mrope", {}),
    "glm46v": ("mrope", {}),
    "glm_ocr": ("mrope", {}),
    "paddleocr_vl": ("mrope", {}),
    "cosmos3_edge": ("mrope", {}),
    "mllama": ("cross-attention", {}),
    "idefics": ("cross-attention", {}),
    "blip": ("cross-attention", {}),
    "aria": ("mixture of experts", {}),
    "llama4": ("mixture of experts", {}),
    "glm4v_moe": ("mixture of experts", {}),
    "ernie4_5_vl_moe": ("mixture of experts", {}),
    "kimi_k25": ("mixture of experts", {}),
    "qwen3_vl_moe": ("mixture of experts", {}),
    "qwen3_5_moe": ("mixture of experts", {}),
    "mistral4": ("mixture of experts", {}),
    "gemma4": ("per-layer embeddings", {}),
    "granite_docling": ("deep features", {}),
    "shieldgemma2": ("classifier", {}),
    "blip-2": ("one class", {}),
    "instructblip": ("one class", {}),
    "kosmos-2": ("one class", {}),
    "git": ("one class", {}),
    "chameleon": ("one class", {"vocabulary_map": {"<image>": 5}}),
    "pi0": ("one class", {}),
    "gemma4_unified": ("attention mask", {}),
    "paligemma": ("attention mask", {}),
    "molmo2": ("attention mask", {}),
    "ovis2": ("other embeddings", {}),
    "voxtral_realtime": ("other embeddings", {}),
    "musicflamingo": ("changed features", {}),
    "florence2": ("encoder-decoder", {}),
    "t5gemma2": ("encoder-decoder", {}),
    "pix2struct": ("encoder-decoder", {}),
    "vision-encoder-decoder": ("encoder-decoder", {}),
    "emu3": ("no bare language model", {"vocabulary_map": {"<image>": 5}}),
    "muse_glimmer": ("no bare language model", {}),
    "lfm2_vl": ("other layers", {"text_config": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}),
    "lfm3_vl": ("other layers", {}),
    "apertus1p5": ("other layers", {}),
    "minicpmv4_6": ("other layers", {}),
}
_LAYERS = ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers", "vision_layers")


def refused_config(kind: str) -> PreTrainedConfig:
    """The class's own default config with few layers; one of each kind stays."""
    settings = REFUSED[kind][1]
    if kind == "vision-encoder-decoder":
        parts = {"encoder": AutoConfig.for_model("vit"), "decoder": AutoConfig.for_model("bert", is_decoder=True)}
        settings = {name: part.to_dict() for name, part in parts.items()}
    made = AutoConfig.for_model(kind, **settings)
    _shrink(made)
    return made


def _shrink(config: PreTrainedConfig):
    for name in _LAYERS:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, min(4, getattr(config, name)))
    for name in ("layer_types", "mlp_layer_types"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and len(kinds) > 4:
            setattr(config, name, (sorted(set(kinds)) * 4)[:4])
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            _shrink(part)
