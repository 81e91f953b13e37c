"""Multimodal checkpoints as users have them for a base, and experts tuned from them, on disk."""

import copy
import json
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedModel,
)

from merging_mmer.naming import class_on_meta

from . import tiny_checkpoints as tiny
from . import tiny_stock as stock
from .tiny_several import TEMPLATE, tokenizer

WORDS = 90  # of the 96 rows; behind them the class's own tokens, then padding
TOKENS = {"gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"], "llava": ["<image>"]}
WRITTEN = {"gemma3": "<start_of_image>", "llava": "<image>"}
PLACEHOLDER = {kind: WORDS + len(tokens) - 1 for kind, tokens in TOKENS.items()}
# what google/gemma-3-4b-it's config.json says beside its parts
_OUTSIDE = {"boi_token_index": WORDS, "eoi_token_index": WORDS + 1, "eos_token_id": [2, 3]}


def model(kind: str, seed: int = 0, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = stock.config(kind, **changes)
    config.image_token_index = config.image_token_id = PLACEHOLDER[kind]
    made = type(class_on_meta(config, multimodal=True))(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():  # projectors that start at zero would hide what stands behind them
                parameter.normal_(std=0.3)
    return made


@torch.no_grad()
def tuned(base: PreTrainedModel, seed: int, noise: float = 0.05) -> PreTrainedModel:
    """The whole of `base`, tuned on: tower and language model."""
    made, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    return made


def save(made: PreTrainedModel, kind: str, folder: Path, *more: str) -> Path:
    """Model, config and processor, under the names and with the fields that such repositories have."""
    tiny.save(made, folder)
    if kind == "gemma3":
        save_config(folder)
    own, size = tokenizer(*TOKENS[kind], *more, words=WORDS), {"height": 16, "width": 16}
    template = TEMPLATE.replace("IMAGE", WRITTEN[kind])
    own.chat_template = template
    if kind == "gemma3":
        names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        own._set_model_specific_special_tokens(names)
        images = Gemma3ImageProcessor(size=size)
        Gemma3Processor(images, own, image_seq_length=16, chat_template=template).save_pretrained(folder)
    else:
        images = CLIPImageProcessor(size=size, crop_size=size)
        LlavaProcessor(
            images, own, patch_size=8, image_token="<image>", vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def save_config(folder: Path):
    """Write into Gemma 3's config.json what Google's has beside its parts."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **_OUTSIDE}))


def world(kind: str, folder: Path, experts: tuple[str, ...] = ("one", "two"), **changes) -> dict:
    """A base of class `kind`, experts tuned from it, and the recipe that merges them."""
    base = model(kind, **changes)
    save(base, kind, folder / "base")
    for seed, name in enumerate(experts, 1):
        save(tuned(base, seed), kind, folder / name)
    return {"base": str(folder / "base"), "experts": {name: str(folder / name) for name in experts}}
