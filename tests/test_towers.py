"""Towers: the features are bit-equal to those the original expert's language model received."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from modeling_mmer.towers_mmer import build_tower, language_model_name, tower_features
from tests.tiny_models import qwen2_audio_config, text_config

IMAGE, VIDEO, AUDIO = 60, 61, 65
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
)


def text():
    # wide enough for the audio class's placeholder
    return text_config("llama", vocab_size=70)


def llava():
    config = LlavaConfig(text_config=text(), vision_config=CLIPVisionConfig(**VISION), image_token_index=IMAGE)
    return LlavaForConditionalGeneration, config, {"image": dict(pixel_values=torch.randn(2, 3, 16, 16))}


def llava_next():
    config = LlavaNextConfig(
        text_config=text(), vision_config=CLIPVisionConfig(**VISION), image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip
    sizes = torch.tensor([[16, 30], [32, 16]])
    return (
        LlavaNextForConditionalGeneration,
        config,
        {"image": dict(pixel_values=torch.randn(2, 3, 3, 16, 16), image_sizes=sizes)},
    )


def llava_onevision():
    config = LlavaOnevisionConfig(
        text_config=text(), vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_layer=-1,
    )  # fmt: skip
    sizes = torch.tensor([[16, 30], [32, 16]])
    media = {
        "image": dict(pixel_values=torch.randn(2, 3, 3, 16, 16), image_sizes=sizes),
        "video": dict(pixel_values_videos=torch.randn(2, 3, 3, 16, 16)),
    }
    return LlavaOnevisionForConditionalGeneration, config, media


def video_llava():
    vision = CLIPVisionConfig(**VISION)
    config = VideoLlavaConfig(
        text_config=text(), vision_config=vision, image_token_index=IMAGE, video_token_index=VIDEO,
        image_seq_length=4, video_seq_length=40,
    )  # fmt: skip
    media = {
        "image": dict(pixel_values_images=torch.randn(2, 3, 16, 16)),
        "video": dict(pixel_values_videos=torch.randn(2, 8, 3, 16, 16)),
    }
    return VideoLlavaForConditionalGeneration, config, media


def qwen2_audio():
    mask = torch.ones((2, 20), dtype=torch.long)
    mask[1, 12:] = 0
    media = {"audio": dict(input_features=torch.randn(2, 8, 20), feature_attention_mask=mask)}
    return Qwen2AudioForConditionalGeneration, qwen2_audio_config(text()), media


def smolvlm():
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = SmolVLMConfig(
        text_config=text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=3
    )
    return SmolVLMForConditionalGeneration, config, {"image": dict(pixel_values=torch.randn(2, 1, 3, 16, 16))}


PLACEHOLDERS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
CASES = [
    (make, modality)
    for make in (llava, llava_next, llava_onevision, video_llava, qwen2_audio, smolvlm)
    for modality in make()[2]
]


def tower_of(model):
    """The tower with the weights of the original expert."""
    tower = build_tower(model.config).eval()
    own = model.model if hasattr(model, "model") else model
    prefix = f"{language_model_name(own)}."
    state = {name: value for name, value in own.state_dict().items() if not name.startswith(prefix)}
    tower.load_state_dict(state, strict=True)
    return tower.to(model.dtype)


@pytest.mark.parametrize(("make", "modality"), CASES, ids=[f"{make.__name__}-{modality}" for make, modality in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_what_the_original_language_model_receives(make, modality, dtype):
    cls, config, media = make()
    model = cls(config).eval().to(dtype)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in media[modality].items()}
    with torch.no_grad():
        got = tower_features(tower_of(model), modality, inputs)
    received = {}
    language_model = model.get_decoder()
    language_model.register_forward_pre_hook(
        lambda module, args, kwargs: received.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    ids = torch.tensor([[10, *[PLACEHOLDERS[modality]] * got.shape[0], 11]])
    if modality == "audio":  # one row an audio: this class takes the number of audios for the number of samples
        counts = [5, 3]
        assert sum(counts) == got.shape[0]
        ids = torch.tensor([[AUDIO] * count + [11] * (6 - count) for count in counts])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    want = received["embeds"][ids == PLACEHOLDERS[modality]]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "make", [llava, llava_onevision, video_llava, qwen2_audio, smolvlm], ids=lambda make: make.__name__
)
def test_a_tower_holds_no_language_model_and_keeps_the_experts_config(make):
    _, config, _ = make()
    before = copy.deepcopy(config.to_dict())
    tower = build_tower(config)
    assert tower.config.to_dict() == before
    assert not any(name.startswith(("language_model", "text_model", "lm_head")) for name in tower.state_dict())
    assert not any(config.text_config.vocab_size in parameter.shape for parameter in tower.parameters())


def test_a_model_without_a_language_model_inside_is_refused():
    with pytest.raises(ValueError, match="no language model of its own"):
        language_model_name(AutoModelForCausalLM.from_config(text()).model)


def test_a_modality_the_class_does_not_know_is_refused():
    cls, config, _ = llava()
    with pytest.raises(ValueError, match="LlavaModel has no get_audio_features"):
        tower_features(build_tower(config), "audio", dict(input_features=torch.zeros(1, 8, 20)))


def test_configs_survive_json():
    config = llava()[1]
    values = config.to_dict()
    assert AutoConfig.for_model(values.pop("model_type"), **values).to_dict() == config.to_dict()
