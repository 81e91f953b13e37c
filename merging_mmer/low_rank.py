"""The correction: the best approximation of a residual by a product of two thin matrices.

Enters: a residual (out, in). Leaves: B (out, r), A (r, in), its truncated singular value decomposition, with the
singular values shared between the two. Invariant: the bits depend on the residual and the rank alone.

Larger matrices go through randomised block Krylov iteration (Musco and Musco, 2015): rows X₀, X₁, … (b, in), b a
little above r, where X₀ spans ΩR for a fixed Gaussian Ω and each further block spans what XRᵀR has outside the blocks
before. BA is the best approximation of R within their span. A pass reads R once, for XRᵀ and XRᵀR; after it, what is
still to gain is foretold from the gains so far, and iteration ends where it could hardly be seen in ‖R - BA‖. On pure
noise that takes 3 to 8 passes and leaves ‖R - BA‖ within 1.0005 of the optimum; on task vectors, about 4 passes.
"""

from collections.abc import Iterator

import torch

from .task_vectors import one_thread

# up to this size of the smaller side a full SVD is cheap and is used
_FULL_SVD = 64
# rows of Ω beyond the rank, and what the sum is rounded up to a multiple of (the widths that matrix products like)
_OVERSAMPLING = 4
_MULTIPLE = 4
# fewer rows would hardly cost less: a product with them takes as long as reading R does
_NARROWEST = 12
# iteration ends where the passes to come would lower ‖R - BA‖² by less than this share of it, or of ‖R‖² by less than
# fp32 can hold, or after so many passes
_TOLERANCE = 4e-4
_ROUNDING = 1e-12
_PASSES = 8
# gains are not trusted to fall faster than to this share from pass to pass, even where they just have
_FALL = 0.1
# entries of a block of rows, which lies in the processor's cache while it is used twice
_BLOCK = 1 << 19
# a unit vector of which more than this is left outside the blocks before stands at a right angle to them by then
_OUTSIDE = 0.5
# a mean square of entries above 1 / this, and a sum of them below it, keeps all products within what fp32 can hold
_RANGE = 2.0**80
_SEED = 2505_17110


def correct(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r), A (r, in), fp32: BA is the best approximation of `residual` (out, in) of rank r <= rank.

    The truncated SVD, B and A sharing the singular values. A residual of rank <= r is met exactly (to fp32
    rounding). Raises ValueError for what is no matrix, a negative rank, and NaN or infinity.
    """
    if residual.ndim != 2 or rank < 0:
        raise ValueError(f"expected a matrix and a rank of 0 or more, found {tuple(residual.shape)} and rank {rank}")
    residual = residual.float().contiguous()
    rank = min(rank, *residual.shape)
    if rank == 0:
        return residual.new_zeros(residual.shape[0], 0), residual.new_zeros(0, residual.shape[1])
    with one_thread():
        width = max(_NARROWEST, -(-(rank + _OVERSAMPLING) // _MULTIPLE) * _MULTIPLE)
        sketch, squares, scale = *_sketch(residual, width), 1.0
        if not residual.numel() / _RANGE < squares < _RANGE:
            scale = residual.abs().max().item()
            if not scale < float("inf"):
                raise ValueError("the residual of a matrix holds NaN or infinity, expected numbers: check the experts")
            if scale == 0:
                return residual.new_zeros(residual.shape[0], rank), residual.new_zeros(rank, residual.shape[1])
            residual = residual / scale
            sketch, squares = _sketch(residual, width)
        if min(residual.shape) <= max(_FULL_SVD, width):
            left, values, right = torch.linalg.svd(residual, full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank]
        else:
            left, values, right = _leading_svd(residual, rank, sketch, squares)
        # a singular pair is free in its sign: the largest entry of each right vector is made positive
        signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
        root = values.sqrt() * scale**0.5
        return left * signs.T * root, root.unsqueeze(1) * right * signs


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        yield slice(first, first + rows)


def _sketch(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, float]:
    """ΩR (b, in) and ‖R‖²."""
    generator = torch.Generator().manual_seed(_SEED)
    omega = torch.randn(width, len(matrix), generator=generator).to(matrix.device)
    product, squares = matrix.new_zeros(width, matrix.shape[1]), 0.0
    for part in _row_blocks(matrix):
        product.addmm_(omega[:, part], matrix[part])
        squares += torch.linalg.vector_norm(matrix[part], dim=1).double().square().sum().item()
    return product, squares


def _leading_svd(
    matrix: torch.Tensor, rank: int, block: torch.Tensor, squares: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, r), σ (r,), V (r, in), fp32, from the Krylov blocks that begin with `block`. `squares`: ‖matrix‖²."""
    (rows, columns), width = matrix.shape, len(block)
    spanned = matrix.new_empty(width * _PASSES, columns)
    images = matrix.new_empty(width * _PASSES, rows, dtype=torch.float64)  # of the spanned rows under R
    gram = matrix.new_zeros(width * _PASSES, width * _PASSES, dtype=torch.float64)  # of the images
    captured, to_come = [0.0], 2
    for first in range(0, width * _PASSES, width):
        used = first + width
        new, last = slice(first, used), to_come == 1 or used == width * _PASSES
        spanned[new] = _new_directions(block, spanned[:first])
        block = _through(matrix, spanned[new], images[new], not last)
        gram[new, :used] = images[new] @ images[:used].T
        gram[:first, new] = gram[new, :first].T
        if last:
            break
        captured.append(torch.linalg.eigvalsh(gram[:used, :used])[-rank:].sum().item())
        to_come = _passes_to_come(captured, squares)
        if to_come == 0:
            break
    values, turn = torch.linalg.eigh(gram[:used, :used])
    turn = turn[:, -rank:].flip(1).T
    values = values[-rank:].flip(0).clamp(min=0).sqrt()
    left = turn @ images[:used] / torch.where(values > 0, values, 1.0).unsqueeze(1)
    return left.T.float(), values.float(), (turn @ spanned[:used].double()).float()


def _through(matrix: torch.Tensor, rows: torch.Tensor, image: torch.Tensor, back: bool) -> torch.Tensor:
    """Puts XRᵀ (b, out) of X = `rows` (b, in) into `image`; gives XRᵀR (b, in), or zeros unless `back`."""
    product = torch.zeros_like(rows)
    for part in _row_blocks(matrix):
        seen = rows @ matrix[part].T
        image[:, part] = seen
        if back:
            product.addmm_(seen, matrix[part])
    return product


def _passes_to_come(captured: list[float], squares: float) -> int:
    """0: enough is captured; 1: will be after one more pass; 2: not yet known.

    `captured`: ‖BA‖² after each pass, 0 before the first. Gains fall at least geometrically, or nearly so: the last
    two foretell the sum of those to come. A last pass is only half a pass, so to end without it asks for more margin.
    """
    if len(captured) < 3:
        return 2
    gain, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    if gain <= _ROUNDING * squares:
        return 0
    if gain >= before:
        return 2
    ratio = max(gain / before, _FALL)
    to_come = gain * ratio / (1 - ratio)
    unseen = max(_TOLERANCE * (squares - captured[-1]), _ROUNDING * squares)
    return 0 if 2 * to_come <= unseen else 1 if to_come * ratio <= unseen else 2


def _new_directions(block: torch.Tensor, spanned: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span what `block` (b, in) has outside `spanned` (k, in); 0 in place of those missing.

    Rows that lie in `spanned` already leave rounding noise, whose own part in `spanned` is as large: it takes a third
    or fourth round to be rid of that. Where no room is left outside, no number of rounds is enough.
    """
    for attempt in range(4):
        block = block - (block @ spanned.T) @ spanned
        turned, triangle = torch.linalg.qr(block.T)
        block, outside = turned.T, triangle.diagonal().abs() > _OUTSIDE
        if attempt and bool(outside.all()):
            return block
    return block * outside.unsqueeze(1)
