"""What the merge did to each expert, in numbers.

Enters: every tensor's task vectors, merged vector, masks and recovered values, as they are stored. Leaves:
`MergeReport`, written as merge_report.json. Units: norms are Frobenius norms of fp32 values, shares and densities
lie in 0..1, residual is ‖θ̂ᵢ-θᵢ‖/‖τᵢ‖ with θ̂ᵢ rounded to the stored dtype, and rounding what that rounding alone
would cost θᵢ.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .experts import Distance
from .matrices import row_blocks

# an expert is starved when the share of its energy that the masks keep is below this part of the best expert's
STARVED = 0.5

_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.")


def tensor_kind(name: str) -> str:
    """What the tensor is in every layer: "self_attn.q_proj.weight" of "layers.7.self_attn.q_proj.weight"."""
    return _LAYER.sub("", name)


def layer_of(name: str) -> str | None:
    """ "7" of "layers.7.self_attn.q_proj.weight"; None of a tensor that lies in no layer."""
    found = _LAYER.match(name)
    return found[1] if found else None


@dataclass
class Sums:
    entries: int = 0
    tau: float = 0.0
    kept: float = 0.0
    error: float = 0.0
    rounding: float = 0.0
    on: int = 0
    masked: int = 0
    against: int = 0
    nonzero: int = 0

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def shares(self) -> dict[str, float | int | None]:
        return {
            "entries": self.entries,
            "norm": self.tau**0.5,
            "mask_density": self.on / self.masked if self.masked else None,
            "kept_energy": self.kept / self.tau if self.masked and self.tau else None,
            "residual": (self.error / self.tau) ** 0.5 if self.tau else 0.0,
            "rounding": (self.rounding / self.tau) ** 0.5 if self.tau else 0.0,
            "against_merged_sign": self.against / self.nonzero if self.nonzero else 0.0,
        }


@dataclass
class MergeReport:
    """merge_report.json. `experts[name]` holds coefficients, `total`, by kind of tensor `tensors`, and `layers`: norm
    and residual by layer."""

    base: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    decoupling: dict[str, Any] = field(default_factory=dict)
    sign_conflicts: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    dtype: str = ""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def misplaced(report: dict[str, Any]) -> str:
    """The first field of a report as JSON has it that is no such thing as a merge writes; empty where all are."""
    for name, plain in asdict(MergeReport()).items():
        value = report.get(name, plain)
        inside = dict if name == "experts" else str
        entries = value.values() if name == "experts" and isinstance(value, dict) else value
        numbers = isinstance(plain, float) and isinstance(value, int | float)
        if not numbers and not isinstance(value, type(plain)):
            return name
        if name in ("experts", "warnings", "notes") and not all(isinstance(one, inside) for one in entries):
            return name
    return ""


class Measurement:
    """Gathers, tensor by tensor, what `fill` turns into the report."""

    def __init__(self, experts: Sequence[str], dtype: torch.dtype):
        self.experts, self.dtype = list(experts), dtype
        self.sums: dict[str, dict[str, Sums]] = {name: defaultdict(Sums) for name in self.experts}
        # layer -> the energies of its task vectors and of what is not recovered of them
        self.layers: dict[str, dict[str, list[float]]] = {name: defaultdict(lambda: [0.0, 0.0]) for name in experts}
        self.bits = dict.fromkeys(self.experts, 0)
        self.distance = {name: Distance() for name in self.experts}
        self.conflicts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.changed = self.unchanged = self.parameters = 0

    def same(self, theta_0: torch.Tensor):
        """A tensor that no expert changed."""
        self.unchanged += 1
        if theta_0.ndim > 1:
            for distance in self.distance.values():
                distance.add(torch.zeros(1), theta_0)

    def several(self, name: str, taus: Sequence[torch.Tensor], theta_0: torch.Tensor):
        """The experts' task vectors of one tensor, beside one another."""
        self.changed += 1
        self.parameters += theta_0.numel()
        conflicts = self.conflicts[tensor_kind(name)]
        for rows in row_blocks(theta_0):
            up, down = (torch.zeros(theta_0[rows].shape, dtype=torch.int8) for _ in range(2))
            for expert, tau in zip(self.experts, taus, strict=True):
                up += tau[rows] > 0
                down += tau[rows] < 0
                if theta_0.ndim > 1:
                    self.distance[expert].add(tau[rows], theta_0[rows])
            conflicts[0] += int(((up > 0) & (down > 0)).sum())
            conflicts[1] += int((up + down > 1).sum())

    def one(
        self,
        expert: str,
        name: str,
        theta_0: torch.Tensor,
        tau: torch.Tensor,
        merged: torch.Tensor,
        recovered: torch.Tensor,
        mask: torch.Tensor | None,
    ):
        """One expert's part in some rows of one tensor: θ₀, τᵢ, τ*, the recovered τ̂ᵢ before rounding, and the mask."""
        start, energy = theta_0.float(), tau.double().square()
        error = (start.to(self.dtype).float() + recovered).to(self.dtype).float() - start - tau
        rounding = (start + tau).to(self.dtype).float() - start - tau
        sums = Sums(
            entries=tau.numel(),
            tau=float(energy.sum()),
            error=float(error.double().square().sum()),
            rounding=float(rounding.double().square().sum()),
            kept=float((energy * mask).sum()) if mask is not None else 0.0,
            on=int(mask.sum()) if mask is not None else 0,
            masked=tau.numel() if mask is not None else 0,
            against=int((tau.sign() * merged.sign() < 0).sum()),
            nonzero=int((tau != 0).sum()),
        )
        self.count(expert, name, sums)

    def count(self, expert: str, name: str, sums: Sums):
        """Count in one expert's part in one tensor, or in some rows of it."""
        of_kind = self.sums[expert]
        of_kind[tensor_kind(name)] = of_kind[tensor_kind(name)].plus(sums)
        if (layer := layer_of(name)) is not None:
            self._count_layer(expert, layer, sums.tau, sums.error)

    def _count_layer(self, expert: str, layer: str, tau: float, error: float):
        energies = self.layers[expert][layer]
        energies[0] += tau
        energies[1] += error

    def stored(self, expert: str, tensors: Iterable[torch.Tensor | None]):
        """Tensors that are stored for one expert alone."""
        self.bits[expert] += 8 * sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def state(self) -> dict[str, Any]:
        """Everything gathered so far, as plain values."""
        return {
            "sums": {name: {kind: asdict(sums) for kind, sums in of.items()} for name, of in self.sums.items()},
            "layers": {name: {layer: list(both) for layer, both in of.items()} for name, of in self.layers.items()},
            "distance": {name: asdict(distance) for name, distance in self.distance.items()},
            "bits": dict(self.bits),
            "conflicts": {kind: list(both) for kind, both in self.conflicts.items()},
            "counts": [self.changed, self.unchanged, self.parameters],
        }

    def join(self, state: dict[str, Any]):
        """Count in what another measurement of the same experts gathered, as its `state` gives it."""
        for name, of in state["sums"].items():
            for kind, sums in of.items():
                self.sums[name][kind] = self.sums[name][kind].plus(Sums(**sums))
        for name, layers in state["layers"].items():
            for layer, (tau, error) in layers.items():
                self._count_layer(name, layer, tau, error)
        for name, distance in state["distance"].items():
            self.distance[name].join(Distance(**distance))
        for name, bits in state["bits"].items():
            self.bits[name] += bits
        for kind, counts in state["conflicts"].items():
            self.conflicts[kind] = [a + b for a, b in zip(self.conflicts[kind], counts, strict=True)]
        changed, unchanged, parameters = state["counts"]
        self.changed += changed
        self.unchanged += unchanged
        self.parameters += parameters

    def fill(self, report: MergeReport):
        """Write the gathered numbers into the report, with the warnings that follow from them."""
        for name in self.experts:
            total = Sums()
            for sums in self.sums[name].values():
                total = total.plus(sums)
            report.experts.setdefault(name, {}).update(
                distance_to_base=self.distance[name].relative,
                cosine_to_base=self.distance[name].cosine,
                bits_per_parameter=self.bits[name] / self.parameters if self.parameters else 0.0,
                total=total.shares(),
                tensors={kind: sums.shares() for kind, sums in self.sums[name].items()},
                layers=self._layer_shares(name),
            )
        report.sign_conflicts = {kind: both / of if of else 0.0 for kind, (both, of) in self.conflicts.items()}
        report.tensors = {
            "changed": self.changed,
            "equal_to_base": self.unchanged,
            "parameters_changed": self.parameters,
        }
        report.warnings += starved({name: report.experts[name] for name in self.experts})

    def _layer_shares(self, expert: str) -> dict[str, dict[str, float]]:
        layers = sorted(self.layers[expert].items(), key=lambda item: int(item[0]))
        return {
            layer: {"norm": tau**0.5, "residual": (error / tau) ** 0.5 if tau else 0.0}
            for layer, (tau, error) in layers
        }


def starved(experts: dict[str, dict[str, Any]]) -> list[str]:
    """A warning for each expert of a report of whose energy the masks keep far less than of the best one's."""
    kept = {name: numbers["total"]["kept_energy"] for name, numbers in experts.items()}
    known = {name: share for name, share in kept.items() if share is not None}
    best = max(known.values(), default=0.0)
    return [
        f"expert {name!r} is starved: the merged vector keeps {share:.1%} of its energy, of the best "
        f"expert's {best:.1%}. Its task vector is short beside the others'; a larger weight, a smaller lambda or "
        "a higher rank helps it"
        for name, share in known.items()
        if share < STARVED * best
    ]


def count_unchanged(expert: dict[str, Any], sums: dict[str, Sums]):
    """Count into an expert's part of a report further tensors, by kind, in which its task vector is 0.

    They carry a merged vector now, for another expert. `sums` are those of a `Measurement`.
    """
    total, whole = Sums(), _sums(expert["total"], _masked(expert))
    for kind, more in sums.items():
        old = expert["tensors"].get(kind, Sums().shares())
        masked = old["entries"] if old["mask_density"] is not None else 0
        expert["tensors"][kind] = {**_sums(old, masked).plus(more).shares(), **_kept(old)}
        total = total.plus(more)
    expert["total"] = {**whole.plus(total).shares(), **_kept(expert["total"])}


def count_copy(expert: dict[str, Any], kind: str, copy_of: str):
    """Count into an expert's part of a report a tensor that has been one with another: head and embedding."""
    shares, whole = expert["tensors"][copy_of], _sums(expert["total"], _masked(expert))
    masked = shares["entries"] if shares["mask_density"] is not None else 0
    against = expert["total"]["against_merged_sign"]
    expert["tensors"][kind] = dict(shares)
    expert["total"] = {**whole.plus(_sums(shares, masked)).shares(), "against_merged_sign": against}


def _masked(expert: dict[str, Any]) -> int:
    return sum(kind["entries"] for kind in expert["tensors"].values() if kind["mask_density"] is not None)


def _kept(shares: dict[str, Any]) -> dict[str, Any]:
    """What tensors with a task vector of 0 leave as it is, to the last digit."""
    return {key: shares[key] for key in ("norm", "against_merged_sign")}


def _sums(shares: dict[str, Any], masked: int) -> Sums:
    """The sums behind the shares of a report, of which `masked` entries have a mask; signs were not counted."""
    energy = shares["norm"] ** 2
    return Sums(
        entries=shares["entries"],
        tau=energy,
        kept=energy * (shares["kept_energy"] or 0.0),
        error=energy * shares["residual"] ** 2,
        rounding=energy * shares["rounding"] ** 2,
        on=round(masked * (shares["mask_density"] or 0.0)),
        masked=masked,
    )
