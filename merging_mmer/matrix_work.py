"""One matrix through the whole method on a CPU, block by block.

Enters: θ₀ and the experts' tensors as they lie in their files. Leaves: τ*, masks, scales and corrections, written to
their places in the folder as they come, and the numbers of the report. Memory: a few blocks; with corrections, or one
scale for a whole tensor, also τ* as it is stored, the masks, and one residual in fp32 at a time. Invariant: every bit
that is written, and every number, is the same for any size of block; a block's bits are those of ties.py and masks.py.

Pass 1 trims, merges, rounds and masks. What needs all of a matrix follows, expert by expert: its scale, its residual
and the correction of it (pass 2), and what is left then (pass 3).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event

import numpy as np
import torch

from . import kernels
from .decoupling import exact_factors
from .experts import Base, Expert
from .masks import correct
from .matrices import rows_of_blocks
from .naming import stored_name
from .placement import PlacedFiles
from .recipe import Recipe
from .report import Measurement, Sums, tensor_kind
from .selection import threshold_of
from .task_rows import FORMATS, MatrixRows, ProductRows, TaskRows, raw
from .ties import METHODS, relative

# entries of all arrays of a block together: small enough for a processor's cache, large enough for few calls
BLOCK = 1 << 20
_SUMS = 8  # what `kernels.measure_block` gives of a row
_NO_ROWS, _NO_MATRIX = np.empty(0, np.float32), np.empty((0, 0), np.float32)
_NO_BITS = np.empty((0, 0), np.uint8)


class Stopped(Exception):
    """The merge was told to stop before this tensor was done."""


@dataclass
class Job:
    """What the workers of one merge share. thresholds: expert -> (threshold, {tensor: ties that are kept in it}), over
    the whole model; an expert that is not in it is trimmed in each tensor alone."""

    recipe: Recipe
    base: Base
    experts: Sequence[Expert]
    tokens: int
    dtype: torch.dtype
    rank: int
    files: PlacedFiles
    added_rows: Sequence[torch.Tensor] = ()
    thresholds: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    block: int = BLOCK
    stop: Event = field(default_factory=Event)

    def measurement(self) -> Measurement:
        return Measurement([expert.name for expert in self.experts], self.dtype)


class MatrixWork:
    def __init__(self, job: Job, name: str):
        self.job, self.name, self.recipe = job, name, job.recipe
        self.theta_0 = job.base.tensor(name)
        self.rows, self.columns = self.theta_0.shape
        self.base = MatrixRows(self.theta_0)
        self.prefix = stored_name(name).removesuffix(".weight")
        self.format = FORMATS[job.dtype]
        self.kind, self.scale = job.recipe.decoupling.kind, job.recipe.decoupling.scale
        self.masked = self.kind in ("mask", "paper")
        self.rank = min(job.rank, self.rows, self.columns) if self.kind == "mask" else 0
        self.late = self.masked and (self.rank > 0 or self.scale == "tensor")
        self.taus = [TaskRows(expert, name, self.theta_0, job.tokens) for expert in job.experts]
        count, self.width = len(job.experts), -(-self.columns // 8)
        self.sums, self.fits = np.zeros((count, self.rows, _SUMS)), np.zeros((count, self.rows, 2))
        # s as it is stored, one for each row, also where it is one for the tensor; none without scales
        self.scales = np.empty((count, 0 if self.scale == "none" else self.rows), np.float32)
        self.entries = job.block // (count + 2)
        self.conflicts = np.zeros((self.rows, 2), np.int64)
        self.energy = np.zeros(self.rows)
        self.stored_bits = [0] * count
        if self.late:
            self.merged_raw: np.ndarray = np.empty((self.rows, self.columns), self._raw_type)
            self.bits = [np.empty((self.rows, self.width), np.uint8) for _ in range(count)]

    @property
    def _raw_type(self) -> type:
        return np.float32 if self.format == kernels.FP32 else np.uint16

    def blocks(self) -> Iterator[slice]:
        """With room for all arrays in fp32."""
        return self._blocks(0, self.rows, self.entries)

    def _blocks(self, first: int, last: int, entries: int) -> Iterator[slice]:
        for rows in rows_of_blocks(last - first, self.columns, entries):
            if self.job.stop.is_set():
                raise Stopped(self.name)
            yield slice(first + rows.start, first + rows.stop)

    def run(self) -> Measurement:
        """Write the matrix's parts, but θ₀; what was measured."""
        names = [expert.name for expert in self.job.experts]
        self.thresholds = np.full(len(names), -1, np.float32)
        self.quotas = np.zeros(len(names), np.int64)
        for i, expert in enumerate(names):
            if expert in self.job.thresholds:
                threshold, shares = self.job.thresholds[expert]
                self.thresholds[i], self.quotas[i] = threshold, shares[self.name]
            else:
                density = self.recipe.density(expert)
                self.thresholds[i], self.quotas[i] = threshold_of(self.taus[i], self.blocks(), density)
        self.products = self._exact_products() if self.kind == "exact" else []
        if not self.merge_dense():
            for rows in self.blocks():
                self.merge(rows)
        for i in range(len(names)):
            if self.masked:
                self.finish_scale(i)
            if self.late:
                self.finish(i)
        return self.measured()

    # pass 1

    @cached_property
    def _shares(self) -> np.ndarray:
        weights = [self.recipe.experts[expert.name].weight for expert in self.job.experts]
        plain = self.recipe.method.name == "task_arithmetic"
        return np.array(weights if plain else relative(weights, len(weights)), np.float32)

    @cached_property
    def _lams(self) -> np.ndarray:
        return np.array([self.recipe.lam(expert.name) for expert in self.job.experts], np.float32)

    def merge_dense(self) -> bool:
        """All rows by one kernel, where every expert lies in its file as it is; whether that is so."""
        thetas = [theta for tau in self.taus if (theta := tau.patterns(self.format)) is not None]
        if not self.masked or len(thetas) < len(self.taus) or len(thetas) > kernels.MOST:
            return False
        first, theta_0, size = 0, raw(self.theta_0), max(1, self.job.block // self.columns)
        self._shorts = np.empty((min(self.rows, size), self.columns), np.uint16)
        self._bytes = np.empty(len(thetas) * len(self._shorts) * self.width, np.uint8)
        for last in sorted({*(tau.rows for tau in self.taus), self.rows}):
            # rows behind an expert's own are no change of the base
            own = [theta if last <= tau.rows else theta_0 for theta, tau in zip(thetas, self.taus, strict=True)]
            for rows in self._blocks(first, last, self.job.block):
                self._merge_raw(theta_0, own, rows)
            first = last
        return True

    def _merge_raw(self, theta_0: np.ndarray, thetas: Sequence[np.ndarray], rows: slice):
        count, size = len(thetas), rows.stop - rows.start
        kind = {"row": kernels.ROW_SCALES, "none": kernels.NO_SCALES}[self.scale] if not self.late else kernels.LATE
        delta = self.merged_raw[rows] if self.late else self._shorts[:size]
        packed = self._bytes[: count * size * self.width].reshape(count, size, self.width)
        kernels.merge_rows(
            theta_0, thetas, rows.start, self.thresholds, self.quotas, self._shares, self._lams,
            self.recipe.method.alpha, METHODS.index(self.recipe.method.name), self.format, kind, delta, packed,
            kernels.Found(self.fits, self.sums, self.scales, self.conflicts, self.energy),
        )  # fmt: skip
        self.job.files.write(f"{self.prefix}.delta", delta, delta.strides[0] * rows.start)
        for i in range(count):
            self._write_mask(i, rows, packed[i])
            if self.late:
                self.bits[i][rows] = packed[i]
                if self.scale == "row":
                    self.scales[i][rows] = self._fit(*self.fits[i][rows].T)

    def _write_mask(self, i: int, rows: slice, packed: np.ndarray):
        self.job.files.write(f"{self.prefix}.masks", packed, (i * self.rows + rows.start) * self.width)

    @cached_property
    def _room(self) -> np.ndarray:
        rows = next(rows_of_blocks(self.rows, self.columns, self.entries))
        return np.empty((len(self.taus) + 2) * (rows.stop - rows.start) * self.columns, np.float32)

    def _arrays(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """τ (experts, size, columns), θ₀ and τ* (size, columns), in one piece of memory that each block uses again."""
        room = self._room[: (len(self.taus) + 2) * size * self.columns].reshape(-1, size, self.columns)
        return room[:-2], room[-2], room[-1]

    def merge(self, rows: slice):
        size = rows.stop - rows.start
        taus, theta_0, merged = self._arrays(size)
        for tau, out in zip(self.taus, taus, strict=True):
            tau.into(rows, out)
        self.base.into(rows, theta_0)
        merged_raw = self.merged_raw[rows] if self.late else np.empty((size, self.columns), self._raw_type)
        kernels.merge_block(
            taus, self.thresholds, self.quotas, self._shares, self.recipe.method.alpha,
            METHODS.index(self.recipe.method.name), self.format, merged_raw, merged,
        )  # fmt: skip
        self.job.files.write(f"{self.prefix}.delta", merged_raw, merged_raw.strides[0] * rows.start)
        kernels.conflicts_block(taus, self.conflicts[rows])
        kernels.energy_block(theta_0, self.energy[rows])
        for i, tau in enumerate(taus):
            if self.masked:
                self.mask(i, rows, tau, merged, theta_0)
            elif self.kind == "exact":
                low_rank = np.zeros((size, self.columns), np.float32)
                self.products[i].into(rows, low_rank)
                self.measure(i, rows, tau, theta_0, merged, _NO_BITS, low_rank, kernels.LOW_RANK)
            else:
                self.measure(i, rows, tau, theta_0, merged, _NO_BITS, _NO_MATRIX, kernels.STATIC)

    def mask(self, i: int, rows: slice, tau: np.ndarray, merged: np.ndarray, theta_0: np.ndarray):
        packed = self.bits[i][rows] if self.late else np.empty((rows.stop - rows.start, self.width), np.uint8)
        kernels.mask_block(tau, merged, float(self._lams[i]), packed, self.fits[i][rows])
        self._write_mask(i, rows, packed)
        if self.scale == "row":
            self.scales[i][rows] = self._fit(*self.fits[i][rows].T)
        if not self.late:
            self.measure(i, rows, tau, theta_0, merged, packed, _NO_MATRIX, kernels.MASKED)

    def measure(self, i, rows, tau, theta_0, merged, packed, low_rank, kind):
        scale = self.scales[i][rows] if kind == kernels.MASKED else _NO_ROWS
        kernels.measure_block(
            tau, theta_0, merged, packed, scale, low_rank, self.format, kind, self.sums[i][rows]
        )  # fmt: skip

    # scales

    def _fit(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """The least-squares factors, 1 where there is nothing to fit, rounded as they are stored."""
        fitted = np.where(below > 0, above / np.where(below > 0, below, 1.0), 1.0).astype(np.float32)
        return torch.from_numpy(fitted).to(self.job.dtype).float().numpy()

    def finish_scale(self, i: int):
        self.stored_bits[i] += 8 * self.rows * self.width
        if self.scale == "tensor":  # fsum: exact, so that no order of summation can show
            self.scales[i][:] = self._fit(*(np.array([math.fsum(sums)]) for sums in self.fits[i].T))
        if self.scale != "none":
            self._write_part("scales", i, torch.from_numpy(self.scales[i][: self.rows if self.scale == "row" else 1]))

    def _write_part(self, part: str, i: int, tensor: torch.Tensor):
        tensor = tensor.to(self.job.dtype).contiguous()
        self.stored_bits[i] += 8 * tensor.nbytes
        if tensor.nbytes:
            self.job.files.write(f"{self.prefix}.{part}", raw(tensor), i * tensor.nbytes)

    # passes 2 and 3

    def finish(self, i: int):
        product = None if self.rank == 0 else self._write_product(i, *self.correction(i))
        for rows, tau, merged in self._again(i):
            theta_0, low_rank = self._arrays(len(tau))[1], _NO_MATRIX
            self.base.into(rows, theta_0)
            if product is not None:
                low_rank = np.empty_like(tau)
                product.into(rows, low_rank)
            self.measure(i, rows, tau, theta_0, merged, self.bits[i][rows], low_rank, kernels.MASKED)

    def correction(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, A) of the residual."""
        residual = np.empty((self.rows, self.columns), np.float32)
        for rows, tau, merged in self._again(i):
            kernels.residual_block(tau, merged, self.bits[i][rows], self.scales[i][rows], residual[rows])
        return correct(torch.from_numpy(residual), self.rank)

    def _again(self, i: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(rows, τ of one expert, τ* as it is stored), block by block."""
        for rows in self.blocks():
            taus, _, merged = self._arrays(rows.stop - rows.start)
            self.taus[i].into(rows, taus[0])
            kernels.widen(self.merged_raw[rows], self.format, merged)
            yield rows, taus[0], merged

    def _write_product(self, i: int, b: torch.Tensor, a: torch.Tensor) -> ProductRows:
        """B·A of the factors as they are stored."""
        b, a = b.to(self.job.dtype), a.to(self.job.dtype)
        self._write_part("correction_a", i, a)
        self._write_part("correction_b", i, b)
        return ProductRows(b, a)

    def _exact_products(self) -> list[ProductRows]:
        """kind exact: each expert's own LoRA."""
        made, rank = [], min(self.job.rank, self.rows, self.columns)
        for i, (expert, tau) in enumerate(zip(self.job.experts, self.taus, strict=True)):
            factors = exact_factors(expert, self.name, self.theta_0, rank, self.job.tokens, tau.dense_changes())
            made.append(self._write_product(i, *factors))
        return made

    # the report

    def measured(self) -> Measurement:
        made, kind = self.job.measurement(), tensor_kind(self.name)
        made.changed, made.parameters = 1, self.rows * self.columns
        made.conflicts[kind] = [int(count) for count in self.conflicts.sum(0)]
        energy = float(self.energy.sum())
        for i, expert in enumerate(made.experts):
            tau, kept, error, rounding, on, against, nonzero, product = self.sums[i].sum(0).tolist()
            sums = Sums(
                entries=made.parameters, tau=tau, kept=kept, error=error, rounding=rounding, on=int(on),
                masked=made.parameters if self.masked else 0, against=int(against), nonzero=int(nonzero),
            )  # fmt: skip
            made.count(expert, self.name, sums)
            distance = made.distance[expert]
            distance.tau, distance.theta_0, distance.product = tau, energy, product
            made.bits[expert] = self.stored_bits[i]
        return made
