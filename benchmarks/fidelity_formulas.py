"""Ways to write down a task vector with few bits, beside those of merging_mmer: what fidelity.py compares.

Enters: τᵢ (out, in) of one matrix, and τ* where a way shares it. Leaves: τ̂ᵢ in fp32, its 16-bit numbers rounded as
they would be stored. Invariant: nothing here sees an answer; what is weighted by activations says so in its name.
"""

from collections.abc import Mapping

import torch

from merging_mmer.low_rank import correct
from merging_mmer.masks import decouple, rescale

STORED = torch.bfloat16
DAMPING = 1e-2  # of the mean second moment, so that a direction that no input had is not free


def stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(STORED).float()


def row_scaled(tau: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """s·P with the least-squares s of each row."""
    scale = rescale(tau, torch.ones_like(pattern, dtype=torch.bool), pattern, "row")
    assert scale is not None
    return stored(scale).unsqueeze(1) * pattern


def fitted_mask(tau: torch.Tensor, merged: torch.Tensor, rounds: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, s (out,)): mask and row scales that lower ‖τ - s·(m⊙τ*)‖ in turn, from the paper's mask on.

    An entry belongs to the mask of scale s where |τ - s·τ*| < |τ|; the paper's own mask asks that at s = 1.
    """
    mask = decouple(tau, merged)
    for _ in range(rounds):
        scale = rescale(tau, mask, merged, "row")
        assert scale is not None
        own = scale.unsqueeze(1) * merged
        mask = (tau - own).abs() < tau.abs()
    scale = rescale(tau, mask, merged, "row")
    assert scale is not None
    return mask, scale


def best_lambda(tau: torch.Tensor, merged: torch.Tensor, grid: tuple[float, ...]) -> torch.Tensor:
    """Σ of (τ - s·(m⊙τ*))² for each λ of the grid, with row scales: (λs,). Without scales λ = 1 is the least."""
    masks = [decouple(tau, merged, lam) for lam in grid]
    return torch.stack([(tau - row_scaled(tau, mask * merged)).square().sum() for mask in masks])


def row_column_scaled(tau: torch.Tensor, pattern: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """s cᵀ ⊙ P, s (out,) and c (in,) fitted in turn to the least ‖τ - s cᵀ⊙P‖."""
    columns = torch.ones(pattern.shape[1])
    squares, product = pattern.square(), tau * pattern
    for _ in range(rounds):
        rows = _ratio(product @ columns, squares @ columns.square())
        columns = _ratio(rows @ product, rows.square() @ squares)
    return stored(rows).unsqueeze(1) * stored(columns) * pattern


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 1.0)


def signs(tau: torch.Tensor) -> torch.Tensor:
    """±1: one bit an entry holds no 0, so that an unchanged entry counts as +."""
    return torch.where(tau < 0, -1.0, 1.0)


def second_bit(tau: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """Row scales where the paper's mask is 1; where it is 0, the sign of τ times one magnitude a row."""
    mask = decouple(tau, merged)
    outside = torch.where(mask, 0.0, signs(tau))
    return row_scaled(tau, mask * merged) + row_scaled(tau, outside)


def ternary(tau: torch.Tensor, rounds: int = 6) -> torch.Tensor:
    """u·t with t in {-1, 0, 1} and one u a row, in turn: t = 0 where |τ| < u/2, u the mean |τ| of the others."""
    magnitude = tau.abs()
    unit = magnitude.mean(1, keepdim=True)
    for _ in range(rounds):
        kept = magnitude > unit / 2
        unit = _ratio((magnitude * kept).sum(1, keepdim=True), kept.sum(1, keepdim=True).float())
    return stored(unit) * kept * tau.sign()


def weighted_correct(
    residual: torch.Tensor, moment: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B (out, r), A (r, in) and σ² (r,): the product that makes E‖(R - BA)x‖² least, and what each rank takes from it.

    `moment`: E[xxᵀ] (in, in), or its diagonal alone (in,), of the inputs x of this linear; None: all directions alike.
    """
    if moment is None:
        b, a = correct(residual, rank)
    elif moment.ndim == 1:
        root = (moment + DAMPING * moment.mean()).sqrt()
        b, a = correct(residual * root, rank)
        return b, a / root, _energy(b, a)
    else:
        size = DAMPING * moment.diagonal().mean()
        root = torch.linalg.cholesky(moment + size * torch.eye(len(moment)))
        b, a = correct(residual @ root, rank)
        return b, torch.linalg.solve_triangular(root, a, upper=False, left=False), _energy(b, a)
    return b, a, _energy(b, a)


def _energy(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return b.square().sum(0) * a.square().sum(1)


def spread(energy: Mapping[str, torch.Tensor], cost: Mapping[str, int], budget: float) -> dict[str, int]:
    """name -> rank: the singular values that recover most σ² a number, over all matrices, within `budget` numbers."""
    pairs = [(float(value) / cost[name], name) for name, values in energy.items() for value in values]
    ranks, left = dict.fromkeys(energy, 0), budget
    for gain, name in sorted(pairs, key=lambda pair: -pair[0]):
        if cost[name] <= left and gain > 0:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def rounded(factor: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of a factor as stored: 16-bit numbers, or integers of `bits` with one 16-bit step a row."""
    if bits == 16:
        return stored(factor)
    most = 2 ** (bits - 1) - 1
    step = stored(factor.abs().amax(1, keepdim=True) / most)
    step = torch.where(step > 0, step, 1.0)
    return (factor / step).round().clamp(-most, most) * step


def factor_bits(rank: int, out: int, wide: int, bits: int) -> int:
    return rank * (out + wide) * bits + (0 if bits == 16 else 2 * rank * 16)
