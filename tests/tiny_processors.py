"""Tiny tokenizers and processors of real classes: a base, and five experts tuned from it, each with its own tokens."""

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
    WhisperFeatureExtractor,
)

from merging_mmer.vocabulary import build_processor, merge_vocabulary

SENTENCES = [
    "USER: what is in the image? ASSISTANT: a dog and a cat, two cups.\n",
    "<|im_start|>user\nhello world, you are a helpful assistant<|im_end|>\n",
]
BASE_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as the llava-hf repositories have it: all images first, string content not understood
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BOS = "<|begin|>"


def make_tokenizer(*added: str, template: str | None = None, bos: bool = False, **flags) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|pad|>", BOS, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 10, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token="<|im_end|>", pad_token="<|pad|>", padding_side="left"
    )
    fast.add_tokens([AddedToken(token, special=True, normalized=False, **flags) for token in added])
    fast.chat_template = template
    return fast


def _id(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def make_llava(bos: bool = False, template: str | None = LLAVA_TEMPLATE):
    tokenizer = make_tokenizer("<image>", bos=bos)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, 14, "default", chat_template=template, num_additional_image_tokens=1)
    return processor, LlavaConfig(image_token_index=_id(tokenizer, "<image>"))


def make_qwen_audio(bos: bool = False):
    tokenizer = make_tokenizer("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", bos=bos)
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=1), tokenizer)
    return processor, Qwen2AudioConfig(audio_token_id=_id(tokenizer, "<|AUDIO|>"))


def make_onevision(bos: bool = False):
    tokenizer = make_tokenizer("<image>", "<video>", bos=bos)
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return processor, LlavaOnevisionConfig(
        image_token_index=_id(tokenizer, "<image>"), video_token_index=_id(tokenizer, "<video>")
    )


def make_video_llava(bos: bool = False):
    tokenizer = make_tokenizer("<image>", "<video>", bos=bos)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**sizes),
        VideoLlavaVideoProcessor(**sizes),
        tokenizer,
        patch_size=14,
        chat_template=LLAVA_TEMPLATE,
    )
    return processor, VideoLlavaConfig(
        image_token_index=_id(tokenizer, "<image>"), video_token_index=_id(tokenizer, "<video>")
    )


def _named(tokenizer, **tokens):
    tokenizer._set_model_specific_special_tokens(tokens)
    return tokenizer


def make_gemma3(bos: bool = False):
    """A prompt says <start_of_image>, text and marks surround the features, and those stand at another token."""
    tokenizer = make_tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>", bos=bos)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    template = LLAVA_TEMPLATE.replace("<image>\n", "<start_of_image>")
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, _named(tokenizer, **names), image_seq_length=3, chat_template=template)
    return processor, Gemma3Config(image_token_index=_id(tokenizer, "<image_soft_token>"))


def make_qwen2_vl(bos: bool = False):
    tokenizer = make_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", bos=bos)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template
    )
    return processor, Qwen2VLConfig(
        image_token_id=_id(tokenizer, "<|image_pad|>"), video_token_id=_id(tokenizer, "<|video_pad|>")
    )


def make_idefics3(bos: bool = False):
    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = make_tokenizer(
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places, bos=bos
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer,
        image_seq_len=4,
        chat_template=LLAVA_TEMPLATE.replace("<image>\n", "<image>"),
    )
    return processor, Idefics3Config(image_token_id=_id(tokenizer, "<image>"))


def make_internvl(bos: bool = False):
    """Its videos' features stand at the image's token."""
    tokenizer = make_tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>", bos=bos)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    size = {"height": 28, "width": 28}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size),
        _named(tokenizer, **names, video_token="<video>"),
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=LLAVA_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )
    return processor, InternVLConfig(image_token_id=_id(tokenizer, "<IMG_CONTEXT>"))


MAKERS = {
    "gemma3": make_gemma3,
    "qwen2_vl": make_qwen2_vl,
    "idefics3": make_idefics3,
    "internvl": make_internvl,
    "llava": make_llava,
    "qwen_audio": make_qwen_audio,
    "onevision": make_onevision,
    "video_llava": make_video_llava,
}


def merged(experts: dict[str, str], bos: bool = False, text_route: str = "auto", base_template=BASE_TEMPLATE):
    """(processor, vocabulary, experts' own processors) of experts given as name -> key of MAKERS."""
    base = make_tokenizer(template=base_template, bos=bos)
    made = {name: MAKERS[kind](bos=bos) for name, kind in experts.items()}
    own = {name: processor for name, (processor, _) in made.items()}
    vocabulary = merge_vocabulary(base, own, {name: config for name, (_, config) in made.items()})
    return build_processor(vocabulary, own, base_template, text_route), vocabulary, own


def to_merged_ids(ids: list[int], name: str, vocabulary) -> list[int]:
    """An expert's own ids as the merged vocabulary has them."""
    table = {token.expert_ids[name]: token.id for token in vocabulary.added_tokens if name in token.expert_ids}
    return [table.get(token, token) for token in ids]


def image(seed: int = 0, height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def video(seed: int = 0, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 36, 44, 3), dtype=np.uint8)


def sound(seed: int = 0, samples: int = 8000) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


# chat messages and their blocks


def user(*content, role="user"):
    return {"role": role, "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def picture(seed=0, **more):
    return {"type": "image", "image": image(seed), **more}


def clip(seed=0, **more):
    return {"type": "video", "video": video(seed), **more}


def noise(seed=0, samples=8000):
    return {"type": "audio", "audio": sound(seed, samples)}
