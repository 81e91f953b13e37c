"""Weights on disk, opened lazily: one tensor is read when it is asked for.

Enters: a folder, or a Hub id with an optional @revision. Leaves: tensors in the dtype they were saved in.
Invariants: a path that an index names never leaves its folder, pickles are read with `weights_only`, and no tensor
with NaN or inf passes.
"""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from .hub_access import from_hub
from .pretrained import check_folder, naming, read_json

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# what a model may be stored in, by the names of recipes and commands
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# how safetensors spells them in a file's header
SAVED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_LISTED = 4
_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.yaml"]
# what LLaVA trains beside a LoRA lies in pickles, also where the LoRA is safetensors
_FETCHED += ["non_lora_trainables.bin", "mm_projector.bin"]


def fetch(source: str) -> Path:
    """The folder of a source: itself when it is one, else the Hub repository `id` or `id@revision`, downloaded.

    Raises ValueError when it is neither, or refused by the Hub; OSError where the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return folder
    repo_id, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        raise ValueError(f"{source!r} is no folder here, and no Hub id (org/name or org/name@revision) either")
    local = from_hub(source, lambda: _snapshot(repo_id, revision or None))
    check_folder(local)
    return local


def _snapshot(repo_id: str, revision: str | None) -> Path:
    """The repository's files, without pickles where it has safetensors."""
    local = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_FETCHED))
    if not any(local.glob("*.safetensors")):
        local = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*_FETCHED, "*.bin"]))
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
        self._opened = {path: open_file(path, inside, self.beside) for path in self.files}
        self._places: dict[str, Path] = {}
        self._finite: set[str] = set()  # of a mapped file; each tensor is looked through once
        for path, opened in self._opened.items():
            for key in opened.keys():
                if key in self._places:
                    raise ValueError(
                        f"{folder}: tensor {key!r} is both in {self._places[key].name} and in {path.name}"
                    )
                self._places[key] = path
                if not key.isprintable() or not key:
                    raise ValueError(f"{path}: a tensor is called {key[:80]!r}, which no tensor is. Download it again")
        if not self._places:
            raise ValueError(f"{self.named()}: no tensors in it. Download it again")
        lost = [key for key, name in named.items() if self._places.get(key) != folder / name]
        if lost:
            raise ValueError(
                f"{folder}: {found[0]} promises {len(lost)} tensors that its shards lack, such as {lost[0]!r} in "
                f"{named[lost[0]]!r}. Download both again"
            )

    def keys(self) -> list[str]:
        return list(self._places)

    def place(self, key: str) -> Path:
        """The file that holds it."""
        return self._places[key]

    def named(self) -> str:
        """Folder and weight files, for messages."""
        names = [path.name for path in self.files]
        return f"{self.folder} ({', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''})"

    def shape(self, key: str) -> tuple[int, ...]:
        opened = self._opened[self.place(key)]
        if isinstance(opened, dict):
            return tuple(opened[key].shape)
        return tuple(opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that it was saved in, without reading a value."""
        opened = self._opened[self.place(key)]
        if isinstance(opened, dict):
            return opened[key].dtype
        saved = opened.get_slice(key).get_dtype()
        if saved not in SAVED_DTYPES:
            raise ValueError(
                f"{self.place(key)}: tensor {key!r} is saved as {saved}, expected one of {list(SAVED_DTYPES)}. "
                "Save it again in one of them"
            )
        return SAVED_DTYPES[saved]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as saved. Raises ValueError that names the file when a float in it is NaN or infinite."""
        path = self._places[key]
        opened = self._opened[path]
        with naming(path):
            tensor = opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
        if key not in self._finite and not is_finite(tensor):
            broken = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{path}: tensor {key!r} holds {broken} values that are NaN or infinite, of {tensor.numel()}. "
                "A merge would spread them: mend or replace this checkpoint"
            )
        self._finite.add(key)
        return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity in it. One pass without a copy: NaN and infinities show in the extremes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    try:
        extremes = torch.stack(torch.aminmax(tensor))
    except RuntimeError:  # float8 has no order on the CPU
        extremes = tensor.float()
    return bool(torch.isfinite(extremes).all())


def _read_index(path: Path) -> dict[str, str]:
    with naming(f"{path}: not an index of shards"):
        named = read_json(path).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"its weight_map is {str(named)[:80]}, expected the file of each tensor")
    for name in named.values():
        plain = isinstance(name, str) and 0 < len(name) < 256 and not {"\\", "\0"} & set(name)
        if not plain or Path(name).name != name or Path(name).suffix != Path(path.name.split(".index")[0]).suffix:
            raise ValueError(
                f"{path}: names the file {str(name)[:80]!r}; shards must lie beside their index, and be of its kind"
            )
    return named


def open_file(path: Path, inside: tuple[str, ...] = (), beside: dict[str, Any] | None = None) -> Any:
    """The tensors of one file by name: an open safetensors file, or the dict of a pickle, mapped where it can be.

    A dict of a pickle may lie at one of the keys `inside`; what lies beside it comes into `beside`. Raises ValueError
    for a file that is truncated or broken, and for a pickle that is anything but a dict of plain tensors.
    """
    if path.suffix == ".safetensors":
        with naming(f"{path}: truncated or no safetensors file"):
            return safe_open(path, framework="pt")
    with naming(f"{path}: truncated, or no plain state dict of tensors"):
        try:
            loaded = _load_pickle(path)
        except pickle.UnpicklingError as error:  # torch's own words advise to read it with weights_only=False
            stranger = re.search(r"GLOBAL (\S+)", str(error))
            found = f"it asks for {stranger[1]}" if stranger else "it is no pickle of torch"
            raise ValueError(f"{found}, and nothing but tensors is read, since a pickle can run code") from error
    place = next((key for key in inside if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)), None)
    if place is not None:
        if beside is not None:
            beside.update({key: value for key, value in loaded.items() if key != place})
        loaded = loaded[place]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, expected a state dict: tensors by name")
    strangers = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and _is_plain(value))]
    if strangers:
        raise ValueError(f"{path}: expected a flat state dict of tensors, found other things at {strangers[:5]}")
    return {key: value.detach() for key, value in loaded.items()}


def _is_plain(value: Any) -> bool:
    """A dense tensor with values of its own."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    return value.device.type == "cpu" and not value.is_quantized


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\3\4"
    if not archive:  # of torch before 1.6; such files can not be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    _check_archive(path)
    return loaded


def _check_archive(path: Path):
    """Raises ValueError for an archive whose pickle is broken, or whose tensors do not lie in it as the pickle says.

    Mapped, an entry that is compressed or too short would be read as if the bytes that are there were the values.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("an entry is there twice. Save it again with torch.save")
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its entry {name!r} is compressed. Save it again with torch.save")
            archive.open(entry).close()  # compares the entry's own header with the list of entries
        place = next(name for name in entries if name.rpartition("/")[2] == "data.pkl")
        listed = _Storages(io.BytesIO(archive.read(place)))  # compares its checksum
        listed.load()
        for key, size in listed.sizes.items():
            found = entries[f"{place.removesuffix('data.pkl')}data/{key}"].file_size
            if found < size:
                raise ValueError(f"its entry data/{key} has {found} bytes, expected {size}. Download it again")


# of the classes by which pickles name storages; others are of bytes
_ITEM_SIZES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip


class _Storages(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The sizes of the storages that a pickle of torch names. What it would call is a `_Nothing`."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing(name)

    def persistent_load(self, what: Any) -> Any:
        _, kind, key, _, count = what
        self.sizes[key] = count * _ITEM_SIZES.get(kind.name, 1)
        return _Nothing(key)


class _Nothing:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any):
        """An entry, which is dropped."""

    def __setstate__(self, state: Any):
        """Attributes, which are dropped."""

    def append(self, value: Any):
        """A value, which is dropped."""

    def extend(self, values: Any):
        """Values, which are dropped."""
