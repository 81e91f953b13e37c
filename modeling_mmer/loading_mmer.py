"""Weights that a file has as the model wants them, taken as they are.

Enters: a model on the meta device, and weight files. Leaves: the same model with its tensors, as transformers' own
loading leaves it, and that loading's report. transformers prepares a conversion for each tensor, regular expressions
and a thread's job included; a merged folder has many small tensors, and most need none. Invariant: a tensor that is
to be renamed, cast, moved, divided, quantised or refused goes transformers' own way.
"""

import inspect
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import initialization as init
from transformers import modeling_utils

_ASKED = ("model", "state_dict", "checkpoint_files", "load_config")  # what transformers' own loading is given first


def no_values_on_meta() -> AbstractContextManager:
    """What is built on the meta device has no values, and drawing them for nothing takes a third of the building."""
    return init.no_init_weights() if torch.get_default_device().type == "meta" else nullcontext()


class DirectLoading:
    """Mixed into the model, in front of PreTrainedModel."""

    @staticmethod
    def _load_pretrained_model(*given, **named):
        stock = modeling_utils.PreTrainedModel._load_pretrained_model
        asked = inspect.signature(stock)
        if tuple(asked.parameters)[: len(_ASKED)] != _ASKED:  # a transformers that loads in another way
            return stock(*given, **named)
        model, state_dict, checkpoint_files, load_config, *others = asked.bind(*given, **named).args
        taken: set[str] = set()
        with ExitStack() as opened:
            if state_dict is None and _as_they_are(checkpoint_files, load_config):
                files = [opened.enter_context(safe_open(path, framework="pt")) for path in checkpoint_files]
                taken, state_dict = _take(model, files, load_config.weight_mapping or [])
                checkpoint_files = None
            report, offloaded = stock(model, state_dict, checkpoint_files, load_config, *others)
        report.missing_keys.difference_update(taken)
        report.unexpected_keys.difference_update(model.restore_adapter_routes(report.unexpected_keys))
        return report, offloaded


def _take(model: Any, files: list[Any], transforms: list[Any]) -> tuple[set[str], dict[str, Any]]:
    """(names of the tensors that were put into the model, the others by name, not read yet)."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    taken, rest, renamed = set(), {}, _Renaming(transforms)
    for file in files:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            place: Any = parameters.get(name)
            tensor: Any = None
            if type(place) is nn.Parameter and place.is_meta and not renamed(name):
                tensor = file.get_tensor(name)
            if tensor is None or tensor.shape != place.shape or tensor.dtype != place.dtype:
                rest[name] = file.get_slice(name)
                continue
            module, _, leaf = name.rpartition(".")
            loaded: Any = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            loaded._is_hf_initialized = True  # else it would be initialised anew
            modules[module]._parameters[leaf] = loaded
            taken.add(name)
    return taken, rest


def _as_they_are(files: Any, load_config: Any) -> bool:
    """Whether tensors of these files may be taken unchanged, mapped into memory."""
    devices = set(map(str, (load_config.device_map or {"": "cpu"}).values()))
    # there a mapped file can stand still
    on_mount = getattr(modeling_utils, "_is_on_hf_mount", lambda path: False)
    return (
        load_config.hf_quantizer is None
        and load_config.device_mesh is None
        and not load_config.dtype_plan
        and not load_config.disable_mmap
        and devices == {"cpu"}
        and sys.platform != "win32"
        and bool(files)
        and all(str(path).endswith(".safetensors") and not on_mount(path) for path in files)
    )


class _Renaming:
    """Whether any of a loading's transforms has another name for a tensor."""

    def __init__(self, transforms: list[Any]):
        self.transforms = transforms
        self.of_part: dict[str, list[Any]] = {}

    def __call__(self, name: str) -> bool:
        part = ".".join(name.split(".")[:3]) + "."  # an expert's encoders, or the language model's layers
        if part not in self.of_part:
            self.of_part[part] = [transform for transform in self.transforms if _concerns(transform, part)]
        return any(transform.rename_source_key(name)[1] is not None for transform in self.of_part[part])


def _concerns(transform: Any, part: str) -> bool:
    """Most transforms are for the submodule of one prefix, with the model's own in front of it or without."""
    scope = getattr(transform, "scope_prefix", None)
    if not scope:
        return True
    starts = f"{scope}.", f"{transform.base_model_prefix}.{scope}."
    return any(part.startswith(start) or start.startswith(part) for start in starts)
