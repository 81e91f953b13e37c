"""One matrix through the whole method, in blocks of rows that fit the processor's cache.

Enters: the task vectors of one matrix (out, in). Leaves: τ*, and of each expert the mask, scale and correction as
they are stored. Invariants: each part is found from the parts before it as they are stored, rounded; the size of a
block changes no bit, since every step but the correction and the scale of a whole tensor works on rows alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modeling_mmer.routed_weights_mmer import pack_bits

from .masks import correct, decouple, recover, rescale
from .recipe import Recipe
from .ties import merge_vectors, trim, trim_at

_BLOCK = 1 << 16


def row_blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the first axis with about `_BLOCK` entries each; the whole of a tensor of one axis or none."""
    if tensor.ndim < 2 or not len(tensor):
        yield slice(None)
        return
    yield from rows_of_blocks(len(tensor), tensor[0].numel(), _BLOCK)


def rows_of_blocks(rows: int, columns: int, entries: int) -> Iterator[slice]:
    """Slices of the rows with about `entries` entries each."""
    step = max(1, entries // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def merge_rows(
    method: str, taus: Sequence[torch.Tensor], weights: Sequence[float], alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """τ* in `dtype`, as `merge_vectors` gives it."""
    merged = torch.empty(taus[0].shape, dtype=dtype)
    for rows in row_blocks(merged):
        merged[rows] = merge_vectors(method, [tau[rows] for tau in taus], weights, alpha)
    return merged


def merged_vector(
    recipe: Recipe,
    experts: Sequence[str],
    taus: Sequence[torch.Tensor],
    thresholds: dict[str, tuple[float, int]],
    dtype: torch.dtype,
) -> torch.Tensor:
    """τ* of one tensor by the recipe, from the task vectors of `experts`: in `dtype`; in fp32 where it is no matrix.

    `thresholds`: expert -> (threshold, ties) over the whole model (scope: model), whose ties are used up here. An
    expert that is not in it is trimmed in this tensor alone.
    """
    trimmed = []
    for name, tau in zip(experts, taus, strict=True):
        if name in thresholds:
            threshold, ties = thresholds[name]
            tau, used = trim_at(tau, threshold, ties)
            thresholds[name] = threshold, ties - used
        else:
            tau = trim(tau, recipe.density(name))
        trimmed.append(tau)
    weights = [recipe.experts[name].weight for name in experts]
    dtype = dtype if taus[0].ndim > 1 else torch.float32
    return merge_rows(recipe.method.name, trimmed, weights, recipe.method.alpha, dtype)


@dataclass
class Decoupled:
    """What is stored of one expert in one matrix: mask (out, in) bool, scale (out,) or (1,), correction (B, A)."""

    mask: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    correction: tuple[torch.Tensor, torch.Tensor] | None = None

    def packed(self) -> torch.Tensor | None:
        """The mask as bits, uint8 (out, ceil(in/8))."""
        if self.mask is None:
            return None
        return torch.cat([pack_bits(self.mask[rows]) for rows in row_blocks(self.mask)])

    def stored(self) -> dict[str, torch.Tensor]:
        """Name of the part in a merged folder -> tensor, of those that are there."""
        left, right = self.correction or (None, None)
        parts = {"masks": self.packed(), "scales": self.scale, "correction_a": right, "correction_b": left}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def tau(self, merged: torch.Tensor, rows: slice) -> torch.Tensor:
        """Rows of τ̂ = s⊙m⊙τ* + BA, fp32."""
        scale = self.scale
        if scale is not None and len(scale) > 1:
            scale = scale[rows]
        correction = None if self.correction is None else (self.correction[0][rows], self.correction[1])
        mask = None if self.mask is None else self.mask[rows]
        return recover(mask, merged[rows], scale, correction)


def decouple_matrix(
    tau: torch.Tensor, merged: torch.Tensor, lam: float, scale_kind: str, rank: int, dtype: torch.dtype
) -> Decoupled:
    """Mask, scale and correction of `tau` against the stored `merged`; the latter two rounded to `dtype`."""
    own = Decoupled(torch.empty(tau.shape, dtype=torch.bool))
    assert own.mask is not None
    for rows in row_blocks(tau):
        own.mask[rows] = decouple(tau[rows], merged[rows], lam)
    if scale_kind == "row":
        parts = [rescale(tau[rows], own.mask[rows], merged[rows].float(), "row") for rows in row_blocks(tau)]
        own.scale = torch.cat([part for part in parts if part is not None]).to(dtype)
    elif (scale := rescale(tau, own.mask, merged.float(), scale_kind)) is not None:
        own.scale = scale.to(dtype)
    if rank:
        residual = torch.empty(tau.shape)
        for rows in row_blocks(tau):
            residual[rows] = tau[rows] - own.tau(merged, rows)
        b, a = correct(residual, rank)
        own.correction = b.to(dtype), a.to(dtype)
    return own
