"""scope: model. TIES' own trimming: one threshold for an expert over all its tensors, exact, without a sort.

Enters: the job and the tensors of the LLM. Leaves: expert -> (threshold, {tensor: how many of its entries equal to the
threshold are kept}). Three passes over the task vectors: counts of the upper bits, counts of the lower bits inside one
bin, and of entries equal to the threshold; each tensor by itself, and then added up. Invariant: what is kept is what a
stable sort of all |τ| in the order of the tensors would keep.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np
import torch

from . import kernels
from .experts import Expert
from .matrices import rows_of_blocks
from .matrix_work import Job
from .selection import Lower, Upper, blocks_of, shares_of_ties
from .task_rows import TaskRows

T = TypeVar("T")


class _Whole:
    """A tensor of one axis, or of more than two, as one row."""

    def __init__(self, tau: torch.Tensor):
        self._tau = tau.reshape(1, -1).numpy()
        self.shape = tau.reshape(1, -1).shape

    def into(self, rows: slice, out: np.ndarray):
        out[:] = self._tau[rows]


def model_thresholds(job: Job, names: Sequence[str], pool: Executor) -> dict[str, tuple[float, dict[str, int]]]:
    """`names`: the tensors of the LLM in their order. Experts whose density is 1 have no threshold."""
    if job.recipe.method.scope == "tensor":
        return {}
    trimmed = [expert for expert in job.experts if job.recipe.density(expert.name) < 1]
    return {expert.name: _threshold(job, expert, names, pool) for expert in trimmed}


def _threshold(job: Job, expert: Expert, names: Sequence[str], pool: Executor) -> tuple[float, dict[str, int]]:
    def each(look: Callable[[Any], T]) -> list[T]:
        return list(pool.map(lambda name: look(_blocks(job, expert, name)), names))

    upper = Upper(sum((found.counts for found in each(lambda blocks: Upper().count(blocks))), Upper().counts))
    bin_, needed = upper.bin(job.recipe.density(expert.name))
    lower = Lower(bin_)
    lower.counts = sum((found.counts for found in each(lambda blocks: Lower(bin_).count(blocks))), lower.counts)
    threshold, ties = lower.threshold(needed)
    equal = each(lambda blocks: sum(kernels.count_equal(block, threshold) for block in blocks))
    return threshold, dict(zip(names, shares_of_ties(equal, ties), strict=True))


def _blocks(job: Job, expert: Expert, name: str) -> Any:
    theta_0 = job.base.tensor(name)
    if theta_0.ndim == 2:
        tau: Any = TaskRows(expert, name, theta_0, job.tokens)
    else:
        tau = _Whole(expert.task_vector(name, theta_0, job.tokens))
    return blocks_of(tau, rows_of_blocks(tau.shape[0], tau.shape[1], job.block))
