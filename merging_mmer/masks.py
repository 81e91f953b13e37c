"""What is each expert's own in the merged vector: mask, scale, low-rank correction.

Enters: an expert's untrimmed task vector τᵢ and the merged vector τ* as it is stored. Leaves: mᵢ, sᵢ, BᵢAᵢ with
θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ. Invariant: with λ = 1 no other binary mask is nearer to θᵢ in any entry.
"""

import math

import torch

from .low_rank import correct

__all__ = ["SCALES", "correct", "decouple", "recover", "rescale"]

SCALES = ("row", "tensor", "none")


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
