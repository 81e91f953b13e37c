"""Other ways to merge, as formulas on the task vectors of one tensor: what the merge of this project is held against.

Enters: expert -> τᵢ of one tensor, fp32, all of one shape. Leaves: `Merged`, that is τ* and, where the method has
them, masks: expert i is θ₀ + sᵢ·mᵢ⊙τ* then, with sᵢ = 1 but for EMR, and θ₀ + τ* without. Trimming, TIES, task
arithmetic and EMR's unified vector are those of merging_mmer/ties.py. Invariants: the order of the experts changes
nothing, and what DARE drops depends on (seed, expert, tensor, index of the entry) alone: on no block and no thread.

| method | τ* | mᵢ |
|---|---|---|
| weight_average | (1/n)·Σ τᵢ, which is the mean of the θᵢ less θ₀: in linears, norms, biases and vocabulary | |
| naive_mc | Σ λᵢτᵢ with λᵢ = 1/n, in linears alone: it averages LoRAs (ModelCompose), all else stays the base's | |
| task_arithmetic | scaling·Σ τᵢ | |
| dare | scaling·Σ τᵢ⊙kᵢ/(1−p), where kᵢ keeps an entry with the chance 1−p | |
| consensus | scaling·c⊙Σ τᵢ, where c drops what fewer than `least` TALL masks claim | |
| emr | the elected sign, the largest magnitude that has it | τᵢ·τ* > 0 |
| tall | Σ τᵢ | abs(τᵢ) ≥ λᵢ·abs(τ* − τᵢ) |

Sources: task arithmetic 2212.04089, TIES 2306.01708, DARE 2311.03099, EMR 2405.17461, TALL masks and Consensus
2405.07813, NaiveMC 2402.12750.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from merging_mmer.masks import decouple
from merging_mmer.task_vectors import one_thread
from merging_mmer.ties import emr, task_arithmetic

# of each method, the coefficients it has
METHODS: dict[str, tuple[str, ...]] = {
    "weight_average": (),
    "naive_mc": (),
    "task_arithmetic": ("scaling",),
    "dare": ("scaling", "drop", "seed"),
    "consensus": ("scaling", "lam", "least"),
    "emr": (),
    "tall": ("lam",),
}
# where the authors look for the best one, on validation data
GRIDS = {"scaling": tuple(round(0.1 * i, 1) for i in range(1, 11)), "lam": (0.2, 0.3, 0.4, 0.5, 0.6)}
_DRAWN = 1 << 20  # random numbers at a time
_FINE = 53  # bits of each that are used


@dataclass(frozen=True)
class Coefficients:
    """What the methods leave open. lam: λ of the TALL masks, one for all experts or {expert: its own}.

    The defaults are published ones: scaling 0.4 of task arithmetic (the TIES authors' own), a drop rate of 0.9 for
    DARE, the middle of TALL's grid, and 2 masks for Consensus.
    """

    scaling: float = 0.4
    drop: float = 0.9
    seed: int = 0
    lam: float | Mapping[str, float] = 0.4
    least: int = 2

    def __post_init__(self):
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling}, expected a finite number")
        _check_drop(self.drop)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}, expected a whole number of 0 or more")
        for lam in self.lam.values() if isinstance(self.lam, Mapping) else (self.lam,):
            _check_lam(lam)
        if self.least < 0:
            raise ValueError(f"least is {self.least}, expected a number of masks: 0 or more")

    def lam_of(self, expert: str) -> float:
        if not isinstance(self.lam, Mapping):
            return self.lam
        if expert not in self.lam:
            raise ValueError(f"lam has {sorted(self.lam)}, but nothing for expert {expert!r}")
        return self.lam[expert]


@dataclass(frozen=True)
class Merged:
    """τ* of one tensor, fp32, and expert -> mᵢ (bool, same shape); without masks every expert is given all of τ*."""

    vector: torch.Tensor
    masks: dict[str, torch.Tensor] | None = None


def weight_average(taus: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1/n)·Σ θᵢ − θ₀ = (1/n)·Σ τᵢ: task arithmetic with the scaling 1/n."""
    return task_arithmetic(taus, alpha=1 / len(taus))


def naive_mc(taus: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """Σ λᵢτᵢ, with λᵢ = 1/n by default."""
    return task_arithmetic(taus, [1 / len(taus)] * len(taus) if weights is None else weights)


def dare(tau: torch.Tensor, drop: float, seed: int, expert: str, tensor: str = "", first: int = 0) -> torch.Tensor:
    """τ⊙k/(1−p): each entry is dropped with the chance p = `drop`, the others grow, so that the mean over seeds is τ.

    `first`: index of the first entry, in memory order, of a block of rows in its whole tensor.
    """
    _check_drop(drop)
    if drop == 0:
        return tau.float()
    kept = torch.empty(tau.numel(), dtype=torch.bool)
    for start in range(0, tau.numel(), _DRAWN):
        part = slice(start, min(start + _DRAWN, tau.numel()))
        drawn = random_bits(seed, expert, tensor, first + start, part.stop - start) >> np.uint64(64 - _FINE)
        kept[part] = torch.from_numpy(drawn >= np.uint64(round(drop * 2**_FINE)))
    # times, not over: a GPU divides by a number by way of its reciprocal, a CPU does not
    return torch.where(kept.view(tau.shape).to(tau.device), tau.float() * (1 / (1 - drop)), 0.0)


def random_bits(seed: int, expert: str, tensor: str, first: int, count: int) -> np.ndarray:
    """`count` numbers of 64 random bits, uint64: those of the entries `first`, `first` + 1, … of one tensor.

    Philox (4 × 64 bits, 10 rounds) counts: its key is a hash of seed, expert and tensor, its counter the entry's
    index over 4, so that any part of a tensor can be drawn by itself.
    """
    named = hashlib.sha256("\0".join((str(seed), expert, tensor)).encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(named[:16], "<u8").astype(np.uint64))
    bits.advance(first // 4)
    return bits.random_raw(first % 4 + count)[first % 4 :]


def tall_mask(tau: torch.Tensor, merged: torch.Tensor, lam: float = 1.0) -> torch.Tensor:
    """mᵢ, bool: 1 where |τᵢ| ≥ λ·|τ* − τᵢ|.

    That is `masks.decouple` without its condition that τᵢ and τ* have one sign. At λ ≥ 1 the condition follows from
    the inequality, but for rounding and for entries with τ* = 0, where a mask is idle; below, as TALL has it, entries
    of the other sign are kept where |τ*| ≤ |τᵢ|·(1−λ)/λ. (The authors' code has > for ≥: another mask only where both
    sides are equal.)
    """
    _check_lam(lam)
    tau, merged = tau.float(), merged.float()
    return tau.abs() >= lam * (merged - tau).abs()


def consensus(merged: torch.Tensor, masks: Sequence[torch.Tensor], least: int = 2) -> torch.Tensor:
    """τ* without the entries that fewer than `least` masks claim."""
    claims = torch.stack(list(masks)).sum(0)
    return torch.where(claims >= least, merged, 0.0)


def emr_mask(tau: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """mᵢ, bool: 1 where τᵢ and the unified vector have one sign."""
    return decouple(tau, merged, 0.0)


def emr_scales(tensors: Iterable[tuple[Mapping[str, torch.Tensor], Merged]]) -> dict[str, float]:
    """Expert -> sᵢ = Σ mean|τᵢ| / Σ mean|mᵢ⊙τ*|, one number for the whole model; the sums are over its tensors.

    `tensors`: (expert -> τᵢ, what EMR made of them). 1 where nothing of τ* is the expert's.
    """
    above: dict[str, list[float]] = {}
    below: dict[str, list[float]] = {}
    with one_thread():
        for taus, merged in tensors:
            for expert, tau in taus.items():
                own = merged.vector if merged.masks is None else merged.masks[expert] * merged.vector
                above.setdefault(expert, []).append(float(tau.double().abs().mean()))
                below.setdefault(expert, []).append(float(own.double().abs().mean()))
    pairs = {expert: (math.fsum(above[expert]), math.fsum(below[expert])) for expert in above}
    return {expert: over / under if under else 1.0 for expert, (over, under) in pairs.items()}


def merge_tensor(
    method: str,
    tensor: str,
    taus: Mapping[str, torch.Tensor],
    settings: Coefficients,
    dtype: torch.dtype,
    linear: bool,
) -> Merged:
    """One tensor by one of `METHODS`. Its τ* is rounded to `dtype`, as it is stored; masks are found from that.

    `tensor`: its name, which DARE draws by. `linear`: whether it is the weight of a linear.
    Raises ValueError for another method, without an expert, and for task vectors of several shapes.
    """
    shapes = {tuple(tau.shape) for tau in taus.values()}
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {list(METHODS)}")
    if len(shapes) != 1:
        raise ValueError(f"{tensor}: the task vectors have the shapes {sorted(shapes)}, expected one and the same")
    values = list(taus.values())

    def stored(vector: torch.Tensor) -> torch.Tensor:
        return vector.to(dtype).float()

    if method == "weight_average":
        return Merged(stored(weight_average(values)))
    if method == "naive_mc":
        return Merged(stored(naive_mc(values)) if linear else torch.zeros_like(values[0]))
    if method == "task_arithmetic":
        return Merged(stored(task_arithmetic(values, alpha=settings.scaling)))
    if method == "dare":
        left = [dare(tau, settings.drop, settings.seed, expert, tensor) for expert, tau in taus.items()]
        return Merged(stored(task_arithmetic(left, alpha=settings.scaling)))
    if method == "emr":
        vector = stored(emr(values))
        return Merged(vector, {expert: emr_mask(tau, vector) for expert, tau in taus.items()})
    vector = stored(task_arithmetic(values))
    masks = {expert: tall_mask(tau, vector, settings.lam_of(expert)) for expert, tau in taus.items()}
    if method == "tall":
        return Merged(vector, masks)
    return Merged(stored(consensus(vector, list(masks.values()), settings.least) * settings.scaling))


def _check_drop(drop: float):
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}, expected 0 <= drop < 1")


def _check_lam(lam: float):
    if not 0 <= lam < math.inf:
        raise ValueError(f"lambda is {lam}, expected a finite number of 0 or more")
