"""Tiny random models: every LLM family, an image and an audio expert, and MMER models around them."""

import torch
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from configuration_mmer import MMERConfig
from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import RoutedWeight

VOCABULARY = 64
IMAGE, AUDIO, END_OF_IMAGE = 64, 65, 66
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    initializer_range=0.3,
)
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, dict(head_dim=8)),
    "mistral": (MistralConfig, {}),
    "gemma2": (Gemma2Config, dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8)),
    "gemma3_text": (Gemma3TextConfig, dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8)),
    "phi3": (Phi3Config, {}),
    "granite": (GraniteConfig, dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5)),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {}),
    "cohere": (CohereConfig, dict(logit_scale=0.25, use_qk_norm=True)),
}


def text_config(family: str = "llama", **changes):
    cls, extra = FAMILIES[family]
    return cls(**{**SIZES, **extra, **changes})


def llava_config(text=None):
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
    )
    return LlavaConfig(
        text_config=text or text_config(), vision_config=vision, image_token_index=IMAGE, image_seq_length=4
    )


def qwen2_audio_config(text=None):
    audio = Qwen2AudioEncoderConfig(
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        initializer_range=0.3,
    )
    return Qwen2AudioConfig(text_config=text or text_config(), audio_config=audio, audio_token_index=AUDIO)


def weights_of(llm) -> tuple[list[str], list[str]]:
    """(modules with a 2-D weight that can be routed, all other tensors) of a stock LLM, by name."""
    modules = dict(llm.named_modules())
    routed, own = [], []
    for name, _ in llm.named_parameters():
        module, _, leaf = name.rpartition(".")
        linear = isinstance(modules[module], torch.nn.Linear | torch.nn.Embedding) and leaf == "weight"
        (routed if linear else own).append(module if linear else name)
    return routed, own


def mmer_config(text=None, delta_modules=None, expert_tensors=None, decoupling=None, **changes) -> MMERConfig:
    from transformers import AutoModel

    text = text or text_config()
    routed, own = weights_of(AutoModel.from_config(text))
    routed = [name for name in routed if name != "embed_tokens"]
    values = dict(
        text_config=text,
        experts={
            "image": {
                "config": llava_config(text).to_dict(),
                "placeholders": {"image": {"token": "<image>", "id": IMAGE}},
            },
            "audio": {
                "config": qwen2_audio_config(text).to_dict(),
                "placeholders": {"audio": {"token": "<|AUDIO|>", "id": AUDIO}},
            },
        },
        delta_modules=routed if delta_modules is None else delta_modules,
        expert_tensors=own if expert_tensors is None else expert_tensors,
        decoupling=decoupling or {"kind": "mask", "scale": "row", "rank": 3},
        added_tokens=[
            {"token": "<image>", "id": IMAGE, "experts": ["image"]},
            {"token": "<|AUDIO|>", "id": AUDIO, "experts": ["audio"]},
            {"token": "</image>", "id": END_OF_IMAGE, "experts": ["image"]},
        ],
    )
    return MMERConfig(**{**values, **changes})


def mmer_model(config: MMERConfig | None = None, seed: int = 0) -> MMERForConditionalGeneration:
    """A model whose routes all differ: random deltas, masks, scales, corrections and per-expert tensors."""
    torch.manual_seed(seed)
    model = MMERForConditionalGeneration(config or mmer_config()).eval()
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(like):
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RoutedWeight) and module.delta is not None:
                module.delta.copy_(0.3 * noise(module.delta))
                if module.masks is not None:
                    module.masks.copy_(torch.randint(0, 256, module.masks.shape, generator=generator))
                if module.scales is not None:
                    module.scales.copy_(1 + 0.2 * noise(module.scales))
                if module.correction_a is not None:
                    module.correction_a.copy_(0.2 * noise(module.correction_a))
                    module.correction_b.copy_(0.2 * noise(module.correction_b))
            for name, parameter in module._parameters.items():
                if name.startswith(("expert_", "merged_")):
                    stock = getattr(module, name.partition("_")[2])
                    parameter.copy_(stock + 0.3 * noise(parameter))
    return model


def media(images: int = 0, audios: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Media tensors as the experts' processors make them: 4 tokens an image, 5 an audio."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    if images:
        tensors["image.pixel_values"] = torch.randn((images, 3, 16, 16), generator=generator)
    if audios:
        tensors["audio.input_features"] = torch.randn((audios, 8, 20), generator=generator)
        tensors["audio.feature_attention_mask"] = torch.ones((audios, 20), dtype=torch.long)
    return tensors
