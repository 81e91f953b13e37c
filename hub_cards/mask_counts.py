"""The ones in the masks of a merged folder, counted by layer and kind of matrix, and between each two experts.

Enters: a merged folder. Leaves: `MaskCounts`. Masks are uint8 (experts, out, ceil(in/8)), whose bits behind the last
column are 0. Invariant: the files are read block by block; no whole mask, and never a weight, is in memory.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

_BLOCK = 1 << 25  # bytes
_PREFIX = "model.language_model."
_NAME = re.compile(r"(?:(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\.)?(?P<kind>.+)")
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def ones(mask: np.ndarray) -> int:
    """How many bits of a uint8 array are 1."""
    counted = np.bitwise_count(mask) if hasattr(np, "bitwise_count") else _ONES[mask]
    return int(counted.sum(dtype=np.int64))


@dataclass
class MaskCounts:
    """`by_matrix`: (kind, layer; None of what lies in no layer) -> the ones of each expert; `entries`: of how many.

    `both` (experts, experts): ones that two experts have in the same places; on the diagonal an expert's own.
    """

    experts: list[str]
    both: np.ndarray
    by_matrix: dict[tuple[str, int | None], list[int]] = field(default_factory=dict)
    entries: dict[tuple[str, int | None], int] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Those that lie in layers, in the order in which they do."""
        return list(dict.fromkeys(kind for kind, layer in self.by_matrix if layer is not None))

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.by_matrix if layer is not None})

    @property
    def outside(self) -> list[str]:
        return [kind for kind, layer in self.by_matrix if layer is None]

    def density(self, expert: int, kind: str, layer: int | None) -> float:
        """NaN where there is no such matrix."""
        of = self.entries.get((kind, layer), 0)
        return self.by_matrix[kind, layer][expert] / of if of else float("nan")

    def grid(self, expert: int) -> np.ndarray:
        """Densities (kinds, layers)."""
        return np.array([[self.density(expert, kind, layer) for layer in self.layers] for kind in self.kinds])

    def overlap(self) -> np.ndarray:
        """Of two experts' ones, the share that both have (Jaccard); NaN where neither has any."""
        own = np.diag(self.both)
        either = own[:, None] + own[None, :] - self.both
        return np.divide(self.both, either, out=np.full(either.shape, np.nan), where=either > 0)


def count_masks(folder: Path, experts: list[str], modules: list[str]) -> MaskCounts | None:
    """None where the folder has no masks. `modules`: the matrices with a delta, as config.json has them.

    Raises ValueError for masks of another number of experts.
    """
    counts = MaskCounts(experts, np.zeros((len(experts), len(experts)), dtype=np.int64))
    for module, masks, delta in _masks(folder, modules):
        count, rows, width = masks.get_shape()
        if count != len(experts):
            raise ValueError(f"{module} has masks of {count} experts, expected {len(experts)}: {experts}")
        columns = delta.get_shape()[1]
        own = np.zeros(count, dtype=np.int64)
        step = max(1, _BLOCK // max(1, count * width))
        for start in range(0, rows, step):
            block = masks[:, start : min(start + step, rows)]
            for i in range(count):
                for j in range(i, count):
                    both = ones(block[i] & block[j])
                    counts.both[i, j] += both
                    if i == j:
                        own[i] += both
                    else:
                        counts.both[j, i] += both
        match = _NAME.fullmatch(module)
        assert match is not None
        place = match["kind"], int(match["layer"]) if match["layer"] else None
        before = counts.by_matrix.get(place, [0] * count)
        counts.by_matrix[place] = [a + int(b) for a, b in zip(before, own)]
        counts.entries[place] = counts.entries.get(place, 0) + rows * columns
    return counts if counts.by_matrix else None


def _masks(folder: Path, modules: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """(module, slice of its masks, slice of its delta) of every module that has masks."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", "numpy") as opened:
            placed = dict.fromkeys(opened.keys(), "model.safetensors")
    files: dict[str, Any] = {}

    def part(name: str) -> Any:
        if placed[name] not in files:
            files[placed[name]] = safe_open(folder / placed[name], "numpy")
        return files[placed[name]].get_slice(name)

    for module in modules:
        for name in (_PREFIX + module, module):  # the head stands beside the language model
            if f"{name}.masks" in placed:
                yield module, part(f"{name}.masks"), part(f"{name}.delta")
