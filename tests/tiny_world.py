"""A tiny base, an image and an audio expert on disk with tokenizers and processors: what a user would merge."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from . import tiny_checkpoints as tiny

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
WORDS = "what is this a the describe sound shape picture word spoken shown and ? . ! red blue green dog cat".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}PLACEHOLDER {% endif %}{% endfor %}"
    "{% endif %} </s>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS]
    words += [f"w{i}" for i in range(tiny.ROWS - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    made.chat_template = TEMPLATE.replace("PLACEHOLDER", "")
    made.add_tokens(list(extra), special_tokens=True)
    return made


def make(folder: Path, dtype: torch.dtype = torch.float32, **base_changes) -> dict:
    """Write base, image and audio expert under `folder`; the recipe that merges them."""
    base = tiny.base_model(dtype=dtype, **base_changes)
    base.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=6)
    tiny.save(base, folder / "base")
    tokenizer().save_pretrained(folder / "base")

    llava = tiny.expert_model("llava", base, seed=1, extra_rows=1, noise=0.1)
    tiny.save(llava, folder / "image")
    LlavaProcessor(
        CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("PLACEHOLDER", "<image>"),
    ).save_pretrained(folder / "image")

    audio = tiny.expert_model("qwen2_audio", base, seed=2, extra_rows=3, noise=0.1)
    tiny.save(audio, folder / "audio")
    Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=800),
        tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
        chat_template=TEMPLATE.replace("PLACEHOLDER", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
    ).save_pretrained(folder / "audio")
    return {"base": str(folder / "base"), "experts": {"image": str(folder / "image"), "audio": str(folder / "audio")}}
