"""What is each expert's own in the merged vector: mask, scale, low-rank correction.

Enters: an expert's untrimmed task vector τᵢ and the merged vector τ* as it is stored. Leaves: mᵢ, sᵢ, BᵢAᵢ with
θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ. Invariant: with λ = 1 no other binary mask is nearer to θᵢ in any entry.
"""

import math

import torch

from .task_vectors import one_thread

SCALES = ("row", "tensor", "none")

# below this size of the smaller side a full SVD is cheap and is used; above it, subspace iteration from a fixed
# start
_FULL_SVD = 128
_POWER_ITERATIONS = 6
_SEED = 2505_17110


def decouple(tau: torch.Tensor, merged: torch.Tensor, lam: float = 1.0) -> torch.Tensor:
    """mᵢ, bool: 1 where τᵢ and τ* have one sign and |τᵢ| >= λ·|τ* - τᵢ|.

    At λ = 1 it minimises |θ₀ + m·τ* - θᵢ| over m in {0, 1} in every entry (the paper's equation 2); a larger λ
    keeps fewer entries, and only those where τ* is closer to τᵢ. `tau` is untrimmed.
    """
    if lam < 0:
        raise ValueError(f"lambda is {lam}, expected 0 or more")
    tau, merged = tau.float(), merged.float()
    return (tau.sign() == merged.sign()) & (merged != 0) & (tau.abs() >= lam * (merged - tau).abs())


def rescale(tau: torch.Tensor, mask: torch.Tensor, merged: torch.Tensor, kind: str = "row") -> torch.Tensor | None:
    """sᵢ, fp32: the least-squares fit of s·(mᵢ⊙τ*) to τᵢ, one per output row (out,), one per tensor (1,), or None.

    s = ⟨τᵢ, mᵢτ*⟩ / ⟨mᵢτ*, mᵢτ*⟩, and 1 where the mask is empty. Sums in fp64.
    """
    if kind == "none":
        return None
    if kind not in SCALES:
        raise ValueError(f"scale is {kind!r}, expected one of {list(SCALES)}")
    own = (mask * merged).double()
    tau = tau.double()
    above, below = (tau * own).sum(-1), (own * own).sum(-1)
    if kind == "tensor":  # fsum: exact, so that no order of summation can show
        above, below = (torch.tensor([math.fsum(rows.tolist())], dtype=torch.float64) for rows in (above, below))
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 1.0).float()


def correct(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r), A (r, in), fp32: BA is the best approximation of `residual` (out, in) of rank r <= rank.

    The truncated SVD, B and A sharing the singular values. A residual of rank <= r is met exactly (to fp32
    rounding). Larger matrices go through subspace iteration with 2r + 16 vectors from a fixed start.
    """
    if residual.ndim != 2 or rank < 0:
        raise ValueError(f"expected a matrix and a rank of 0 or more, found {tuple(residual.shape)} and rank {rank}")
    residual = residual.float()
    small = min(residual.shape)
    rank = min(rank, small)
    width = 2 * rank + 16
    if rank == 0 or not bool(residual.any()):
        return residual.new_zeros(residual.shape[0], rank), residual.new_zeros(rank, residual.shape[1])
    size = residual.abs().max()
    residual = residual / size  # tiny task vectors would underflow when squared
    with one_thread():
        if small <= max(_FULL_SVD, width):
            left, values, right = torch.linalg.svd(residual, full_matrices=False)
        else:
            left, values, right = _leading_svd(residual, width)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # a singular pair is free in its sign: the largest entry of each right vector is made positive
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    root = (values * size).sqrt()
    return left * signs.T * root, root.unsqueeze(1) * right * signs


def _leading_svd(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def recover(
    mask: torch.Tensor | None,
    merged: torch.Tensor,
    scale: torch.Tensor | None = None,
    correction: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """τ̂ᵢ = sᵢ⊙mᵢ⊙τ* + BᵢAᵢ, fp32 (out, in). Without a mask the first term is absent."""
    own = torch.zeros_like(merged, dtype=torch.float32) if mask is None else mask * merged.float()
    if scale is not None:
        own = own * scale.float().unsqueeze(-1)
    if correction is not None:
        own = own + correction[0].float() @ correction[1].float()
    return own
