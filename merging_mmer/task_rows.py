"""Task vectors by rows: what the kernels of the merge read, block by block, without ever holding one whole.

Enters: one tensor of an expert and of the base, mapped from their files, and the factors of a LoRA. Leaves: rows of
τ = θ - θ₀ (+ s·B·A), fp32, of any slice of rows. Invariant: a row has the same bits in whatever slice it is asked for,
and those of `Expert.task_vector`, but for the product B·A, which is made in slabs of `SLAB` rows of their own.
"""

from collections.abc import Iterator

import numpy as np
import torch

from . import kernels
from .experts import Expert
from .matrices import rows_of_blocks
from .task_vectors import check_vocabulary, task_vector

FORMATS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}
# a product of matrices rounds by the shape of its parts, so these do not follow the block that is asked for
SLAB = 64
_LOOK = 1 << 18
_NONE = np.empty((0, 0), np.float32)
# a sample: lines of neighbours, spread over the matrix
_LINE, _LINES = 32, 1 << 10


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The values as the kernels take them: the bits of 16-bit floats as uint16, fp32 as it is; no copy."""
    tensor = tensor.detach().contiguous()
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


class MatrixRows:
    """Rows of a matrix as fp32."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._format = tensor, FORMATS.get(tensor.dtype)
        self._raw = _NONE if self._format is None else raw(tensor)

    def into(self, rows: slice, out: np.ndarray):
        """`rows` into `out` (rows, columns)."""
        if self._format is None:
            out[:] = self._tensor[rows].float().numpy()
        else:
            kernels.widen(self._raw[rows], self._format, out)


class ProductRows:
    """Rows of B·A, fp32, of B (out, r) and A (r, in)."""

    def __init__(self, b: torch.Tensor, a: torch.Tensor):
        self.b, self.a = b.float(), a.float().contiguous()
        self._first = -1
        self._slab: np.ndarray = _NONE

    def pieces(self, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
        """(place within `rows`, values) of as many slabs as lie in them."""
        end = min(rows.stop, len(self.b))
        for first in range(rows.start - rows.start % SLAB, end, SLAB):
            if first != self._first:
                self._first, self._slab = first, (self.b[first : first + SLAB] @ self.a).numpy()
            inside = slice(max(first, rows.start), min(first + SLAB, end))
            place = slice(inside.start - rows.start, inside.stop - rows.start)
            yield place, self._slab[inside.start - first : inside.stop - first]

    def into(self, rows: slice, out: np.ndarray):
        for place, values in self.pieces(rows):
            out[place] = values


class TaskRows:
    """τ of the matrix `name` of one expert. The base has `tokens` tokens; rows behind them are no change of it.

    Raises ValueError where the expert's tensor does not have the base's shape.
    """

    def __init__(self, expert: Expert, name: str, theta_0: torch.Tensor, tokens: int):
        theta = expert.stored(name)
        self.shape, vocabulary = theta_0.shape, name in expert.base.vocabulary_names
        if vocabulary:
            check_vocabulary(theta.shape, theta_0.shape, tokens)
        elif theta.shape != theta_0.shape:
            task_vector(theta, theta_0)  # raises
        self.rows = min(tokens, len(theta_0)) if vocabulary else len(theta_0)
        itself = theta.dtype == theta_0.dtype and theta.data_ptr() == theta_0.data_ptr()
        self._theta = None if itself else theta  # a LoRA on the base alone has no θ of its own
        self._theta_0 = theta_0
        self._format = FORMATS.get(theta.dtype) if theta.dtype == theta_0.dtype else None
        self._raw: np.ndarray = _NONE if self._format is None else raw(theta)
        self._raw_0: np.ndarray = _NONE if self._format is None else raw(theta_0)
        factors = expert.factors(name)
        self._product = None if factors is None else ProductRows(*factors)

    def patterns(self, fmt: int) -> np.ndarray | None:
        """θ as the kernels of kernel_rows.py take it, its first `rows` rows those of τ, or None: for one that lies
        in its file whole, as θ₀ does, in the 16-bit format `fmt`."""
        fits = self._product is None and self._theta is not None and self._format == fmt != kernels.FP32
        return self._raw if fits and self.shape[1] % kernels.LANES == 0 else None

    def sample(self) -> np.ndarray:
        """Some |τ| of the first `rows` rows, the same at every call; none where only all of τ can be had."""
        if self._format is None or (theta := self.patterns(self._format)) is None:
            return _NONE.reshape(-1)
        count = self.rows * self.shape[1] // _LINE
        step = max(1, count // _LINES)
        places = np.arange(count // step) * step
        places += np.arange(len(places)) * 7919 % step  # a fixed step may be a multiple of the columns
        own, base = (of.reshape(-1)[: count * _LINE].reshape(-1, _LINE)[places] for of in (theta, self._raw_0))
        out = np.empty(own.shape, np.float32)
        kernels.task_vector(own, base, self._format, out)
        return np.abs(out).reshape(-1)

    def between(self, rows: slice, low: float, high: float, found: np.ndarray, counts: np.ndarray):
        """`kernels.between` of those of `rows` that are among the first `rows`; only where there is a sample."""
        own = slice(rows.start, max(rows.start, min(rows.stop, self.rows)))
        kernels.between(self._raw[own], self._raw_0[own], self._format, low, high, found, counts)

    def into(self, rows: slice, out: np.ndarray):
        """τ of `rows` into `out` (rows, columns), fp32."""
        own = max(0, min(rows.stop, self.rows) - rows.start)
        self._dense(slice(rows.start, rows.start + own), out[:own])
        out[own:] = 0.0
        if self._product is not None:
            for place, values in self._product.pieces(slice(rows.start, rows.start + own)):
                out[place] += values

    def _dense(self, rows: slice, out: np.ndarray):
        if self._theta is None or not len(out):
            out[:] = 0.0
        elif self._format is not None:
            kernels.task_vector(self._raw[rows], self._raw_0[rows], self._format, out)
        else:
            out[:] = task_vector(self._theta[rows], self._theta_0[rows]).numpy()

    def dense_changes(self) -> bool:
        """Whether θ differs from θ₀ anywhere, without the LoRA."""
        theta, columns = self._theta, self.shape[1]
        if theta is None:
            return False
        for rows in rows_of_blocks(self.rows, columns, _LOOK):
            if self._format is not None and np.array_equal(self._raw[rows], self._raw_0[rows]):
                continue
            out = np.empty((rows.stop - rows.start, columns), np.float32)
            self._dense(rows, out)
            if out.any():
                return True
        return False

    def changes(self) -> bool:
        """Whether τ is not 0 anywhere. The first difference ends the search."""
        low_rank = () if self._product is None else self._product.pieces(slice(0, self.rows))
        return any(bool(values.any()) for _, values in low_rank) or self.dense_changes()
