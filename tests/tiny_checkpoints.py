"""Tiny checkpoints on disk: a base LLM, multimodal experts tuned from it, old and new tensor names."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2Config,
    SmolVLMConfig,
    VideoLlavaConfig,
)

from configuration_mmer.composed_config_mmer import ComposedConfig
from merging_mmer.naming import class_on_meta

ROWS = 96
SIZES = dict(
    vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
_CLIP = dict(_VISION, model_type="clip_vision_model")
_SIGLIP = dict(_VISION, model_type="siglip_vision_model")
_AUDIO = dict(
    model_type="qwen2_audio_encoder", d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
    num_mel_bins=8, max_source_positions=10,
)  # fmt: skip
_POINTS = dict(kind="point_bert", point_dims=6, groups=4, group_size=3, group_width=8, width=8, depth=1, heads=2)


def text(kind: str = "llama", rows: int = ROWS, **changes):
    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return cls(**{**SIZES, "vocab_size": rows, **changes})


def config(kind: str, llm):
    """The config of an expert class; its placeholder ids lie behind the base's rows."""
    first, second = ROWS, ROWS + 1
    return {
        "llava": lambda: LlavaConfig(
            text_config=llm, vision_config=_CLIP, image_token_index=first, image_seq_length=4
        ),
        "llava_onevision": lambda: LlavaOnevisionConfig(
            text_config=llm, vision_config=_SIGLIP, image_token_index=first, video_token_index=second
        ),
        "video_llava": lambda: VideoLlavaConfig(
            text_config=llm, vision_config=_CLIP, image_token_index=first, video_token_index=second
        ),
        "points": lambda: ComposedConfig(
            text_config=llm, encoders={"point_cloud": _POINTS}, point_cloud_token_id=first,
            connectors={"point_cloud": {"widths": [_POINTS["width"], 24, llm.hidden_size]}},
        ),
        "qwen2_audio": lambda: Qwen2AudioConfig(text_config=llm, audio_config=_AUDIO, audio_token_index=first),
        "smolvlm": lambda: SmolVLMConfig(
            text_config=llm, vision_config=_VISION, image_token_id=first, scale_factor=2,
            tie_word_embeddings=llm.tie_word_embeddings,
        ),
    }[kind]()  # fmt: skip


def base_model(kind: str = "llama", seed: int = 0, dtype=torch.float32, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(text(kind, **changes)).to(dtype)


def llm_of(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_decoder()


@torch.no_grad()
def expert_model(
    kind: str,
    base: PreTrainedModel,
    seed: int = 1,
    noise: float = 0.02,
    extra_rows: int = 2,
    norms: bool = True,
    **changes,
) -> PreTrainedModel:
    """A model of class `kind` whose LLM is the base's plus noise, with `extra_rows` rows behind the vocabulary."""
    torch.manual_seed(seed)
    llm = base.config.__class__(
        **{**base.config.to_dict(), "vocab_size": base.config.vocab_size + extra_rows, **changes}
    )
    wanted = config(kind, llm)
    model = type(class_on_meta(wanted, multimodal=True))(wanted).to(next(base.parameters()).dtype)
    own = {**llm_of(model).state_dict(), "lm_head.weight": model.get_output_embeddings().weight}
    for name, theta_0 in {**llm_of(base).state_dict(), "lm_head.weight": base.get_output_embeddings().weight}.items():
        if name == "lm_head.weight" and base.config.tie_word_embeddings:
            continue
        change = noise * torch.randn_like(theta_0.float()) * (theta_0.ndim > 1 or norms)
        rows = min(len(theta_0), len(own[name]))  # an expert may have dropped rows of padding
        own[name][:rows] = (theta_0.float() + change).to(theta_0.dtype)[:rows]
    if llm.tie_word_embeddings:  # Qwen2Audio ties only if asked to by hand
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return model


def save(model: PreTrainedModel, folder: Path, names: str = "old", **kwargs) -> Path:
    """`old`: what save_pretrained writes for these classes; `new`: the names of the class today."""
    model.save_pretrained(folder, **kwargs)
    if names == "new":
        for path in folder.glob("model*"):
            path.unlink()
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors, read without any code of ours."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
