"""PEFT LoRA adapters: the low-rank change they make to each tensor.

Enters: a folder with adapter_config.json and adapter_model.safetensors (or .bin). Leaves: per tensor the dense
τ = s·B·A in fp32 with s = alpha / r (rsLoRA: alpha / √r), or the factors (s·B, A). Invariants: A and B are only ever
multiplied, never merged apart; every tensor of the adapter is used, or ValueError lists those that are not.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints import ADAPTER_FILES, Checkpoint, fetch
from .pretrained import naming, read_json
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

# more than any adapter has; a number of another size is no rank, whatever the file says
_LARGEST_RANK, _LARGEST_ALPHA = 1 << 20, 1e9
# what makes a search take time without end: a group that repeats, and many parts that may be of any length
_REPEATED_GROUP = re.compile(r"\)[*+{]|\(\?[^:]|\\[1-9]")
_MOST_REPEATS, _MOST_OPTIONS, _LONGEST_PATTERN = 4, 8, 4096


def _is_table(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_rows(value: Any) -> bool:
    """trainable_token_indices: rows, or rows by module."""
    if isinstance(value, dict):
        return all(isinstance(rows, list) and _are_rows(rows) for rows in value.values())
    return value is None or (isinstance(value, list) and all(map(_is_index, value)))


_WANTED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("r", "a rank from 1", lambda value: _is_rank(value)),
    ("lora_alpha", "a positive number", lambda value: _is_alpha(value)),
    ("use_rslora", "true or false", lambda value: value is None or isinstance(value, bool)),
    ("rank_pattern", "ranks by pattern", _is_table),
    ("alpha_pattern", "numbers by pattern", _is_table),
    ("trainable_token_indices", "rows, or rows by module", _are_rows),
    ("base_model_name_or_path", "a name", lambda value: isinstance(value, str | None)),
)

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
    config = read_json(folder / CONFIG_FILE)
    with naming(folder / CONFIG_FILE):
        return _plain_lora(folder, config)


def _plain_lora(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}, only LORA adapters can be merged")
    for field, meaning in _REFUSED.items():
        if config.get(field):
            raise ValueError(f"{meaning} is not supported ({field}). Merge the adapter into its model first")
    if strange := sorted(field for field, value in config.items() if value and field not in _KNOWN | set(_REFUSED)):
        raise ValueError(
            f"adapter_config.json sets {strange}, which are not known here and may change what its tensors "
            "mean. Merge the adapter into its model first, or take out what only concerned training"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        raise ValueError(
            f"initialised by {start!r}, which changed the base's weights. Save it again with "
            "path_initial_model_for_weight_conversion, or merge the adapter into its model first"
        )
    for field, what, good in _WANTED:
        if field in config and not good(config[field]):
            raise ValueError(f"{field} is {str(config[field])[:80]!r}, expected {what}")
    for patterns, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        for pattern, value in (config.get(patterns) or {}).items():
            if not good(value):
                raise ValueError(f"{patterns} has {str(value)[:80]!r} for {pattern!r}, expected a positive number")
            _compiled(pattern)
    if missing := [field for field in ("r", "lora_alpha") if field not in config]:
        raise ValueError(f"lacks {missing}, which say what its tensors mean")
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= _LARGEST_ALPHA


def _compiled(pattern: str) -> re.Pattern:
    """A pattern of modules. Raises ValueError for one that is none, or whose search may take for ever."""
    plain = pattern.replace("(?:", "(").replace("\\\\", "")
    repeats, options = len(re.findall(r"[*+{]", plain)), plain.count("?")
    if (
        _REPEATED_GROUP.search(plain)
        or repeats > _MOST_REPEATS
        or options > _MOST_OPTIONS
        or len(plain) > _LONGEST_PATTERN
    ):
        raise ValueError(
            f"the pattern {pattern[:80]!r} repeats a group or has many parts of any length, on which a search may "
            "take for ever: name the modules instead"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


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
                f"{self.checkpoint.named()}: {len(strangers)} tensors of the adapter fit nothing in the model it is "
                f"for: {strangers[:8]}. Is the tower (or base_model_name_or_path) the model it was trained on?"
            )
        for name, factors in self._factors.items():
            if not (factors.a and factors.b):
                raise ValueError(
                    f"{self.checkpoint.named()}: {name!r} has only one of lora_A and lora_B; the adapter is incomplete"
                )

    @property
    def changed(self) -> set[str]:
        return {*self._factors, *self._replaced, *self._rows}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each tensor that has factors."""
        return {name: self.checkpoint.shape(entry.a)[0] for name, entry in self._factors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the change of each tensor that has factors."""
        ends = {
            name: (self.checkpoint.shape(entry.b), self.checkpoint.shape(entry.a), entry.embedding)
            for name, entry in self._factors.items()
        }
        return {name: (a[1], b[0]) if embedding else (b[0], a[1]) for name, (b, a, embedding) in ends.items()}

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
            if max(indices, default=0) >= len(tensor) or rows.shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"{self.checkpoint.place(key)}: {key!r} has shape {tuple(rows.shape)} for the rows up to "
                    f"{max(indices, default=0)} of a tensor of shape {tuple(tensor.shape)}"
                )
            tensor = tensor.to(torch.promote_types(tensor.dtype, rows.dtype)).clone()
            tensor[indices] = rows.to(tensor.dtype)
        return tensor

    def _take(self, key: str, resolve: Resolve) -> bool:
        if not (dtype := self.checkpoint.dtype(key)).is_floating_point:
            raise ValueError(
                f"{self.checkpoint.place(key)}: {key!r} is saved as {dtype}, expected floating-point numbers"
            )
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
                f"{self.checkpoint.place(key)}: {key!r} has shape {shape}, but {CONFIG_FILE} "
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
        if _compiled(pattern).match(module):
            return value
    return default
