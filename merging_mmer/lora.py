"""PEFT LoRA adapters: the low-rank change they make to each tensor.

Enters: a folder with adapter_config.json and adapter_model.safetensors (or .bin). Leaves: per tensor the dense
τ = s·B·A in fp32 with s = alpha / r (rsLoRA: alpha / √r), or the factors (s·B, A). Invariants: A and B are only ever
multiplied, never merged apart; every tensor of the adapter is used, or ValueError lists those that are not.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints import ADAPTER_FILES, Checkpoint, fetch
from .task_vectors import one_thread

CONFIG_FILE = "adapter_config.json"

_WRAPPER = "base_model.model."
# things a LoRA config can ask for that change what the tensors mean
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on B (lora_bias)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
}
# fields that say how an adapter was trained or where it belongs, or that are read here
_KNOWN = {
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices",
    "ensure_weight_tying", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "qalora_group_size", "runtime_config", "megatron_config", "megatron_core", "lora_dtype",
    "lorap_lr_ratio",
}  # fmt: skip
# initialisations that change the base's weights, so that B·A alone is not the difference to the base
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.[^.]+)??(\.weight)?$")
_TOKENS = re.compile(r"^(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?$")
# modules_to_save and resized embeddings, in the spellings of old and new PEFT
_WRAPPED = re.compile(r"\.(modules_to_save|original_module|base_layer)(?=\.)")

Resolve = Callable[[str], str | None]


@dataclass
class _Factors:
    a: str = ""
    b: str = ""
    scale: float = 0.0
    embedding: bool = False


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def adapters_inside(folder: Path) -> list[str]:
    """The sub-folders that hold an adapter: PEFT saves all but the one named `default` so."""
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/{CONFIG_FILE}"))


def fetch_adapter(source: str) -> Path:
    """The folder of an adapter: a folder, or a Hub id that may go on with a sub-folder (org/name/adapter@revision).

    Raises ValueError when there is none of this name.
    """
    repo, _, revision = source.partition("@")
    parts = repo.split("/")
    if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")) or len(parts) < 3:
        return fetch(source)
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{source!r} is no folder here, and no Hub id with a sub-folder either")
    repo = "/".join(parts[:2])
    try:
        whole = fetch(f"{repo}@{revision}" if revision else repo)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is no folder here, and as a sub-folder of a Hub repository it cannot be fetched: {error}"
        ) from error
    folder = whole.joinpath(*parts[2:])
    if not is_adapter(folder):
        raise ValueError(f"{source!r}: {repo} holds no adapter there; found adapters in {adapters_inside(whole)}")
    return folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA. Raises ValueError that names the method or the feature of any other."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')!r}, only LORA adapters can be merged")
    for field, meaning in _REFUSED.items():
        if config.get(field):
            raise ValueError(f"{folder}: {meaning} is not supported ({field}). Merge the adapter into its model first")
    if strange := sorted(field for field, value in config.items() if value and field not in _KNOWN | set(_REFUSED)):
        raise ValueError(
            f"{folder}: adapter_config.json sets {strange}, which are not known here and may change what its tensors "
            "mean. Merge the adapter into its model first, or take out what only concerned training"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        raise ValueError(
            f"{folder}: initialised by {start!r}, which changed the base's weights. Save it again with "
            "path_initial_model_for_weight_conversion, or merge the adapter into its model first"
        )
    return config


class LoraAdapter:
    """The tensors of one adapter by the name of the tensor they change, as `resolve` gives it.

    `resolve` takes the name of a tensor in the model that was trained ("model.layers.0.self_attn.q_proj.weight")
    and gives the name that the caller knows it by, or None. `changed` are all those names. Settings and tensors that
    do not lie in the folder as PEFT writes them are given as `config` and `checkpoint`.
    """

    def __init__(
        self,
        folder: Path,
        resolve: Resolve,
        config: dict[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        self.config = read_adapter_config(folder) if config is None else config
        self.checkpoint = Checkpoint(folder, ADAPTER_FILES) if checkpoint is None else checkpoint
        self._factors: dict[str, _Factors] = {}
        self._replaced: dict[str, str] = {}
        self._rows: dict[str, tuple[list[int], str]] = {}
        strangers = [key for key in self.checkpoint.keys() if not self._take(key, resolve)]
        if strangers:
            raise ValueError(
                f"{folder}: {len(strangers)} tensors of the adapter fit nothing in the model it is for: "
                f"{strangers[:8]}. Is the tower (or base_model_name_or_path) the model it was trained on?"
            )
        for name, factors in self._factors.items():
            if not (factors.a and factors.b):
                raise ValueError(f"{folder}: {name!r} has only one of lora_A and lora_B; the adapter is incomplete")

    @property
    def changed(self) -> set[str]:
        return {*self._factors, *self._replaced, *self._rows}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each tensor that has factors."""
        return {name: self.checkpoint.shape(entry.a)[0] for name, entry in self._factors.items()}

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(s·B (out, r), A (r, in)), fp32. For an embedding (rows, hidden), B·A of the adapter is transposed."""
        entry = self._factors[name]
        a, b = self.checkpoint.tensor(entry.a).float(), self.checkpoint.tensor(entry.b).float()
        return (a.T * entry.scale, b.T) if entry.embedding else (b * entry.scale, a)

    def delta(self, name: str) -> torch.Tensor | None:
        """τ = s·B·A in fp32, or None where the adapter has no low-rank change."""
        if name not in self._factors:
            return None
        b, a = self.factors(name)
        with one_thread():
            return b @ a

    def replace(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, or what modules_to_save and trained tokens put in its place."""
        if name in self._replaced:
            tensor = self.checkpoint.tensor(self._replaced[name])
        if name in self._rows:
            indices, key = self._rows[name]
            rows = self.checkpoint.tensor(key)
            tensor = tensor.to(torch.promote_types(tensor.dtype, rows.dtype)).clone()
            tensor[indices] = rows.to(tensor.dtype)
        return tensor

    def _take(self, key: str, resolve: Resolve) -> bool:
        path = key.removeprefix(_WRAPPER)
        if match := _FACTOR.match(path):
            return self._take_factor(key, match, resolve)
        if match := _TOKENS.match(path):
            name = resolve(f"{match['module']}.weight")
            indices = self._token_indices(match["module"])
            if name is None or indices is None or len(indices) != self.checkpoint.shape(key)[0]:
                return False
            self._rows[name] = (indices, key)
            return True
        for spelling in _spellings(path):
            name = resolve(spelling)
            if name is not None and name not in self._replaced:
                self._replaced[name] = key
                return True
        return False

    def _take_factor(self, key: str, match: re.Match, resolve: Resolve) -> bool:
        name = resolve(f"{match['module']}.weight")
        shape = self.checkpoint.shape(key)
        if name is None or len(shape) != 2:
            return False
        entry = self._factors.setdefault(name, _Factors(embedding=bool(match["embedding"])))
        rank = shape[0] if match["side"] == "A" else shape[1]
        expected = _of_pattern(self.config.get("rank_pattern"), match["module"], self.config["r"])
        if rank != expected:
            raise ValueError(
                f"{self.checkpoint.folder}: {key!r} has shape {shape}, but its configuration "
                f"gives its module rank {expected}"
            )
        alpha = _of_pattern(self.config.get("alpha_pattern"), match["module"], self.config["lora_alpha"])
        entry.scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        side = "a" if match["side"] == "A" else "b"
        if getattr(entry, side):
            return False
        setattr(entry, side, key)
        return True

    def _token_indices(self, module: str) -> list[int] | None:
        trained = self.config.get("trainable_token_indices")
        if isinstance(trained, dict):
            return next(
                (rows for name, rows in trained.items() if module == name or module.endswith(f".{name}")), None
            )
        return trained


def _spellings(path: str) -> list[str]:
    """A saved name, then without PEFT's wrapper, then without the adapter's name behind it as well."""
    wrapper = _WRAPPED.search(path)
    if wrapper is None:
        return [path]
    before, after = path[: wrapper.start()], path[wrapper.end() + 1 :]
    return [path, f"{before}.{after}", f"{before}.{after.partition('.')[2]}"]


def _of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern (a regular expression) that is the module's name, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
