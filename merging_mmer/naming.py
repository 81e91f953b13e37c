"""Names: from the names in a checkpoint, old or new, to the names that its class has today.

Enters: a checkpoint and the config of its class. Leaves: each tensor of the language model under its name relative
to the base's `AutoModel` ("layers.0.self_attn.q_proj.weight", "lm_head.weight"), each tensor of the tower under its
name in the expert's own `AutoModel`. The class is built without memory (meta device), and transformers' own
conversion rules do the renaming. Invariant: every tensor of the checkpoint and of the class is accounted for, or
ValueError lists what is not.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration
from modeling_mmer.towers_mmer import language_model_name

from .checkpoints import Checkpoint

HEAD = "lm_head"
PREFIX = "model.language_model."

_LISTED = 8


def class_on_meta(config: PreTrainedConfig, multimodal: bool, trust_remote_code: bool = False) -> PreTrainedModel:
    """The generating class of `config`, without memory. Raises ValueError when transformers has none."""
    if multimodal and isinstance(config, ComposedConfig):
        with torch.device("meta"):
            return ComposedForConditionalGeneration(copy.deepcopy(config))
    autos: tuple[Any, ...] = (AutoModelForCausalLM,)
    if multimodal:  # the last holds AudioFlamingo3, which is no encoder-decoder
        autos = (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
    for auto in autos:
        known = type(config) in auto._model_mapping
        if known or (trust_remote_code and auto.__name__ in getattr(config, "auto_map", {})):
            with torch.device("meta"):
                return auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    wanted = "multimodal language model" if multimodal else "causal language model"
    raise ValueError(f"model_type {config.model_type!r}: transformers has no {wanted} of this kind")


def stored_name(name: str) -> str:
    """The name in a merged folder of a tensor that the base's `AutoModel` calls `name`."""
    return name if name.startswith(f"{HEAD}.") else f"{PREFIX}{name}"


def listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


class NamedCheckpoint:
    """A checkpoint under the names of the class `model` (on the meta device).

    `sources` maps the name of each tensor that is there to a function that reads it. Tied tensors that the
    checkpoint leaves out are read from their source. `missing` are the names of the class that nothing in the
    checkpoint gives, `unknown` the other way round; without `strict` these are no error.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, strict: bool = True):
        self.checkpoint, self.model = checkpoint, model
        self.meta = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.sources: dict[str, Callable[[], torch.Tensor]] = {}
        unknown = self._connect()
        missing = set(self.meta) - set(self.sources)
        for target, source in model.all_tied_weights_keys.items():
            if target in missing and source in self.sources:
                self.sources[target] = self.sources[source]
                missing.remove(target)
        info = LoadStateDictInfo(missing, unknown, set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(info)
        self.unknown = set(info.unexpected_keys)
        if self.unknown and strict:
            raise ValueError(
                f"{checkpoint.named()}: {len(info.unexpected_keys)} tensors are unknown to {type(model).__name__}: "
                f"{listing(info.unexpected_keys)}. Nothing is skipped silently: is config.json the right one?"
            )
        self.missing = info.missing_keys

    def rename(self, key: str) -> tuple[str, str | None]:
        """The name of today for a saved name, and the pattern of the converter that it goes through, if any."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self.meta)
        if name not in self.meta and key in self.meta:
            name, pattern = rename_source_key(key, [], [], prefix, self.meta)
        return name, pattern

    def _connect(self) -> set[str]:
        unknown = set()
        converted: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self.checkpoint.keys(), key=dot_natural_key):
            name, pattern = self.rename(key)
            if pattern is not None:
                converted.setdefault(name, []).append((key, pattern))
            elif name not in self.meta:
                unknown.add(name)
            elif name in self.sources:
                raise ValueError(
                    f"{self.checkpoint.place(key)}: several tensors claim the name {name!r}, {key!r} is one"
                )
            else:
                self._check_shape(name, key, self.checkpoint.shape(key))
                self.sources[name] = partial(self.checkpoint.tensor, key)
        for first, parts in converted.items():
            shapes = self._convert(first, parts, lambda key: torch.empty(self.checkpoint.shape(key), device="meta"))
            for name, empty in shapes.items():
                if name not in self.meta:
                    unknown.add(name)
                    continue
                self._check_shape(name, parts[0][0], tuple(empty.shape))
                self.sources[name] = partial(self._converted, name, first, parts)
        return unknown

    def _convert(
        self, first: str, parts: list[tuple[str, str]], read: Callable[[str], torch.Tensor]
    ) -> dict[str, Any]:
        pattern = parts[0][1]
        converter = copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for key, source_pattern in parts:
            # a function stands for the tensor here: transformers calls it when it converts
            converter.add_tensor(first, key, source_pattern, cast(Any, partial(read, key)))
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _converted(self, name: str, first: str, parts: list[tuple[str, str]]) -> torch.Tensor:
        return self._convert(first, parts, self.checkpoint.tensor)[name]

    def _check_shape(self, name: str, key: str, found: tuple[int, ...]):
        expected, saved = self.meta[name], self.checkpoint.dtype(key)
        if found != tuple(expected.shape):
            raise ValueError(
                f"{self.checkpoint.place(key)}: {key!r} has shape {found}, but {type(self.model).__name__} of its "
                f"config.json expects {tuple(expected.shape)} for {name!r}"
            )
        if expected.is_floating_point() != saved.is_floating_point:
            raise ValueError(
                f"{self.checkpoint.place(key)}: {key!r} is saved as {saved}, but {type(self.model).__name__} expects "
                f"{'floating-point numbers' if expected.is_floating_point() else expected.dtype} for {name!r}. "
                "Give the checkpoint as it was before it was quantised"
            )

    def alias(self, name: str | None, source: str):
        """Read `name` from `source` where the checkpoint has only the latter."""
        if name in self.missing and source in self.sources:
            self.sources[name] = self.sources[source]
            self.missing.remove(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self.sources[name]()


def split_names(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, str]]:
    """(language model, tower): relative name -> name in `model`. For a causal LM the tower is empty."""
    prefix = f"{model.base_model_prefix}."
    core = cast(Any, model.base_model)
    if core is model:
        raise ValueError(f"{type(model).__name__} keeps its head and its body in one class: it can not be taken apart")
    multimodal = core.get_decoder() is not core
    inside = f"{prefix}{language_model_name(core)}." if multimodal else prefix
    head = _head_name(model)
    llm, tower = {}, {}
    for name in model.state_dict():
        if name.startswith(inside):
            llm[name.removeprefix(inside)] = name
        elif head is not None and name.startswith(f"{head}."):
            llm[f"{HEAD}.{name.removeprefix(f'{head}.')}"] = name
        elif multimodal and name.startswith(prefix):
            tower[name.removeprefix(prefix)] = name
        else:
            raise ValueError(f"{type(model).__name__}: {name!r} belongs neither to the language model nor to a tower")
    return llm, tower


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def delta_module_names(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linears and embeddings of a causal LM whose weight can carry a merged vector: relative name -> module."""
    prefix, head = f"{model.base_model_prefix}.", _head_name(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            found[HEAD if name == head else name.removeprefix(prefix)] = module
    return found
