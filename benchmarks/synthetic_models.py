"""A base and experts of any size on disk, made tensor by tensor: what the benchmarks of merging start from.

Enters: a `Shape`, how many experts, a folder. Leaves: `base` (a llama), `expert-k` (a LLaVA whose language model is
the base's plus noise, with a tiny CLIP tower) and, where asked for, `plain-k`: the same language model as a bare
llama, for tools that merge equal classes alone. All in bf16. Invariant: a tensor's values depend on its name and on
which model it is of, so that a deeper model of one shape holds the same tensors and more; one tensor at a time is in
memory.
"""

import contextlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

SPREAD = 0.02  # of the base's weights
NOISE = 0.001  # of an expert's: a twentieth of the base's norm away, as full fine-tunes are
PLACEHOLDER = "<image>"
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}MEDIUM{% endif %}{% endfor %}{% endif %} {% endfor %}"
)
_TOWER = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=8,
)  # fmt: skip
_MADE = "made.json"


@dataclass(frozen=True)
class Shape:
    """A llama with an untied head."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    vocabulary: int

    def config(self, rows: int = 0) -> LlamaConfig:
        """`rows`: how many there are behind the vocabulary."""
        return LlamaConfig(
            vocab_size=self.vocabulary + rows, hidden_size=self.hidden, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in shapes_of(LlamaForCausalLM, self.config()).values())

    @property
    def largest_tensor(self) -> int:
        """Entries."""
        return max(math.prod(shape) for shape in shapes_of(LlamaForCausalLM, self.config()).values())


SCALES = {
    "tiny": Shape(hidden=64, layers=2, ffn=128, heads=2, vocabulary=512),
    "small": Shape(hidden=512, layers=4, ffn=1536, heads=8, vocabulary=16000),
    "full": Shape(hidden=1536, layers=20, ffn=4096, heads=12, vocabulary=32000),
    "7b": Shape(hidden=4096, layers=32, ffn=11008, heads=32, vocabulary=32000),
}


def shapes_of(cls: type, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a class, without a value of it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}


class TensorFile:
    """A safetensors file of bf16 tensors that are given one after another, in the order of `shapes`."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(shapes)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object):
        self._file.close()
        if self._left and error[0] is None:
            raise ValueError(f"{self._file.name}: {len(self._left)} tensors were not given, such as {self._left[0]}")

    def add(self, name: str, tensor: torch.Tensor):
        if not self._left or name != self._left[0]:
            raise ValueError(f"{self._file.name}: found {name!r}, expected {self._left[:1]}")
        del self._left[0]
        self._file.write(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)


def noise(model: int, name: str, shape: tuple[int, ...], spread: float) -> torch.Tensor:
    """fp32, normal, the same for one model (0 is the base) and name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{model} {name}".encode()))
    return torch.randn(shape, generator=generator).mul_(spread)


def theta_0(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The base's tensor of a name, bf16: norms of ones, all else normal."""
    values = torch.ones(shape) if len(shape) == 1 else noise(0, name, shape, SPREAD)
    return values.to(torch.bfloat16)


def theta(expert: int, name: str, shape: tuple[int, ...], spread: float = NOISE) -> torch.Tensor:
    """Expert number `expert`'s (from 1), bf16."""
    return theta_0(name, shape).float().add_(noise(expert, name, shape, spread)).to(torch.bfloat16)


def tokenizer(words: int, *added: str) -> PreTrainedTokenizerFast:
    known = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{place}" for place in range(words - 4))]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE.replace("MEDIUM", "")
    made.add_tokens(list(added), special_tokens=True)
    return made


def _describe(folder: Path, config: PreTrainedConfig, cls: type):
    folder.mkdir(parents=True)
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)


def write_base(folder: Path, shape: Shape):
    config = shape.config()
    shapes = shapes_of(LlamaForCausalLM, config)
    _describe(folder, config, LlamaForCausalLM)
    tokenizer(shape.vocabulary).save_pretrained(folder)
    with TensorFile(folder / "model.safetensors", shapes) as file:
        for name, of in shapes.items():
            file.add(name, theta_0(name, of))


def write_expert(folder: Path, shape: Shape, expert: int, plain: Path | None = None):
    """Expert number `expert` as LLaVA and, where `plain` is given, the same tensors as a bare llama."""
    core = shapes_of(LlamaForCausalLM, shape.config())
    config = LlavaConfig(
        text_config=shape.config(rows=1), vision_config=_TOWER, image_token_index=shape.vocabulary, image_seq_length=4,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    whole = shapes_of(LlavaForConditionalGeneration, config)
    names = {name: name.replace("model.", "model.language_model.", 1) for name in core}
    tower = {name: of for name, of in whole.items() if name not in names.values()}
    _describe(folder, config, LlavaForConditionalGeneration)
    sides = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessor(size=sides, crop_size=sides), tokenizer(shape.vocabulary, PLACEHOLDER), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token=PLACEHOLDER,
        chat_template=TEMPLATE.replace("MEDIUM", f"{PLACEHOLDER} "),
    ).save_pretrained(folder)  # fmt: skip
    with contextlib.ExitStack() as files:
        ours = files.enter_context(
            TensorFile(folder / "model.safetensors", {full: whole[full] for full in [*names.values(), *tower]})
        )
        bare = None
        if plain is not None:
            _describe(plain, shape.config(), LlamaForCausalLM)
            tokenizer(shape.vocabulary).save_pretrained(plain)
            bare = files.enter_context(TensorFile(plain / "model.safetensors", core))
        for name, full in names.items():
            values = theta(expert, name, core[name])
            if bare is not None:
                bare.add(name, values)
            rows = whole[full][0] - len(values)  # of the placeholder
            ours.add(full, torch.cat([values, values[:rows]]) if rows else values)
        for name, of in tower.items():
            ours.add(name, noise(expert, name, of, SPREAD))


@dataclass(frozen=True)
class Models:
    base: Path
    experts: list[Path]
    plain: list[Path]

    def recipe(self, **settings: object) -> dict[str, object]:
        """A recipe that merges all experts: expert1, expert2, …"""
        experts = {f"expert{place}": str(path) for place, path in enumerate(self.experts, start=1)}
        return {"base": str(self.base), "experts": experts, **settings}

    def inputs(self, plain: bool = False) -> list[Path]:
        """The weight files of base and experts, as ours or as a bare llama."""
        return [folder / "model.safetensors" for folder in [self.base, *(self.plain if plain else self.experts)]]


def make(folder: Path, shape: Shape, experts: int, plain: bool = False, one_file: bool = False) -> Models:
    """Write a base and experts under `folder`, or take what an earlier call of the same shape left there.

    `one_file`: the experts' weights are one file with several names (hard links), for the sake of the disk's room.
    """
    made, written = folder / _MADE, {**asdict(shape), "one_file": one_file}
    found = json.loads(made.read_text()) if made.is_file() else None
    if found != written:
        shutil.rmtree(folder, ignore_errors=True)
        write_base(folder / "base", shape)
        made.write_text(json.dumps(written))
    paths = [folder / f"expert-{place}" for place in range(1, experts + 1)]
    bare = [folder / f"plain-{place}" for place in range(1, experts + 1)] if plain else []
    for place, path in enumerate(paths, start=1):
        done, beside = path / _MADE, bare[place - 1] if plain else None
        if done.is_file() and (beside is None or beside.is_dir()):
            continue
        for old in (path, beside):
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        if one_file and place > 1:
            shutil.copytree(paths[0], path, copy_function=os.link)
            continue
        write_expert(path, shape, place, beside)
        done.write_text("{}")
    return Models(folder / "base", paths, bare)
