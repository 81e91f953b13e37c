"""A base and two experts on disk, tuned from it, with tokenizers that overlap: where the tests of the merge start."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from merging_mmer import Recipe, merge

from . import tiny_checkpoints as tiny

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer(*extra):
    words = [*WORDS, *(f"w{i}" for i in range(tiny.ROWS - 2 - len(WORDS)))]  # two rows of padding behind the words
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    made.add_tokens([f"<row{i}>" for i in range(len(words), tiny.ROWS)] if extra else [])
    made.add_tokens(list(extra), special_tokens=True)
    return made


def base_tokenizer():
    return tokenizer()


def save_llava(model, folder):
    tiny.save(model, folder)
    images = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer("<image>", "<grid>"), patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_audio(model, folder):
    tiny.save(model, folder)
    sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=800)
    Qwen2AudioProcessor(
        sounds, tokenizer("<|AUDIO|>", "<grid>"), chat_template=TEMPLATE,
        audio_token="<|AUDIO|>", audio_bos_token="<|AUDIO|>", audio_eos_token="<|AUDIO|>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def world(folder, dtype=torch.float32, image=None, audio=None, **base):
    """A base and two experts on disk, and the recipe that merges them."""
    model = tiny.base_model(dtype=dtype, **base)
    tiny.save(model, folder / "base")
    base_tokenizer().save_pretrained(folder / "base")
    save_llava(tiny.expert_model("llava", model, seed=1, **(image or {})), folder / "image")
    save_audio(
        tiny.expert_model("qwen2_audio", model, seed=2, **{"noise": 0.01, "norms": False, **(audio or {})}),
        folder / "audio",
    )
    return {"base": str(folder / "base"), "experts": {"image": str(folder / "image"), "audio": str(folder / "audio")}}


def run(recipe, out, **kwargs):
    return merge(Recipe.from_dict(recipe), out, progress=False, **kwargs)


def thetas(folder):
    """(θ₀, {expert: θᵢ}) as fp32, by the base's names, from the old names on disk."""

    def of(path, *prefixes):
        found = {}
        for name, tensor in tiny.tensors(path).items():
            for prefix in prefixes:
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = tensor
                    break
        return found

    base = of(folder / "base", "model.", "")
    experts = {e: of(folder / e, "language_model.model.", "language_model.") for e in ("image", "audio")}
    return base, experts
