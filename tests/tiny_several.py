"""Several experts of one base on disk, of one class and of several, with tokenizers as those classes have them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
    WhisperFeatureExtractor,
)

from modeling_mmer import MMERForConditionalGeneration
from processing_mmer import MMERProcessor

from . import tiny_checkpoints as tiny
from .tiny_merges import run

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = "what is this a the describe sound shape picture word and ? . ! red blue green dog cat user assistant".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}IMAGE {% else %}OTHER {% endif %}"
    "{% endfor %}{% endif %} </s>{% endfor %}{% if add_generation_prompt %} assistant {% endif %}"
)
# what the recipe needs to give an expert back whole: a correction of full rank
WHOLE = {"kind": "mask", "scale": "row", "rank": 32}
PLACEHOLDERS = {"llava": ["<image>"], "smolvlm": ["<image>"], "video_llava": ["<image>", "<video>"]}
PLACEHOLDERS["qwen2_audio"] = ["<|AUDIO|>"]
FRAMES = {"smolvlm": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]}
FRAMES["qwen2_audio"] = ["<|audio_bos|>", "<|audio_eos|>"]


def tokenizer(*added: str, words: int = tiny.ROWS) -> PreTrainedTokenizerFast:
    known = [*SPECIAL, *WORDS]
    known += [f"w{i}" for i in range(words - len(known))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE.replace("IMAGE ", "").replace("OTHER ", "")
    made.add_tokens(list(added), special_tokens=True)
    return made


def save_base(folder: Path, words: int = tiny.ROWS, **changes):
    model = tiny.base_model(**changes)
    tiny.save(model, folder)
    tokenizer(words=words).save_pretrained(folder)
    return model


def tokens_of(kind: str, *more: str) -> list[str]:
    return [*PLACEHOLDERS[kind], *FRAMES.get(kind, []), *more]


def save_expert(
    folder: Path, kind: str, base, seed: int, more: tuple[str, ...] = (), words: int = tiny.ROWS, rows: int = 0, **how
):
    """An expert with its added tokens behind `words` words and `rows` rows of padding behind those. Returns it."""
    added = tokens_of(kind, *more)
    wanted = words + len(added) + rows
    model = tiny.expert_model(kind, base, seed, extra_rows=wanted - len(base.get_input_embeddings().weight), **how)
    for place, token in enumerate(PLACEHOLDERS[kind]):
        modality = {"<image>": "image", "<video>": "video"}.get(token, "audio")
        name = f"{modality}_token_id"
        setattr(model.config, name if hasattr(model.config, name) else f"{modality}_token_index", words + place)
    tiny.save(model, folder)
    save_processor(folder, kind, tokenizer(*added, words=words))
    return model


def save_processor(folder: Path, kind: str, own: PreTrainedTokenizerFast):
    size = {"height": 16, "width": 16}
    template = TEMPLATE.replace("IMAGE", "<image>").replace("OTHER", "<video>")
    if kind == "llava":
        made = LlavaProcessor(
            CLIPImageProcessor(size=size, crop_size=size), own, patch_size=8, image_token="<image>",
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    elif kind == "smolvlm":
        images = Idefics3ImageProcessor(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
        )
        made = Idefics3Processor(images, own, image_seq_len=1, chat_template=template)
    elif kind == "video_llava":
        sizes = {"size": size, "crop_size": size}
        made = VideoLlavaProcessor(
            VideoLlavaImageProcessor(**sizes), VideoLlavaVideoProcessor(**sizes), own, patch_size=8,
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    else:
        template = TEMPLATE.replace("IMAGE", "<image>").replace("OTHER", "<|audio_bos|><|AUDIO|><|audio_eos|>")
        sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=800)
        made = Qwen2AudioProcessor(sounds, own, chat_template=template)
    made.save_pretrained(folder)


def merge_and_load(recipe: dict, out: Path) -> tuple[MMERForConditionalGeneration, MMERProcessor]:
    run({"decoupling": WHOLE, **recipe}, out)
    model, info = MMERForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), MMERProcessor.from_pretrained(out)


def stock(folder: Path):
    """(model, processor) of an expert as its own class runs it."""
    return AutoModelForMultimodalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def columns(model: MMERForConditionalGeneration, processor: MMERProcessor, name: str, own) -> dict[int, int]:
    """An expert's own token id -> the merged one, of all its tokens that a route may write: no placeholders."""
    merged = processor.tokenizer.get_vocab()
    hidden = set(model.config.placeholder_experts())
    table = {}
    for token, own_id in own.get_vocab().items():
        text = token if name in _experts_of(model, token) else f"{token[:-1]}:{name}>"
        merged_id = merged[token] if own_id < model.config.text_config.vocab_size else merged.get(text, -1)
        if merged_id >= 0 and merged_id not in hidden:
            table[own_id] = merged_id
    return table


def _experts_of(model, token: str) -> list[str]:
    return next((entry["experts"] for entry in model.config.added_tokens if entry["token"] == token), [])


def same_logits(got: torch.Tensor, want: torch.Tensor, atol: float = 2e-4):
    """Equal up to the rounding of another order of sums, and no token barred in one of them alone."""
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))
    finite = torch.isfinite(want)
    assert float((got[finite] - want[finite]).abs().max()) <= atol * max(1.0, float(want[finite].abs().max()))
