"""One merged vector from several task vectors: trim, elect, disjoint mean (TIES), and two methods beside it.

Enters: the task vectors τᵢ of one tensor, one per expert, of one shape. Leaves: the merged vector τ*, fp32, same
shape. Invariants: the result depends neither on the order of the experts (at equal weights) nor on the number of
threads, and one expert at density 1 comes back unchanged.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

METHODS = ("ties", "task_arithmetic", "emr")


def kept_count(entries: int, density: float) -> int:
    """k = ⌈density · entries⌉, of the decimal that was written: 0.07 of 100 is 7, not 8 as in binary fractions."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected 0 < density <= 1")
    return math.ceil(Fraction(str(float(density))) * entries)


def trim(tau: torch.Tensor, density: float) -> torch.Tensor:
    """τ̂: the k = ⌈density · n⌉ entries of largest |τ|, the others 0. Of equal magnitudes the first stay."""
    tau = tau.float()
    entries = tau.numel()
    kept = kept_count(entries, density)
    if kept == entries:
        return tau
    threshold = tau.abs().flatten().kthvalue(entries - kept + 1).values.item()
    ties = kept - int((tau.abs() > threshold).sum())
    return trim_at(tau, threshold, ties)[0]


def trim_at(tau: torch.Tensor, threshold: float, ties: int) -> tuple[torch.Tensor, int]:
    """τ̂ of the entries |τ| > threshold and the first `ties` of those equal to it; also how many those were."""
    tau = tau.float()
    magnitude = tau.abs()
    keep = magnitude > threshold
    equal = torch.nonzero(magnitude.flatten() == threshold).flatten()[:ties]
    keep.view(-1)[equal] = True
    return torch.where(keep, tau, 0.0), len(equal)


def elect(taus: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """γ = sign(Σ wᵢ τ̂ᵢ) in {-1, 0, 1}. Where the sum is exactly 0 no sign is elected and τ* will be 0."""
    shares = relative(weights, len(taus))
    return _ordered_sum([_scaled(tau.float(), share) for tau, share in zip(taus, shares, strict=True)]).sign()


def disjoint_mean(
    taus: Sequence[torch.Tensor],
    sign: torch.Tensor,
    weights: Sequence[float] | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """τ* = alpha · Σ wᵢ τ̂ᵢ / Σ wᵢ over the experts whose entry has the elected sign; 0 where none has it."""
    shares = relative(weights, len(taus))
    agreeing = [tau.sign() == sign for tau in taus]
    terms = [
        torch.where(agrees, _scaled(tau.float(), share), 0.0)
        for tau, agrees, share in zip(taus, agreeing, shares, strict=True)
    ]
    counted = _ordered_sum([agrees.float() * share for agrees, share in zip(agreeing, shares, strict=True)])
    mean = _ordered_sum(terms) / torch.where(counted > 0, counted, 1.0)
    return _scaled(torch.where(sign == 0, 0.0, mean), alpha)


def task_arithmetic(
    taus: Sequence[torch.Tensor], weights: Sequence[float] | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """τ* = alpha · Σ wᵢ τᵢ. The weights are not normalised."""
    weights = [1.0] * len(taus) if weights is None else weights
    return _scaled(_ordered_sum([_scaled(tau.float(), w) for tau, w in zip(taus, weights, strict=True)]), alpha)


def emr(taus: Sequence[torch.Tensor], weights: Sequence[float] | None = None, alpha: float = 1.0) -> torch.Tensor:
    """EMR's unified vector: the elected sign and the largest magnitude among entries that have it, times alpha."""
    sign = elect(taus, weights)
    largest = torch.zeros_like(sign)
    for tau in taus:
        largest = torch.maximum(largest, torch.where(tau.sign() == sign, tau.float().abs(), 0.0))
    return _scaled(sign * largest, alpha)


def merge_vectors(
    method: str,
    taus: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """τ* of already trimmed task vectors by one of `METHODS`. Raises ValueError for other names or unequal shapes."""
    shapes = {tuple(tau.shape) for tau in taus}
    if len(shapes) != 1:
        raise ValueError(f"the task vectors of one tensor have the shapes {sorted(shapes)}: expected one and the same")
    if method == "ties":
        return disjoint_mean(taus, elect(taus, weights), weights, alpha)
    if method == "task_arithmetic":
        return task_arithmetic(taus, weights, alpha)
    if method == "emr":
        return emr(taus, weights, alpha)
    raise ValueError(f"method is {method!r}, expected one of {list(METHODS)}")


def relative(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights over their largest: equal weights become exactly 1 each, so that they cost no rounding."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count or min(weights) <= 0:
        raise ValueError(f"weights are {list(weights)} for {count} task vectors: expected one above 0 for each")
    return [weight / max(weights) for weight in weights]


def _scaled(tau: torch.Tensor, factor: float) -> torch.Tensor:
    return tau if factor == 1 else tau * factor


def _ordered_sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ of the terms, elementwise in rising order: a sum of three or more depends on the order, a sorted one not."""
    terms = list(terms)
    if len(terms) > 2:
        for sweep in range(len(terms)):  # odd-even transposition: a sorting network over the few experts
            for i in range(sweep % 2, len(terms) - 1, 2):
                terms[i], terms[i + 1] = torch.minimum(terms[i], terms[i + 1]), torch.maximum(terms[i], terms[i + 1])
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total
