"""What a merge will do, part by part, before it does anything: each tensor's fate, its place, the size of it all.

Enters: the opened base and experts, the settled recipe, the vocabulary. Leaves: `Part`s in the order of the folder,
each with the tensors that it writes. Whether an expert changed a tensor is found by looking: the first difference ends
the search. Invariant: parts do not depend on one another, so that they may be done in any order and anywhere.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from threading import Event
from typing import Literal

import torch

from .experts import Base, Expert
from .naming import HEAD, stored_name
from .placement import Placement, Stored
from .recipe import Recipe
from .task_rows import TaskRows

Kind = Literal["same", "matrix", "small", "rows", "tower"]


@dataclass(frozen=True)
class Part:
    """One piece of work. `name`: a tensor of the LLM by the base's name, "added_rows", or `expert:tensor` of a tower.

    `reads`: bytes that are read for it. `peak`: bytes of memory that a worker needs for it, at most.
    """

    name: str
    kind: Kind
    stored: tuple[Stored, ...]
    reads: int = 0
    peak: int = 0
    expert: str = ""


@dataclass
class MergePlan:
    """What `mmer merge --dry-run` tells: the parts, where their tensors lie, what a run reads, writes and holds."""

    parts: list[Part]
    placement: Placement
    threads: int = 1
    warnings: list[str] = field(default_factory=list)

    @property
    def reads(self) -> int:
        return sum(part.reads for part in self.parts)

    @property
    def memory(self) -> int:
        """Bytes that the workers hold at once, at most: the largest parts together."""
        return sum(sorted((part.peak for part in self.parts), reverse=True)[: self.threads])


def changed_tensors(
    base: Base, experts: Sequence[Expert], tokens: int, threads: int, stop: Event | None = None
) -> set[str]:
    """The tensors of the LLM that some expert changed. Once `stop` is set, none are looked at any more."""

    def changed(name: str) -> bool:
        if stop is not None and stop.is_set():
            return False
        theta_0 = base.tensor(name)
        if theta_0.ndim == 2:
            return any(TaskRows(expert, name, theta_0, tokens).changes() for expert in experts)
        return any(bool(expert.task_vector(name, theta_0, tokens).any()) for expert in experts)

    with ThreadPoolExecutor(threads) as pool:
        return {name for name, found in zip(base.names, pool.map(changed, base.names), strict=True) if found}


@dataclass(frozen=True)
class Planner:
    recipe: Recipe
    base: Base
    experts: Sequence[Expert]
    dtype: torch.dtype
    rank: int
    block: int

    def parts(self, changed: set[str], rows: Iterable[Stored]) -> list[Part]:
        """`rows`: the matrices of added tokens."""
        made = [self._language_model(name, name in changed) for name in self.base.names]
        if rows := tuple(rows):
            made.append(Part("added_rows", "rows", rows, peak=2 * sum(stored.nbytes for stored in rows)))
        for expert in self.experts:
            made += [self._tower(expert, name) for name in expert.tower]
        return made

    def _tower(self, expert: Expert, name: str) -> Part:
        meta = expert.weights.meta[expert.tower[name]]
        stored = Stored(f"model.experts.{expert.name}.{name}", expert.tower_dtype(name), tuple(meta.shape))
        return Part(f"{expert.name}:{name}", "tower", (stored,), stored.nbytes, 0, expert.name)

    def _language_model(self, name: str, changed: bool) -> Part:
        shape, place = self.base.shapes[name], stored_name(name)
        theta_0 = Stored(place, self.dtype, shape)
        if not changed:
            return Part(name, "same", (theta_0,), theta_0.nbytes)
        reads = theta_0.nbytes * (1 + len(self.experts))
        if name in self.base.delta_weights:
            return Part(name, "matrix", (theta_0, *self._matrix(place, shape)), reads, self._peak(shape))
        if name.startswith(f"{HEAD}."):
            raise ValueError(
                f"{name}: an expert changed the bias of the head, which the merged model has no place for"
            )
        prefix, _, leaf = place.rpartition(".")
        own = Stored(f"{prefix}.expert_{leaf}", self.dtype, (len(self.experts), *shape))
        joint = Stored(f"{prefix}.merged_{leaf}", self.dtype, shape)
        return Part(name, "small", (theta_0, own, joint), reads, 4 * prod(shape) * (4 + 2 * len(self.experts)))

    def _matrix(self, place: str, shape: tuple[int, ...]) -> list[Stored]:
        (rows, columns), count = shape, len(self.experts)
        prefix, decoupling = place.removesuffix(".weight"), self.recipe.decoupling
        made = [Stored(f"{prefix}.delta", self.dtype, shape)]
        if decoupling.kind in ("mask", "paper"):
            made.append(Stored(f"{prefix}.masks", torch.uint8, (count, rows, -(-columns // 8))))
        if decoupling.kind == "mask" and decoupling.scale != "none":
            made.append(Stored(f"{prefix}.scales", self.dtype, (count, rows if decoupling.scale == "row" else 1)))
        rank = min(self.rank, rows, columns)
        if decoupling.kind == "exact" or (decoupling.kind == "mask" and rank):
            made.append(Stored(f"{prefix}.correction_a", self.dtype, (count, rank, columns)))
            made.append(Stored(f"{prefix}.correction_b", self.dtype, (count, rows, rank)))
        return made

    def _peak(self, shape: tuple[int, ...]) -> int:
        """Blocks, sums of the rows, and with corrections what the second pass holds: τ*, masks, a residual and the
        work on it."""
        (rows, columns), count, decoupling = shape, len(self.experts), self.recipe.decoupling
        peak = 8 * self.block + 4 * (count + 4) * columns + 8 * rows * (10 * count + 3)
        rank = min(self.rank, rows, columns)
        late = decoupling.kind == "mask" and (rank or decoupling.scale == "tensor")
        if late:
            peak += rows * columns * self.dtype.itemsize + count * rows * -(-columns // 8)
        if late and rank:
            peak += 2 * 4 * rows * columns + 16 * (rows + columns) * (2 * rank + 16)
        if decoupling.kind == "exact":
            peak += 4 * count * rank * (rows + columns)
        return peak
