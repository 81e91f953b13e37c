"""Every class of transformers that fits as an expert, tiny and random, with media as its processor makes them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from merging_mmer.naming import class_on_meta

ROWS, IMAGE, VIDEO, AUDIO = 96, 90, 91, 92
PLACEHOLDERS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
SIZES = dict(
    vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": {},
    "granite": dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "cohere": dict(logit_scale=0.25, use_qk_norm=True, tie_word_embeddings=True),
    "cohere2": dict(logit_scale=0.25, head_dim=8, sliding_window=8, tie_word_embeddings=True),
    "exaone4": dict(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "hyperclovax": dict(logits_scaling=0.5, embedding_multiplier=2.0),
    "gemma3_text": dict(
        head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "persimmon": dict(partial_rotary_factor=0.5),
}
_PATCHES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
)
_VISION = dict(_PATCHES, image_size=16, patch_size=8)
_CLIP = dict(_VISION, model_type="clip_vision_model", projection_dim=16)
_SIGLIP = dict(_VISION, model_type="siglip_vision_model")
_PIXTRAL = dict(_PATCHES, model_type="pixtral", image_size=32, patch_size=4, head_dim=8)
_WHISPER = dict(_PATCHES, num_mel_bins=8, max_source_positions=10)
_SAM = dict(
    hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
    mlp_dim=24, window_size=2, global_attn_indexes=[1], initializer_range=0.3,
)  # fmt: skip
_QWEN_VISION = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2, window_size=16,
    temporal_patch_size=2, fullatt_block_indexes=[1], out_hidden_size=32, initializer_range=0.3,
)  # fmt: skip
_CONFORMER = dict(
    input_dim=8, num_layers=2, hidden_dim=16, feedforward_mult=2, num_heads=2, dim_head=8, output_dim=6,
    context_size=6, max_pos_emb=8, conv_kernel_size=3,
)  # fmt: skip
_QFORMER = dict(
    _PATCHES, model_type="blip_2_qformer", vocab_size=8, encoder_hidden_size=16, cross_attention_frequency=1
)
_INTERN = dict(_PATCHES, image_size=[16, 16], patch_size=[4, 4])

Media = dict[str, dict[str, torch.Tensor]]


@dataclass
class Stock:
    """`settings`: of the class's config, beside the language model's. `media`: modality -> its tensors. `head`: what
    the class's own logits must be multiplied by to be those of its language model's own class, which scales them."""

    llm: str
    settings: dict[str, Any]
    media: Callable[[], Media]
    head: float = 1.0


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _image(*shape: int, **more: Any) -> Callable[[], Media]:
    return lambda: {"image": {"pixel_values": _pixels(*shape), **more}}


def _lengths(rows: int, columns: int, kept: list[int]) -> torch.Tensor:
    return (torch.arange(columns)[None] < torch.tensor(kept)[:rows, None]).long()


def _sound(*shape: int, mask: str = "input_features_mask", kept: list[int] | None = None) -> Callable[[], Media]:
    columns = shape[-1]
    return lambda: {
        "audio": {
            "input_features": _pixels(*shape),
            **({mask: _lengths(shape[0], columns, kept)} if kept is not None else {}),
        }
    }


_SIZES = torch.tensor([[16, 30], [32, 16]])
_SMALL = torch.tensor([[16, 8], [8, 16]])
_GRIDS = dict(image_grid_pinpoints=[[16, 32], [32, 16]])
_INDEX = dict(image_token_index=IMAGE)
_BOTH = dict(image_token_index=IMAGE, video_token_index=VIDEO)
_ID = dict(image_token_id=IMAGE)
_THW = torch.tensor([[1, 4, 4], [1, 2, 4]])


def _anyres() -> Media:
    return {"image": dict(pixel_values=_pixels(2, 3, 3, 16, 16), image_sizes=_SIZES)}


def _qwen_patches() -> Media:
    return {
        "image": dict(pixel_values=_pixels(24, 3 * 2 * 16), image_grid_thw=_THW),
        "video": dict(pixel_values_videos=_pixels(16, 3 * 2 * 16), video_grid_thw=torch.tensor([[2, 2, 4]])),
    }


def _packed_patches() -> Media:
    kept = torch.ones(4, dtype=torch.bool)
    kept[2] = False
    return {
        "image": dict(
            pixel_values=_pixels(24, 48), image_grid_thw=_THW, image_merge_sizes=torch.tensor([1, 2]),
        ),
        "video": dict(
            pixel_values_videos=_pixels(16, 48), video_grid_thw=torch.tensor([[2, 2, 4]]),
            video_merge_sizes=torch.tensor([2]), video_compression_mask=kept,
        ),
    }  # fmt: skip


STOCK: dict[str, Stock] = {
    "llava": Stock("llama", dict(vision_config=_CLIP, **_INDEX), _image(2, 3, 16, 16)),
    "llava_next": Stock("mistral", dict(vision_config=_CLIP, **_GRIDS, **_INDEX), _anyres),
    "llava_next_video": Stock(
        "llama",
        dict(vision_config=_CLIP, **_GRIDS, **_BOTH),
        lambda: {**_anyres(), "video": dict(pixel_values_videos=_pixels(2, 3, 3, 16, 16))},
    ),
    "llava_onevision": Stock(
        "qwen2",
        dict(vision_config=_SIGLIP, **_GRIDS, **_BOTH),
        lambda: {**_anyres(), "video": dict(pixel_values_videos=_pixels(2, 3, 3, 16, 16))},
    ),
    "video_llava": Stock(
        "llama",
        dict(vision_config=_CLIP, **_BOTH),
        lambda: {
            "image": dict(pixel_values_images=_pixels(2, 3, 16, 16)),
            "video": dict(pixel_values_videos=_pixels(2, 8, 3, 16, 16)),
        },
    ),
    "vipllava": Stock(
        "llama", dict(vision_config=_CLIP, vision_feature_layer=[-1, -2, 1], **_INDEX), _image(2, 3, 16, 16)
    ),
    "idefics2": Stock(
        "mistral",
        dict(
            vision_config=_VISION,
            perceiver_config=dict(
                resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8,
                num_key_value_heads=1, hidden_size=32,
            ),
            **_ID,
        ),
        _image(1, 2, 3, 16, 16),
    ),
    "idefics3": Stock("llama", dict(vision_config=dict(_VISION, patch_size=4), **_ID), _image(1, 2, 3, 16, 16)),
    "smolvlm": Stock("llama", dict(vision_config=dict(_VISION, patch_size=4), **_ID), _image(1, 2, 3, 16, 16)),
    "mistral3": Stock(
        "mistral",
        dict(vision_config=_PIXTRAL, **_INDEX),
        _image(2, 3, 16, 16, image_sizes=_SMALL),
    ),
    "lighton_ocr": Stock(
        "qwen3", dict(vision_config=_PIXTRAL, **_ID), _image(2, 3, 16, 16, image_sizes=_SMALL)
    ),
    "internvl": Stock("qwen2", dict(vision_config=_INTERN, **_ID), _image(2, 3, 16, 16)),
    "qianfan_ocr": Stock("qwen3", dict(vision_config=_INTERN, **_ID), _image(2, 3, 16, 16)),
    "got_ocr2": Stock("qwen2", dict(vision_config=_SAM, **_INDEX), _image(2, 3, 32, 32)),
    "deepseek_vl": Stock("llama", dict(vision_config=_SIGLIP, **_ID), _image(2, 3, 16, 16)),
    "deepseek_vl_hybrid": Stock(
        "llama",
        dict(vision_config=dict(_SIGLIP, patch_size=4), high_res_vision_config=_SAM, **_ID),
        _image(2, 3, 16, 16, high_res_pixel_values=torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)),
    ),
    "janus": Stock(
        "llama",
        dict(
            vision_config=dict(_VISION, projection_dim=32, mlp_ratio=1.5),
            vq_config=dict(
                embed_dim=4, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
                num_res_blocks=1, num_patches=2, projection_dim=32, image_token_embed_dim=32,
            ),
            **_ID,
        ),
        _image(2, 3, 16, 16),
    ),
    "aya_vision": Stock("cohere", dict(vision_config=_SIGLIP, **_INDEX), _image(2, 3, 16, 16), head=0.25),
    "cohere2_vision": Stock(
        "cohere2",
        dict(vision_config=_SIGLIP, alignment_intermediate_size=32, **_ID),
        _image(2, 3, 16, 16),
        head=0.25,
    ),
    "exaone4_5": Stock(
        "exaone4",
        dict(vision_config=dict(_QWEN_VISION, num_key_value_heads=1), image_token_id=IMAGE, video_token_id=VIDEO),
        _qwen_patches,
    ),
    "hyperclovax_vision_v2": Stock(
        "hyperclovax",
        dict(
            vision_config=dict(_QWEN_VISION, model_type="qwen2_5_vl_vision"),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        _qwen_patches,
    ),
    "video_llama_3": Stock(
        "qwen2",
        dict(vision_config=dict(_PATCHES, patch_size=4), image_token_id=IMAGE, video_token_id=VIDEO),
        _packed_patches,
    ),
    # a picture of 16 tokens, twice as long as the sliding window
    "gemma3": Stock(
        "gemma3_text",
        dict(vision_config=dict(_SIGLIP, patch_size=4), mm_tokens_per_image=16, image_token_index=IMAGE),
        _image(2, 3, 16, 16),
    ),
    "fuyu": Stock("persimmon", dict(image_size=8, patch_size=4, **_ID), _image(2, 4, 48)),
    "qwen2_audio": Stock(
        "qwen2",
        dict(
            audio_config=dict(
                model_type="qwen2_audio_encoder", d_model=16, encoder_layers=1, encoder_attention_heads=2,
                encoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
            ),
            audio_token_index=AUDIO,
        ),
        _sound(1, 8, 20, mask="feature_attention_mask", kept=[12]),
    ),
    "audioflamingo3": Stock(
        "qwen2", dict(audio_config=_WHISPER, audio_token_id=AUDIO), _sound(2, 8, 20, kept=[20, 12])
    ),
    "voxtral": Stock(
        "llama",
        dict(audio_config=dict(_WHISPER, intermediate_size=32), audio_token_id=AUDIO, hidden_size=32),
        _sound(2, 8, 20),
    ),
    "granite_speech": Stock(
        "granite",
        dict(
            encoder_config=_CONFORMER, projector_config=_QFORMER, downsample_rate=2, window_size=4,
            audio_token_index=AUDIO, has_lora_adapter=False,
        ),
        lambda: {"audio": dict(input_features=_pixels(2, 10, 8), input_features_mask=_lengths(2, 6, [6, 3]).bool())},
        head=0.25,
    ),
    "granite_speech_plus": Stock(
        "granite",
        dict(
            encoder_config=_CONFORMER, projector_config=_QFORMER, downsample_rate=2, window_size=4,
            audio_token_index=AUDIO, has_lora_adapter=False,
        ),
        lambda: {"audio": dict(input_features=_pixels(2, 10, 8), input_features_mask=_lengths(2, 6, [6, 3]).bool())},
        head=0.25,
    ),
    "glmasr": Stock(
        "llama",
        dict(
            audio_config=dict(_WHISPER, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=10),
            audio_token_id=AUDIO,
        ),
        _sound(2, 8, 32, kept=[32, 20]),
    ),
    "qwen3_asr": Stock(
        "qwen3",
        dict(
            audio_config=dict(
                num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, d_model=16,
                n_window=50, n_window_infer=100, output_dim=32, downsample_hidden_size=4, max_position_embeddings=13,
            ),
            audio_token_id=AUDIO,
        ),
        _sound(2, 8, 200, kept=[200, 120]),
    ),
    "fun_asr_nano": Stock(
        "qwen3",
        dict(
            audio_config=dict(
                _PATCHES, num_mel_bins=4, num_stacked_frames=2, num_timestamp_prediction_layers=1, fsmn_kernel_size=3,
                max_position_embeddings=33,
            ),
            adaptor_config=dict(
                hidden_size=32, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1,
                projector_hidden_size=24,
            ),
            audio_token_id=AUDIO,
        ),
        lambda: {"audio": dict(input_features=_pixels(2, 6, 8), input_features_mask=_lengths(2, 6, [6, 4]))},
    ),
    "moss_transcribe_diarize": Stock(
        "qwen3",
        dict(audio_config=_WHISPER, audio_merge_size=2, audio_token_id=AUDIO),
        lambda: {
            "audio": dict(
                input_features=_pixels(2, 8, 20), input_features_mask=_lengths(2, 20, [20, 12]),
                padding_mask=_lengths(2, 20, [20, 12]),
            )
        },
    ),
    "omniasr": Stock(
        "llama",
        dict(
            audio_config=dict(
                _PATCHES, conv_dim=[8, 8], conv_kernel=[4, 2], conv_stride=[4, 2], num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2, layerdrop=0.0,
            ),
            initializer_range=0.3,
            audio_token_id=AUDIO,
        ),
        lambda: {"audio": dict(input_values=_pixels(2, 1, 64), padding_mask=_lengths(2, 64, [64, 40]))},
    ),
    "vibevoice_asr": Stock(
        "qwen2",
        dict(
            acoustic_tokenizer_encoder_config=dict(
                hidden_size=8, num_filters=4, downsampling_ratios=[2, 2], depths=[1, 1, 1], kernel_size=3
            ),
            semantic_tokenizer_encoder_config=dict(
                hidden_size=8, num_filters=4, downsampling_ratios=[2, 2], depths=[1, 1, 1], kernel_size=3
            ),
            acoustic_tokenizer_chunk_size=32, audio_token_id=AUDIO,
        ),
        lambda: {"audio": dict(input_values=_pixels(2, 1, 64), padding_mask=_lengths(2, 64, [64, 40]).bool())},
    ),
}  # fmt: skip


def text(family: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})


def config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The config of an expert of class `kind`."""
    stock = STOCK[kind]
    llm = text(stock.llm, **changes)
    made = dict(stock.settings, text_config=llm.to_dict(), tie_word_embeddings=llm.tie_word_embeddings)
    return AutoConfig.for_model(kind, **made)


def base_model(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(text(STOCK[kind].llm)).eval()


@torch.no_grad()
def expert_model(kind: str, base: PreTrainedModel, seed: int = 1, noise: float = 0.02) -> PreTrainedModel:
    """A model of class `kind` whose language model is the base's plus noise."""
    torch.manual_seed(seed)
    wanted = config(kind)
    model = type(class_on_meta(wanted, multimodal=True))(wanted).eval()
    for name, parameter in model.named_parameters():
        if not parameter.any():  # projectors and biases that start at zero would hide what stands behind them
            parameter.normal_(std=0.3)
    own = model.get_decoder().state_dict()
    for name, theta_0 in base.model.state_dict().items():
        own[name].copy_(theta_0 + noise * torch.randn_like(theta_0))
    if not base.config.tie_word_embeddings:
        head, theta_0 = model.get_output_embeddings().weight, base.get_output_embeddings().weight
        head.copy_(theta_0 + noise * torch.randn_like(theta_0))
    return model


def media(kind: str, seed: int = 3) -> Media:
    torch.manual_seed(seed)
    return STOCK[kind].media()


def token_types(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the class's processor makes besides, where the class takes it (Gemma 3): 1 at a picture's tokens."""
    if "token_type_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"token_type_ids": (ids == IMAGE).long()}
