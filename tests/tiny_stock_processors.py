"""The stock classes of tiny_stock.py with their real processors: a base and one expert on disk, as users have them.

`MAKERS` make the experts' processors, with the sizes that their towers have; `world` saves a base and an expert.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import (
    AudioFlamingo3Processor,
    AutoTokenizer,
    AyaVisionProcessor,
    CLIPImageProcessor,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    DeepseekVLHybridImageProcessor,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GlmAsrProcessor,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    JanusImageProcessor,
    JanusProcessor,
    LightOnOcrProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    Qwen2AudioProcessor,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils import is_num2words_available, is_torchaudio_available

from . import tiny_stock
from .tiny_processors import BASE_TEMPLATE, LLAVA_TEMPLATE, make_tokenizer

ROWS = 400  # of every matrix; the tokenizers have fewer tokens
SIZE = {"height": 16, "width": 16}
SQUARE = {"size": {"shortest_edge": 16}, "crop_size": SIZE}
GRID = [[16, 32], [32, 16]]


@dataclass
class Own:
    """modalities: modality -> what a prompt says for one medium. settings: of the class's config, beside
    tiny_stock.py's. call: what its processor is called with besides. nested: it wants one list of images for each
    text. one_each: it takes one medium in each text. chats: its own apply_chat_template takes media. pieces: it stacks
    the pieces of a text's images, and ours those of each image."""

    processor: Any
    modalities: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    nested: bool = False
    one_each: bool = False
    chats: bool = True
    pieces: bool = False


def template(**written: str) -> str:
    """A chat template that writes the placeholders of one expert where its blocks stand."""
    cases = "".join(
        f"{{% elif c['type'] == '{modality}' %}}{{{{ '{token}' }}}}" for modality, token in written.items()
    )
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}" + cases + "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokens(*added: str, template: str | None = None):
    """`<|endoftext|>` is the base's: a tokenizer of the class Qwen2Tokenizer has it in any case."""
    return make_tokenizer("<|endoftext|>", *added, template=template)


def named(*added: str, **tokens_by_name: str):
    tokenizer = tokens(*added, *tokens_by_name.values())
    tokenizer._set_model_specific_special_tokens(tokens_by_name)
    return tokenizer


def hearing(frames: int) -> WhisperFeatureExtractor:
    """One second of sound makes so many frames."""
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=16_000 // frames)


def llava_next() -> Own:
    images = LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=GRID)
    tokenizer = tokens("<image>")
    made = LlavaNextProcessor(
        images, tokenizer, 8, "default", chat_template=LLAVA_TEMPLATE, num_additional_image_tokens=1
    )
    return Own(made, {"image": "<image>"})


def llava_next_video() -> Own:
    made = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**SQUARE),
        LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=GRID),
        tokens("<image>", "<video>"),
        chat_template=LLAVA_TEMPLATE,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Own(made, {"image": "<image>", "video": "<video>"})


def idefics3() -> Own:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = tokens("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    made = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template(image="<image>"))
    return Own(made, {"image": "<image>"}, pieces=True)


def smolvlm() -> Own:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = tokens("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    made = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=template(image="<image>"),
    )
    return Own(made, {"image": "<image>"}, nested=True, pieces=True)


def mistral3() -> Own:
    tokenizer = tokens("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    made = PixtralProcessor(images, tokenizer, 4, 2, chat_template=template(image="[IMG]"))
    return Own(made, {"image": "[IMG]"})


def cohere2_vision() -> Own:
    tokenizer = named(
        image_token="<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    images = Cohere2VisionImageProcessor(size=SIZE, patch_size=1, downsample_factor=2, max_patches=4)
    made = Cohere2VisionProcessor(images, tokenizer, chat_template=template(image="<|IMG_PATCH|>"))
    return Own(made, {"image": "<|IMG_PATCH|>"})


def aya_vision() -> Own:
    tokenizer = tokens(
        "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"
    )
    images = GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, max_patches=4)
    made = AyaVisionProcessor(images, tokenizer, 8, 16, downsample_factor=2, chat_template=template(image="<image>"))
    return Own(made, {"image": "<image>"})


def got_ocr2() -> Own:
    tokenizer = tokens("<img>", "</img>", "<imgpad>")
    made = GotOcr2Processor(
        GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=template(image="<img><imgpad></img>"),
    )
    # its images must come in a flat list, and a chat's come nested
    return Own(made, {"image": "<imgpad>"}, call={"num_image_tokens": 4}, chats=False)


def janus() -> Own:
    tokenizer = named(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    images = JanusImageProcessor(size=SIZE, min_size=4)
    made = JanusProcessor(images, tokenizer, chat_template=template(image="<image>"), num_image_tokens=4)
    return Own(made, {"image": "<image>"})


def deepseek_vl() -> Own:
    tokenizer = named(image_token="<image>")
    images = DeepseekVLImageProcessor(size=SIZE, min_size=4)
    made = DeepseekVLProcessor(images, tokenizer, chat_template=template(image="<image>"), num_image_tokens=4)
    return Own(made, {"image": "<image>"})


def video_llama_3() -> Own:
    tokenizer = named("<|vision_start|>", "<|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    sizes = {"patch_size": 4, "min_pixels": 64, "max_pixels": 256}
    made = VideoLlama3Processor(
        VideoLlama3ImageProcessor(**sizes, merge_size=1),
        tokenizer,
        VideoLlama3VideoProcessor(**sizes, merge_size=2),
        chat_template=template(
            image="<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )
    return Own(made, {"image": "<|image_pad|>", "video": "<|video_pad|>"})


def gemma3() -> Own:
    tokenizer = named(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    made = Gemma3Processor(
        Gemma3ImageProcessor(size=SIZE),
        tokenizer,
        image_seq_length=16,
        chat_template=template(image="<start_of_image>"),
    )
    return Own(made, {"image": "<start_of_image>"}, nested=True)


def audioflamingo3() -> Own:
    tokenizer = tokens("<sound>")
    made = AudioFlamingo3Processor(hearing(20), tokenizer, chat_template=template(audio="<sound>"))
    return Own(made, {"audio": "<sound>"}, one_each=True)


def glmasr() -> Own:
    tokenizer = tokens("<|begin_of_audio|>", "<|end_of_audio|>", "<|sound|>")
    written = "<|begin_of_audio|><|sound|><|end_of_audio|>"
    made = GlmAsrProcessor(hearing(32), tokenizer, template(audio=written), audio_token="<|sound|>")
    return Own(made, {"audio": "<|sound|>"}, one_each=True)


def qwen3_asr() -> Own:
    tokenizer = named(audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>")
    written = "<|audio_start|><|audio_pad|><|audio_end|>"
    hears = Qwen3ASRFeatureExtractor(feature_size=8, n_window=50)
    made = Qwen3ASRProcessor(hears, tokenizer, template(audio=written))
    return Own(made, {"audio": "<|audio_pad|>"}, one_each=True)


def granite_speech() -> Own:
    """With its own sizes: a feature extractor that is saved forgets others."""
    hears = GraniteSpeechFeatureExtractor(projector_window_size=4, projector_downsample_rate=2)
    made = GraniteSpeechProcessor(hears, tokens("<|audio|>"), chat_template=template(audio="<|audio|>"))
    encoder = {**tiny_stock.STOCK["granite_speech"].settings["encoder_config"], "input_dim": 160}
    return Own(made, {"audio": "<|audio|>"}, {"encoder_config": encoder})


def llava() -> Own:
    made = LlavaProcessor(
        CLIPImageProcessor(**SQUARE), tokens("<image>"), 8, "default", LLAVA_TEMPLATE, num_additional_image_tokens=1
    )
    return Own(made, {"image": "<image>"})


def vipllava() -> Own:
    return llava()


def llava_onevision() -> Own:
    made = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=GRID),
        tokens("<image>", "<video>"),
        LlavaOnevisionVideoProcessor(size=SIZE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return Own(made, {"image": "<image>", "video": "<video>"})


def video_llava() -> Own:
    made = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**SQUARE),
        VideoLlavaVideoProcessor(**SQUARE),
        tokens("<image>", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return Own(made, {"image": "<image>", "video": "<video>"})


def deepseek_vl_hybrid() -> Own:
    tokenizer = named(image_token="<image>")
    sizes = {"size": SIZE, "min_size": 4, "high_res_size": {"height": 32, "width": 32}}
    images = DeepseekVLHybridImageProcessor(**sizes)
    made = DeepseekVLHybridProcessor(images, tokenizer, template(image="<image>"), num_image_tokens=16)
    return Own(made, {"image": "<image>"})


def lighton_ocr() -> Own:
    tokenizer = named(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    made = LightOnOcrProcessor(images, tokenizer, 4, 2, chat_template=template(image="[IMG]"))
    return Own(made, {"image": "[IMG]"})


def qwen2_audio() -> Own:
    tokenizer = tokens("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    written = template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>")
    return Own(Qwen2AudioProcessor(hearing(20), tokenizer, written), {"audio": "<|AUDIO|>"})


MAKERS: dict[str, Callable[[], Own]] = {
    made.__name__: made
    for made in (
        llava_next, llava_next_video, idefics3, mistral3, cohere2_vision, aya_vision, got_ocr2, janus, deepseek_vl,
        video_llama_3, gemma3, audioflamingo3, glmasr, qwen3_asr, llava, vipllava, llava_onevision, video_llava,
        deepseek_vl_hybrid, lighton_ocr, qwen2_audio,
    )
}  # fmt: skip
# without their packages these are refused, and the merge says why
MAKERS |= {"smolvlm": smolvlm} if is_num2words_available() else {}
MAKERS |= {"granite_speech": granite_speech} if is_torchaudio_available() else {}


def token_settings(kind: str, tokenizer: Any, own: Own) -> dict[str, int]:
    """The ids at which features stand, under the names that the class's config has for them."""
    ids = {}
    for name in tiny_stock.STOCK[kind].settings:
        modality, _, rest = name.partition("_")
        if rest in ("token_id", "token_index"):
            word = getattr(tokenizer, f"{modality}_token", None) or own.modalities[modality]
            ids[name] = tokenizer.convert_tokens_to_ids(getattr(own.processor, "img_patch_token", word))
    return ids


def configured(kind: str, settings: dict[str, Any]):
    """tiny_stock.py's class, with the tokenizers' rows and `settings` of its config; for a `with`."""
    stock = tiny_stock.STOCK[kind]
    changed = replace(stock, settings={**stock.settings, **settings})
    stack = ExitStack()
    stack.enter_context(patch.dict(tiny_stock.SIZES, vocab_size=ROWS, max_position_embeddings=1024))
    stack.enter_context(patch.dict(tiny_stock.STOCK, {kind: changed}))
    return stack


def world(kind: str, folder: Path, own: Own, tokenizer: Any = None, processor_config: Any = None) -> PreTrainedModel:
    """Saves `base` and `expert` under `folder`; gives the expert.

    For a processor that needs a package which is not there: its tokenizer, and what its processor_config.json says.
    """
    tokenizer = tokenizer or own.processor.tokenizer
    with configured(kind, {**own.settings, **token_settings(kind, tokenizer, own)}):
        base = tiny_stock.base_model(kind)
        expert = tiny_stock.expert_model(kind, base)
    base.save_pretrained(folder / "base")
    tokens(template=BASE_TEMPLATE).save_pretrained(folder / "base")
    # some classes of tokenizers read in a way of their own, whatever their folder says
    reads = AutoTokenizer.from_pretrained(folder / "base").backend_tokenizer
    backend = tokenizer.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = reads.normalizer, reads.pre_tokenizer
    expert.save_pretrained(folder / "expert")
    if processor_config is None:
        own.processor.save_pretrained(folder / "expert")
    else:
        tokenizer.save_pretrained(folder / "expert")
        (folder / "expert" / "processor_config.json").write_text(json.dumps(processor_config))
    return expert
