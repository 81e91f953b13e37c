"""Tower folders: in go base, encoder and connector, out comes a whole checkpoint of a stock transformers class.

`write_tower("image", …)` gives a `LlavaForConditionalGeneration` (56 px, 16 tokens: DINOv2's hidden state 10 without
CLS), "audio" a `Qwen2AudioForConditionalGeneration` (1 s of 16 kHz, up to 25 tokens). All tensors are bf16. The base's
49152 embedding rows are there bit for bit; the rows of added tokens follow them, taken from the connector.

A connector is a dict of tensors: `multi_modal_projector.*` as the class names them, and `added_embeddings`
(added tokens, hidden). `new_connector` draws an untrained one from a seed.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from .cache import LabError

State = dict[str, torch.Tensor]

IMAGE_SIZE = 56
VISION_LAYER = 10  # the package's DINOv2 was tuned for saliency: its last layers are the weaker features
AUDIO_SECONDS = 1
FRAMES_PER_POSITION = 2  # Whisper's second convolution has stride 2


@dataclass(frozen=True)
class Layout:
    """What the two kinds of tower differ in."""

    model: type[PreTrainedModel]
    encoder: str  # the attribute of the model's inner class
    media: str  # the placeholder and its frame, in the chat template
    media_type: str  # the `type` of a content item
    added_tokens: tuple[str, ...]


LAYOUTS = {
    "image": Layout(LlavaForConditionalGeneration, "vision_tower", "<image>", "image", ("<image>",)),
    "audio": Layout(
        Qwen2AudioForConditionalGeneration,
        "audio_tower",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
        "audio",
        ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    ),
}

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'MEDIA_TYPE' %}{{ 'MEDIA_BLOCK\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(layout: Layout) -> str:
    """The base's ChatML with the media block, then a newline, where a message has a content item of its type."""
    return CHAT_TEMPLATE.replace("MEDIA_TYPE", layout.media_type).replace("MEDIA_BLOCK", layout.media)


def base_with_rows(base: Path, added: torch.Tensor) -> tuple[PreTrainedConfig, State]:
    """Config and `LlamaForCausalLM` tensors of the base with `added` rows after its vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    rows = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat([rows, added.to(rows.dtype)])
    config = copy.deepcopy(model.config)
    config.vocab_size = len(state["model.embed_tokens.weight"])
    return config, state


def expert_tokenizer(base: Path, layout: Layout) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.add_tokens(list(layout.added_tokens), special_tokens=True)
    return tokenizer


def new_connector(name: str, base: Path, encoder: Path, seed: int) -> State:
    """Untrained: small random projections, and added rows near the mean row of the base's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    hidden = AutoConfig.from_pretrained(base).hidden_size
    rows = base_with_rows(base, torch.empty(0, hidden))[1]["model.embed_tokens.weight"].float()
    width = AutoConfig.from_pretrained(encoder).hidden_size

    def matrix(out_features: int, in_features: int) -> torch.Tensor:
        return torch.randn(out_features, in_features, generator=generator) * in_features**-0.5

    noise = torch.randn(len(LAYOUTS[name].added_tokens), hidden, generator=generator)
    connector = {"added_embeddings": rows.mean(0) + 0.5 * rows.std(0) * noise}
    if name == "image":
        shapes = {"linear_1": (hidden, width), "linear_2": (hidden, hidden)}
    else:
        shapes = {"linear": (hidden, width)}
    for linear, (out_features, in_features) in shapes.items():
        connector[f"multi_modal_projector.{linear}.weight"] = matrix(out_features, in_features)
        connector[f"multi_modal_projector.{linear}.bias"] = torch.zeros(out_features)
    return connector


def image_config(text_config: PreTrainedConfig, encoder: Path, media_id: int) -> LlavaConfig:
    values = AutoConfig.from_pretrained(encoder).to_dict()
    for backbone_only in ("out_features", "out_indices", "stage_names"):
        values.pop(backbone_only, None)
    values["num_hidden_layers"] = VISION_LAYER  # later layers would be computed and not used
    vision_config = Dinov2Config(**values)
    side = IMAGE_SIZE // int(values["patch_size"])
    return LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=media_id,
        image_seq_length=side * side,
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def image_processor(tokenizer: PreTrainedTokenizerBase, layout: Layout, patch_size: int) -> LlavaProcessor:
    pixels = BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(layout),
    )


def audio_config(text_config: PreTrainedConfig, encoder: Path, media_id: int) -> Qwen2AudioConfig:
    config = AutoConfig.from_pretrained(encoder)
    config.max_source_positions = 100 * AUDIO_SECONDS // FRAMES_PER_POSITION  # 10 ms a frame
    return Qwen2AudioConfig(text_config=text_config, audio_config=config, audio_token_index=media_id)


def audio_processor(tokenizer: PreTrainedTokenizerBase, layout: Layout, mel_bins: int) -> Qwen2AudioProcessor:
    mel = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=AUDIO_SECONDS, return_attention_mask=True)
    return Qwen2AudioProcessor(feature_extractor=mel, tokenizer=tokenizer, chat_template=chat_template(layout))


def write_tower(name: str, base: Path, encoder: Path, connector: State, folder: Path) -> None:
    """The checkpoint and its processor in `folder`, for `name` in LAYOUTS."""
    layout = LAYOUTS[name]
    text_config, language = base_with_rows(base, connector["added_embeddings"])
    tokenizer = expert_tokenizer(base, layout)
    media_id = tokenizer.get_vocab()[layout.added_tokens[0]]
    features: State = AutoModel.from_pretrained(encoder, dtype=torch.bfloat16).state_dict()
    config: Any
    processor: ProcessorMixin
    if name == "image":
        config = image_config(text_config, encoder, media_id)
        processor = image_processor(tokenizer, layout, config.vision_config.patch_size)
        features = {key: value for key, value in features.items() if layer_of(key) < VISION_LAYER}
    else:
        config = audio_config(text_config, encoder, media_id)
        processor = audio_processor(tokenizer, layout, config.audio_config.num_mel_bins)
        positions = features["embed_positions.weight"]
        features["embed_positions.weight"] = positions[: config.audio_config.max_source_positions].clone()
    state = {f"model.{layout.encoder}.{key}": value for key, value in features.items()}
    for key, value in connector.items():
        if key != "added_embeddings":
            state[f"model.{key}"] = value.to(torch.bfloat16)
    for key, value in language.items():
        state[f"model.language_model.{key.removeprefix('model.')}"] = value
    if name == "audio":  # Qwen2-Audio declares no tied weights: its head has a tensor of its own
        state["lm_head.weight"] = language["model.embed_tokens.weight"].clone()
    config.architectures = [layout.model.__name__]
    config.dtype = torch.bfloat16
    check_names(layout.model, config, state)
    config.save_pretrained(folder)
    save_file({key: state[key].contiguous() for key in sorted(state)}, folder / "model.safetensors", {"format": "pt"})
    GenerationConfig.from_pretrained(base).save_pretrained(folder)
    processor.save_pretrained(folder)


def layer_of(key: str) -> int:
    """The layer a parameter's name belongs to, 0 for those outside the layers."""
    found = re.search(r"\blayers?\.(\d+)\.", key)
    return int(found[1]) if found else 0


def check_names(model: type[PreTrainedModel], config: PreTrainedConfig, state: State) -> None:
    """Raises unless `state` has exactly the tensors, in the shapes, that the class asks for."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in model(config).state_dict().items()}
    if "lm_head.weight" not in state:
        wanted.pop("lm_head.weight", None)  # tied
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != wanted:
        wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise LabError(
            f"{model.__name__}: {len(wrong)} tensors of the tower are not what the class asks for, e.g. {wrong[0]}: "
            f"have {found.get(wrong[0])}, expected {wanted.get(wrong[0])}. This transformers is not supported"
        )
