"""Weights on disk, opened lazily: one tensor is read when it is asked for.

Enters: a folder, or a Hub id with an optional @revision. Leaves: tensors in the dtype they were saved in.
Invariants: a path that an index names never leaves its folder, pickles are read with `weights_only`, and no tensor
with NaN or inf passes.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# how safetensors spells them in a file's header
SAVED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.yaml"]
# what LLaVA trains beside a LoRA lies in pickles, also where the LoRA is safetensors
_FETCHED += ["non_lora_trainables.bin", "mm_projector.bin"]


def fetch(source: str) -> Path:
    """The folder of a source: itself when it is one, else the Hub repository `id` or `id@revision`, downloaded.

    Raises ValueError when it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    repo_id, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        raise ValueError(f"{source!r} is no folder here, and no Hub id (org/name or org/name@revision) either")
    local = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=_FETCHED))
    if not any(local.glob("*.safetensors")):
        local = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[*_FETCHED, "*.bin"]))
    return local


class Checkpoint:
    """The tensors of a folder, under the names they were saved with. `files` are the weight files, in order.

    The state dict of a pickle may lie at one of the keys `inside`; what lies beside it is then in `beside`.
    """

    def __init__(self, folder: Path, wanted: tuple[str, ...] = MODEL_FILES, inside: tuple[str, ...] = ()):
        self.folder = folder
        self.beside: dict[str, Any] = {}
        found = [name for name in wanted if (folder / name).is_file()]
        if not found:
            there = sorted(path.name for path in folder.iterdir())[:12]
            raise ValueError(f"{folder}: no weights. Expected one of {list(wanted)}, found {there}")
        named: dict[str, str] = {}
        if found[0].endswith(".index.json"):
            named = _read_index(folder / found[0])
            self.files = [folder / name for name in sorted(set(named.values()))]
            missing = [path.name for path in self.files if not path.is_file()]
            if missing:
                raise ValueError(
                    f"{folder}: {found[0]} names {missing}, which are not there. Download the missing shards"
                )
        else:
            self.files = [folder / found[0]]
        self._opened = {path: _open(path, inside, self.beside) for path in self.files}
        self._places: dict[str, Path] = {}
        for path, opened in self._opened.items():
            for key in opened.keys():
                if key in self._places:
                    raise ValueError(
                        f"{folder}: tensor {key!r} is both in {self._places[key].name} and in {path.name}"
                    )
                self._places[key] = path
        lost = [key for key, name in named.items() if self._places.get(key) != folder / name]
        if lost:
            raise ValueError(
                f"{folder}: {found[0]} promises {len(lost)} tensors that its shards lack, such as {lost[:3]}"
            )

    def keys(self) -> list[str]:
        return list(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        opened = self._opened[self._places[key]]
        if isinstance(opened, dict):
            return tuple(opened[key].shape)
        return tuple(opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that it was saved in, without reading a value."""
        opened = self._opened[self._places[key]]
        if isinstance(opened, dict):
            return opened[key].dtype
        return SAVED_DTYPES[opened.get_slice(key).get_dtype()]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as saved. Raises ValueError that names the file when a float in it is NaN or infinite."""
        path = self._places[key]
        opened = self._opened[path]
        tensor = opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            broken = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{path}: tensor {key!r} holds {broken} values that are NaN or infinite, of {tensor.numel()}. "
                "A merge would spread them: mend or replace this checkpoint"
            )
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    try:
        named = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards (no weight_map could be read): {error!r}") from error
    for name in named.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{path}: names the file {name!r}; shards must lie beside their index")
    return named


def _open(path: Path, inside: tuple[str, ...], beside: dict[str, Any]) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or no safetensors file ({error}). Download it again") from error
    try:
        loaded = _load_pickle(path)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: truncated, or no plain state dict of tensors ({error}). Download it again"
        ) from error
    place = next((key for key in inside if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)), None)
    if place is not None:
        beside.update({key: value for key, value in loaded.items() if key != place})
        loaded = loaded[place]
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise ValueError(f"{path}: expected a flat state dict of tensors, found other things at {strangers[:5]}")
    return loaded


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    # files of torch before 1.6 are no zip archives and can not be mapped
    return torch.load(path, map_location="cpu", weights_only=True)
