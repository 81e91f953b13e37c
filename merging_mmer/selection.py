"""The exact threshold of trimming, without sorting the task vector.

Enters: rows of τ, of one tensor or of all tensors of an expert. Leaves: the k-th largest |τ| and how many of the
entries equal to it are kept. Where a sample can be had, it says between which two magnitudes the k-th will lie, and
one pass counts what is above them and takes out what is between them. Where there is none, or it misled, it takes two
passes: the first counts the upper 16 bits of |τ| as fp32, which are ordered as integers are, the second the lower 16
bits inside the bin where the k-th entry lies. Invariant: exactly k = ⌈density · n⌉ entries are above the threshold or
among the kept ones, whatever the sample, the blocks and the threads.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from . import kernels
from .ties import kept_count

_UPPER, _LOW_BITS = 1 << 15, 16
# how far the k-th entry may lie from its place in the sample, in standard deviations of that place
_DEVIATIONS = 5
# the part of a tensor that is taken out at most
_TAKEN = 1 / 8


class Rows(Protocol):
    """What `TaskRows` is to the selection."""

    shape: torch.Size

    def into(self, rows: slice, out: np.ndarray): ...


class SampledRows(Rows, Protocol):
    """With a sample of the |τ| of the first `rows` rows, or an empty one. τ is 0 behind those rows."""

    rows: int

    def sample(self) -> np.ndarray: ...

    def between(self, rows: slice, low: float, high: float, found: np.ndarray, counts: np.ndarray): ...


def blocks_of(tau: Rows, blocks: Iterable[slice]) -> Iterator[np.ndarray]:
    """τ block by block; each array is overwritten by the next."""
    out = np.empty((0, 0), np.float32)
    for rows in blocks:
        size = rows.stop - rows.start
        if len(out) < size:
            out = np.empty((size, tau.shape[1]), np.float32)
        tau.into(rows, out[:size])
        yield out[:size]


@dataclass
class Upper:
    """Pass one. Counts of several tensors add up."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_UPPER, np.int64))

    def count(self, blocks: Iterable[np.ndarray]) -> "Upper":
        for block in blocks:
            kernels.histogram(block, self.counts)
        return self

    def bin(self, density: float) -> tuple[int, int]:
        """(the bin of the k-th entry, how many of the bin's entries are kept)."""
        return _from_the_top(self.counts, kept_count(int(self.counts.sum()), density))


@dataclass
class Lower:
    """Pass two, inside one bin."""

    bin: int
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1 << _LOW_BITS, np.int64))

    def count(self, blocks: Iterable[np.ndarray]) -> "Lower":
        room = np.empty(0, np.uint16)
        for block in blocks:
            if len(room) < block.size:
                room = np.empty(block.size, np.uint16)
            found = kernels.collect(block, self.bin, room)
            self.counts += np.bincount(room[:found], minlength=len(self.counts))
        return self

    def threshold(self, needed: int) -> tuple[float, int]:
        """(threshold, how many entries equal to it are kept)."""
        low, ties = _from_the_top(self.counts, needed)
        bits = np.array([self.bin << _LOW_BITS | low], np.int32)
        return float(bits.view(np.float32)[0]), ties


def threshold_of(tau: SampledRows, blocks: Iterable[slice], density: float) -> tuple[float, int]:
    """(threshold, ties) for one tensor; (-1, 0) where nothing is trimmed."""
    if density == 1:
        return -1.0, 0
    blocks = list(blocks)
    if (found := _by_sample(tau, blocks, kept_count(math.prod(tau.shape), density))) is not None:
        return found
    bin_, needed = Upper().count(blocks_of(tau, blocks)).bin(density)
    return Lower(bin_).count(blocks_of(tau, blocks)).threshold(needed)


def _by_sample(tau: SampledRows, blocks: Sequence[slice], kept: int) -> tuple[float, int] | None:
    """(threshold, ties) by one pass, or None where there is no sample or the threshold is not where it says."""
    entries, sample = tau.rows * tau.shape[1], tau.sample()
    if not len(sample) or kept >= entries:
        return None
    low, high = _bracket(sample, kept / entries)
    counts, taken, space = np.zeros(4, np.int64), [], np.empty(0, np.float32)
    above = on_high = on_low = within = 0
    for rows in blocks:
        size = (rows.stop - rows.start) * tau.shape[1]
        if len(space) <= size:
            space = np.empty(size + 1, np.float32)
        tau.between(rows, low, high, space, counts)
        above, on_high, on_low = above + int(counts[0]), on_high + int(counts[1]), on_low + int(counts[2])
        within += int(counts[3])
        taken.append(space[: counts[3]].copy())
        if within > _TAKEN * entries + len(sample):
            return None
    needed = kept - above
    if 0 < needed <= on_high:
        return high, needed
    needed -= on_high
    if 0 < needed <= within:
        values = np.concatenate(taken)
        threshold = np.partition(values, within - needed)[within - needed]
        return float(threshold), needed - int((values > threshold).sum())
    needed -= within
    return (low, needed) if low < high and 0 < needed <= on_low else None


def _bracket(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Two magnitudes; the one that `share` of all entries are above or at lies between them, nearly always."""
    count = len(sample)
    middle = share * count
    far = _DEVIATIONS * math.sqrt(middle * (1 - share)) + 2
    first, last = int(middle - far), int(middle + far)  # places, counted from the largest
    ordered = np.sort(sample)[::-1]
    return float(ordered[last]) if last < count else 0.0, float(ordered[first]) if middle > far else math.inf


def model_threshold(taus: Callable[[], Iterable[torch.Tensor]], density: float) -> tuple[float, int]:
    """(threshold, ties) for `trim_at` that keep exactly ⌈density · n⌉ entries of all tensors that `taus()` gives.

    It is asked twice; one tensor is held at a time.
    """

    def rows() -> Iterator[np.ndarray]:
        return (tau.float().contiguous().reshape(1, -1).numpy() for tau in taus())

    bin_, needed = Upper().count(rows()).bin(density)
    return Lower(bin_).count(rows()).threshold(needed)


def _from_the_top(histogram: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th entry from above, and how many of its entries are wanted."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, wanted))
    before = int(above[place - 1]) if place else 0
    return len(histogram) - 1 - place, wanted - before


def shares_of_ties(equal: Iterable[int], ties: int) -> list[int]:
    """How many of the kept ties fall to each tensor: the first in the order of the tensors."""
    shares = []
    for count in equal:
        shares.append(min(count, ties))
        ties -= shares[-1]
    return shares
