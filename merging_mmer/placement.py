"""Where every tensor of a merged folder lies in its files, known before the first value is written.

Enters: the tensors to come, by name, dtype and shape, in their order, and the size of a shard. Leaves:
model.safetensors, or model-0000k-of-0000n.safetensors with model.safetensors.index.json, whose headers are written
first and whose bytes are filled in any order, by several threads or processes. Invariant: names, dtypes, shapes and
the size of a shard alone decide where a byte lies.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .checkpoints import SAVED_DTYPES
from .shards import INDEX, shard_names, size_in_bytes, write_index

_SAVED_NAMES = {dtype: name for name, dtype in SAVED_DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """The bytes of one tensor: `file` is the number of the shard, `offset` counts from the start of the file."""

    file: int
    offset: int
    nbytes: int


class Placement:
    """`places`: name -> Place. `files` are the names of the shards, `headers` what stands in front of their values."""

    def __init__(self, tensors: Sequence[Stored], max_shard_size: str | int):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the tensor {twice!r} is to be written twice")
        shards = _in_shards(tensors, size_in_bytes(max_shard_size))
        self.files = shard_names(len(shards))
        self.places: dict[str, Place] = {}
        self.headers: list[bytes] = []
        self.sizes: list[int] = []
        for number, shard in enumerate(shards):
            header, offsets = _header(shard)
            self.headers.append(header)
            for tensor, offset in zip(_sorted(shard), offsets, strict=True):
                self.places[tensor.name] = Place(number, len(header) + offset, tensor.nbytes)
            self.sizes.append(len(header) + sum(tensor.nbytes for tensor in shard))
        self.total_bytes = sum(tensor.nbytes for tensor in tensors)
        self.total_parameters = sum(prod(tensor.shape) for tensor in tensors)

    def shards(self) -> Iterator[tuple[str, bytes, int]]:
        """(name, header, size in bytes) of each file."""
        return zip(self.files, self.headers, self.sizes, strict=True)


def _in_shards(tensors: Iterable[Stored], limit: int) -> list[list[Stored]]:
    """In their order, a new shard where the next tensor would pass `limit` bytes."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _sorted(shard: Iterable[Stored]) -> list[Stored]:
    """Wide types first, so that every tensor is aligned to its type without a gap."""
    return sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, _SAVED_NAMES[tensor.dtype], tensor.name))


def _header(shard: Sequence[Stored]) -> tuple[bytes, list[int]]:
    """(length and JSON as safetensors has them, padded to 8 bytes; offsets behind them, in the order of `_sorted`)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for tensor in _sorted(shard):
        offsets.append(end)
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": _SAVED_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[-1], end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


class PlacedFiles:
    """The shards of a placement in `folder`, open for writing at any place, from any thread.

    keep: files that are there with the right header and size, from a run that was killed or made by another process,
    are gone on with. make: others are made anew; without it, they raise ValueError. Raises OSError where the disk has
    no room for all of them.
    """

    def __init__(self, folder: Path, placement: Placement, keep: bool = False, make: bool = True):
        self.folder, self.placement = folder, placement
        self._open: list[int] = []
        try:
            for name, header, size in placement.shards():
                self._take(folder / name, header, size, keep, make)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path, header: bytes, size: int, keep: bool, make: bool):
        there = keep and _is_there(path, header, size)
        if not there and not make:
            raise ValueError(f"{path} is not there as it was planned: the folder must be one that all nodes see")
        file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if there else os.O_TRUNC), 0o666)
        self._open.append(file)
        if not there:
            _allocate(file, size)
            _write_all(file, header, 0)

    @staticmethod
    def there(folder: Path, placement: Placement) -> bool:
        """Whether all files of the placement are in the folder, with their headers."""
        return all(_is_there(folder / name, header, size) for name, header, size in placement.shards())

    def write(self, name: str, values: Any, start: int = 0):
        """Put the bytes of `values` (anything with the buffer protocol, C-contiguous) at byte `start` of a tensor.

        Raises ValueError where they would pass its end, OSError that names the file where it cannot be written.
        """
        place, values = self.placement.places[name], memoryview(values).cast("B")
        if start < 0 or start + len(values) > place.nbytes:
            raise ValueError(f"{name}: bytes {start} to {start + len(values)} of a tensor of {place.nbytes}")
        try:
            _write_all(self._open[place.file], values, place.offset + start)
        except OSError as error:
            path = self.folder / self.placement.files[place.file]
            raise OSError(error.errno, error.strerror, str(path)) from error

    def add(self, name: str, tensor: torch.Tensor):
        """The whole of a tensor. Raises ValueError where its size is another than was planned."""
        tensor = tensor.detach().contiguous().cpu()
        place = self.placement.places[name]
        if tensor.nbytes != place.nbytes:
            raise ValueError(f"{name}: {tensor.nbytes} bytes where {place.nbytes} were planned")
        if tensor.nbytes:
            self.write(name, tensor.reshape(-1).view(torch.uint8).numpy())

    def close(self):
        while self._open:
            os.close(self._open.pop())

    def finish(self) -> list[Path]:
        """Close the files and write their index where there are several; the paths of all that was written."""
        self.close()
        written = [self.folder / name for name in self.placement.files]
        if len(written) > 1:
            plan = self.placement
            places = {name: place.file for name, place in plan.places.items()}
            written.append(write_index(self.folder, places, plan.files, plan.total_bytes, plan.total_parameters))
        return written


def _is_there(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _allocate(file: int, size: int):
    """Where the system can, take the room now: a full disk is told at the start, not in the middle."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def _write_all(file: int, values: Any, offset: int):
    values = memoryview(values)
    while len(values):
        done = os.pwrite(file, values, offset)
        values, offset = values[done:], offset + done


__all__ = ["INDEX", "Place", "PlacedFiles", "Placement", "Stored"]
