"""What the benchmark of speed and memory runs: a routed model, its plain base and an original expert, in memory.

Enters: a name, a number of experts, dtype and device. Leaves: a `Subject`, whose prompts come for both sides; and
folders from which both sides are loaded. `lab` is SmolLM2-135M-Instruct and the lab's five experts, merged with masks,
row scales and corrections of rank 8 as `mmer demo` merges them. The random subjects are llamas of some shape, built
directly: image and audio experts in turn, their encoders tiny, every linear, the embedding and the norms different
per expert. Their values are noise, for a product takes as long whatever it multiplies; and their base's tensors are
also those of the routed model and of the original expert, so that all fit into memory together.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retention import merged_inputs
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
)
from transformers.initialization import no_init_weights

from configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import write_hub_code
from evaluation_mmer.demo import EXPERTS, block, recipe, samples
from evaluation_mmer.lab import LabItem, build_base, build_expert, load_expert, load_items
from evaluation_mmer.lab.experts import processor_inputs
from mmer import MMERForConditionalGeneration, merge

Inputs = dict[str, torch.Tensor]
RANK = 8
LAB = "smollm2"  # the shape of the lab's base, for its growth with the experts
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=2048,
    ),
    LAB: dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192,
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=8192,
    ),
}  # fmt: skip
_SPREAD, _DELTA = 0.02, 0.001
_BLOCK = 1 << 22
_TEXT = 16  # text tokens of a random prompt


@dataclass
class Subject:
    """`prompt(batch)` of one medium and `mixed(batch)` of picture, sound and text are what `ours` takes;
    `original_prompt(batch)` is the one medium for `original`, the first expert's own class with dense weights, whose
    LLM is `original_llm`. `mixed` is None where no expert hears.
    """

    label: str
    base: Any
    ours: Any
    original: Any
    original_llm: Any
    prompt: Callable[[int], Inputs]
    original_prompt: Callable[[int], Inputs]
    mixed: Callable[[int], Inputs] | None

    def __post_init__(self):
        for model in (self.base, self.ours, self.original):
            model.eval().requires_grad_(False)
            # what is timed has a fixed number of tokens
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0

    @property
    def experts(self) -> list[str]:
        return self.ours.config.expert_names

    def text(self, batch: int, length: int) -> Inputs:
        """Random ids of the base's vocabulary."""
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(4, self.base.config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": ids.to(self.base.device), "attention_mask": torch.ones_like(ids).to(self.base.device)}


def lengthened(inputs: Inputs, text: Inputs) -> Inputs:
    """A prompt of ours behind some text; the routes are left to the model."""
    left = {name: value for name, value in inputs.items() if "." in name}
    return left | {name: torch.cat([text[name], inputs[name]], 1) for name in ("input_ids", "attention_mask")}


# the lab


def lab_folders(folder: Path) -> tuple[Path, Path]:
    """(base, merged): the merged folder is made under `folder`, or taken from there; its code is always today's."""
    base, merged = build_base(), folder / "lab"
    if not merged.is_dir():
        merge(recipe(base, {name: build_expert(name) for name in EXPERTS}), merged, progress=False)
    write_hub_code(merged)
    return base, merged


def lab(folder: Path, dtype: torch.dtype, device: str) -> Subject:
    base_folder, merged = lab_folders(folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).to(device)
    ours = MMERForConditionalGeneration.from_pretrained(merged, dtype=dtype).to(device)
    processor = AutoProcessor.from_pretrained(merged, trust_remote_code=True)
    adapted, own_processor = load_expert("image", dtype)
    original = adapted.merge_and_unload().to(device)
    item: LabItem = load_items("image", "test", 1, 0)[0]
    shown = {name: block(name, entries[0]) for name, entries in samples().items()}
    question = {"type": "text", "text": item.question}
    chat = [{"role": "user", "content": [shown["audio"], shown["image"], question]}]

    def there(inputs: dict[str, Any]) -> Inputs:
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return {name: value.to(device) for name, value in cast.items()}

    def mixed(batch: int) -> Inputs:
        asked = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
        return there(dict(processor.apply_chat_template([chat] * batch, **asked)))

    return Subject(
        "lab", base, ours, original, causal(base, original.model.language_model, original.lm_head),
        lambda batch: there(merged_inputs(processor, "image", [item] * batch)[0]),
        lambda batch: there(processor_inputs(own_processor, [item] * batch)),
        mixed,
    )  # fmt: skip


def causal(base: Any, backbone: nn.Module, head: nn.Module) -> Any:
    """The base's class around another backbone and head."""
    twin = copy.copy(base)
    twin._modules = {**base._modules, "model": backbone, "lm_head": head}
    return twin


# random models


def expert_config(kind: str, text: LlamaConfig, placeholder: int) -> LlavaConfig | Qwen2AudioConfig:
    """A LLaVA of 4 tokens a picture, or a Qwen2-Audio of 5 a sound, with tiny encoders."""
    if kind == "image":
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8,
        )  # fmt: skip
        return LlavaConfig(text_config=text, vision_config=vision, image_token_index=placeholder, image_seq_length=4)
    audio = Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=10,
    )  # fmt: skip
    return Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=placeholder)


def random_config(shape: str, experts: int) -> MMERConfig:
    text = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(text).model
    routed = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    own = [name for name, _ in llm.named_parameters() if name.removesuffix(".weight") not in routed]
    parts, tokens = {}, []
    for place in range(experts):
        kind, number = ("image", "audio")[place % 2], "" if place < 2 else str(place // 2 + 1)
        word = {"token": f"<{kind}{number}>", "id": text.vocab_size + place}
        config = expert_config(kind, text, word["id"])
        parts[f"{kind}{number}"] = {"config": config.to_dict(), "placeholders": {kind: word}}
        tokens.append({**word, "experts": [f"{kind}{number}"]})
    decoupling = {"kind": "mask", "scale": "row", "rank": RANK}
    return MMERConfig(
        text_config=text, experts=parts, delta_modules=routed, expert_tensors=own, decoupling=decoupling,
        added_tokens=tokens,
    )  # fmt: skip


def fill_(model: nn.Module):
    """Noise in all weights: one block of it over and over, for a billion draws would take longer than the timing."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator)
    bits = torch.randint(0, 256, (_BLOCK,), generator=generator, dtype=torch.uint8)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        source = block * _SPREAD
        if leaf == "masks":
            source = bits
        elif leaf == "scales" or "norm" in name.rpartition(".")[0] and leaf.endswith("weight"):
            source = torch.ones(_BLOCK)
        elif leaf == "delta":
            source = block * _DELTA
        source = source.to(parameter.device, parameter.dtype)
        for part in parameter.data.flatten().split(_BLOCK):
            part.copy_(source[: len(part)])


def random_models(shape: str, experts: int, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """(base, ours), with the base's tensors in both."""
    config = random_config(shape, experts)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            base, ours = AutoModelForCausalLM.from_config(config.text_config), MMERForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    base.tie_weights()
    ours.tie_weights()
    fill_(base)
    fill_(ours)
    for name, tensor in base.named_parameters():
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(ours.model.language_model.get_submodule(module), leaf, tensor)
    ours.lm_head.weight = base.lm_head.weight
    return base.eval(), ours.eval()


def random_subject(shape: str, experts: int, dtype: torch.dtype, device: str) -> Subject:
    base, ours = random_models(shape, experts, dtype, device)
    config, generator = ours.config, torch.Generator().manual_seed(1)
    own = copy.deepcopy(config.expert_config("image"))
    own.text_config.num_hidden_layers = 1  # its layers are the base's, see below
    own.text_config.vocab_size = config.vocab_size
    with torch.device(device):
        original: Any = LlavaForConditionalGeneration(own).to(dtype)
    # the head and the embedding of the original have its placeholder's row, which no token here reads but that one
    original.model.language_model.layers, original.model.language_model.norm = base.model.layers, base.model.norm
    original.model.language_model.rotary_emb = base.model.rotary_emb
    own.text_config.num_hidden_layers = original.model.language_model.config.num_hidden_layers = len(base.model.layers)
    text = torch.randint(4, config.text_config.vocab_size, (_TEXT,), generator=generator)
    places = {name: entry["placeholders"] for name, entry in config.experts.items()}

    def inputs(batch: int, *media: str) -> Inputs:
        counts = {"image": 4, "audio": 5}
        ids = [torch.full((counts[name],), places[name][name]["id"]) for name in media]
        found = {"input_ids": torch.cat([*ids, text]).expand(batch, -1).contiguous().to(device)}
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        if "image" in media:
            found["image.pixel_values"] = torch.randn((batch, 3, 16, 16)).to(device, dtype)
        if "audio" in media:
            found["audio.input_features"] = torch.randn((batch, 8, 20)).to(device, dtype)
            found["audio.feature_attention_mask"] = torch.ones((batch, 20), dtype=torch.long, device=device)
        return found

    return Subject(
        shape, base, ours, original, base, lambda batch: inputs(batch, "image"),
        lambda batch: {name.removeprefix("image."): value for name, value in inputs(batch, "image").items()},
        (lambda batch: inputs(batch, "audio", "image")) if experts > 1 else None,
    )  # fmt: skip


def random_folders(shape: str, experts: int, folder: Path) -> tuple[Path, Path]:
    """(base, merged) on disk, in bf16 as such models are published."""
    base, ours = random_models(shape, experts, torch.bfloat16, "cpu")
    at = folder / f"{shape}-{experts}"
    base.save_pretrained(at / "base")
    ours.save_pretrained(at / "merged")
    return at / "base", at / "merged"
