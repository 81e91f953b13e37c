"""How sure a measured mean is, from the items it was measured on.

Enters: numbers of right answers, or one score an item. Leaves: 95 % intervals. Invariant: draws are the same in every
run, and of two lists of scores of the same items they take the same items.
"""

import math
from collections.abc import Sequence

import numpy as np

_DRAWS, _SEED, _TAIL = 2000, 0, 2.5


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share, at 95 % by default (Wilson 1927). ValueError for an empty sample."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} right answers of {n}: expected 0 <= right <= n and n > 0")
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)  # which rounding could leave by a last bit


def of_mean(scores: Sequence[float]) -> tuple[float, float]:
    """The percentiles of the mean over draws of as many items with replacement (the bootstrap, Efron 1979)."""
    return _percentiles(_means(scores))


def of_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float] | None:
    """The same of the ratio of two means; None where a draw's lower one is not above 0."""
    denominators = _means(below)
    return _percentiles(_means(above) / denominators) if (denominators > 0).all() else None


def _means(scores: Sequence[float]) -> np.ndarray:
    """(draws,)"""
    values, random = np.asarray(scores, dtype=np.float64), np.random.default_rng(_SEED)
    return np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(_DRAWS)])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(values, _TAIL)), float(np.percentile(values, 100 - _TAIL))


__all__ = ["of_mean", "of_ratio", "wilson"]
