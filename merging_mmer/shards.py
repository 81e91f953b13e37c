"""Writing a checkpoint as it comes: shards of safetensors that fill one after another, and their index.

Enters: tensors by name, one at a time. Leaves: model.safetensors, or model-0000k-of-0000n.safetensors with
model.safetensors.index.json. Invariant: what is written depends on the names, the values and the shard size alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def size_in_bytes(size: str | int) -> int:
    """Bytes: 2_000_000_000 for "2GB", 536_870_912 for "512MiB". Raises ValueError for anything else or below 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise ValueError(f"max_shard_size is {size!r}, expected a size such as '2GB', '500MB' or '1GiB'")
    return int(float(match[1]) * _UNITS[unit])


def shard_names(count: int) -> list[str]:
    """The names that transformers gives to so many weight files."""
    return (
        ["model.safetensors"]
        if count == 1
        else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    )


def write_index(
    folder: Path, places: Mapping[str, int], names: Sequence[str], total_bytes: int, total_parameters: int
) -> Path:
    """model.safetensors.index.json. `places`: tensor -> the number of its file in `names`."""
    index = {
        "metadata": {"total_size": total_bytes, "total_parameters": total_parameters},
        "weight_map": {name: names[shard] for name, shard in sorted(places.items())},
    }
    path = folder / INDEX
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path


class ShardWriter:
    """Collects tensors, and writes a shard when the next would pass `max_shard_size`. `close` names the files."""

    def __init__(self, folder: Path, max_shard_size: str | int):
        self.folder, self.limit = folder, size_in_bytes(max_shard_size)
        self.places: dict[str, int] = {}
        self.total_bytes = self.total_parameters = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards = 0

    def _count(self, name: str, tensor: torch.Tensor, shard: int):
        self.places[name] = shard
        self.total_bytes += tensor.nbytes
        self.total_parameters += tensor.numel()

    def add(self, name: str, tensor: torch.Tensor):
        if name in self.places:
            raise ValueError(f"the tensor {name!r} was written twice")
        # memory of its own: safetensors refuses tensors that share it, and a slice would hold its whole parent alive
        tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self._pending and self._pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self._count(name, tensor, self._shards)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def _partial(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.partial"

    def _flush(self):
        save_file(self._pending, self._partial(self._shards), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0
        self._shards += 1

    def close(self) -> list[Path]:
        """Write what is left, give the shards their final names, and write the index when there are several."""
        if self._pending or not self._shards:
            self._flush()
        names = shard_names(self._shards)
        for shard, name in enumerate(names):
            self._partial(shard).rename(self.folder / name)
        written = [self.folder / name for name in names]
        if len(names) > 1:
            write_index(self.folder, self.places, names, self.total_bytes, self.total_parameters)
        return written
