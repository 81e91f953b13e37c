"""One tensor of the language model as a whole, in torch: what is too small for blocks, and matrices on a GPU.

Enters: θ₀ and τᵢ of one tensor, whole. Leaves: its parts, written to their places in the folder, and the numbers of
the report. The functions are those of ties.py and masks.py on whatever device they are given. Invariant: what is
measured is what is stored; on a CPU the bits of τ* and of the masks are those of matrix_work.py.
"""

import torch

from .decoupling import exact_factors
from .experts import Expert
from .matrices import Decoupled, decouple_matrix, merged_vector, row_blocks
from .matrix_work import Job
from .naming import stored_name
from .report import Measurement


class TensorWork:
    def __init__(self, job: Job, name: str, device: str = "cpu"):
        self.job, self.name, self.recipe, self.device = job, name, job.recipe, torch.device(device)
        self.own = job.base.tensor(name)
        self.theta_0 = self.own.to(self.device)
        self.taus = [e.task_vector(name, self.own, job.tokens).to(self.device) for e in job.experts]
        self.place = stored_name(name)
        self.measurement = job.measurement()

    def merged(self) -> torch.Tensor:
        """τ*, with the ties that this tensor has where one threshold holds for the whole model."""
        names = [expert.name for expert in self.job.experts]
        thresholds = {name: (value, shares[self.name]) for name, (value, shares) in self.job.thresholds.items()}
        self.measurement.several(self.name, self.taus, self.theta_0)
        return merged_vector(self.recipe, names, self.taus, thresholds, self.job.dtype)

    def matrix(self) -> Measurement:
        """τ*, masks, scales and corrections of one matrix."""
        delta, prefix = self.merged(), self.place.removesuffix(".weight")
        self.job.files.add(f"{prefix}.delta", delta)
        for i, (expert, tau) in enumerate(zip(self.job.experts, self.taus, strict=True)):
            own = self._decoupled(expert, tau, delta)
            for part, tensor in own.stored().items():
                tensor = tensor.cpu().contiguous()
                if tensor.nbytes:
                    values = tensor.reshape(-1).view(torch.uint8).numpy()
                    self.job.files.write(f"{prefix}.{part}", values, i * tensor.nbytes)
            self.measurement.stored(expert.name, own.stored().values())
            for rows in row_blocks(tau):
                static = self.recipe.decoupling.kind == "none"
                recovered = delta[rows].float() if static else own.tau(delta, rows)
                mask = None if own.mask is None else own.mask[rows]
                self.measurement.one(
                    expert.name, self.name, self.theta_0[rows], tau[rows], delta[rows], recovered, mask
                )
        return self.measurement

    def _decoupled(self, expert: Expert, tau: torch.Tensor, delta: torch.Tensor) -> Decoupled:
        kind, scale, dtype = self.recipe.decoupling.kind, self.recipe.decoupling.scale, self.job.dtype
        rank = min(self.job.rank, *self.theta_0.shape)
        if kind in ("mask", "paper"):
            return decouple_matrix(tau, delta, self.recipe.lam(expert.name), scale, rank, dtype)
        if kind == "exact":
            dense = bool(expert.dense_part(self.name, self.own, self.job.tokens).any())
            b, a = exact_factors(expert, self.name, self.own, rank, self.job.tokens, dense)
            return Decoupled(correction=(b.to(self.device, dtype), a.to(self.device, dtype)))
        return Decoupled()

    def small(self) -> Measurement:
        """A tensor too small to compress: each expert's own, exactly, and θ₀ + τ* (in a static merge for all)."""
        merged, dtype = self.merged(), self.job.dtype
        joint = (self.theta_0.float() + merged).to(dtype)
        own = []
        for expert, tau in zip(self.job.experts, self.taus, strict=True):
            if self.recipe.decoupling.kind == "none":
                tensor = joint
            else:
                tensor = (expert.exact_tensor(self.name) if bool(tau.any()) else self.own).to(self.device, dtype)
            own.append(tensor)
            self.measurement.stored(expert.name, [tensor])
            recovered = tensor.float() - self.theta_0.float()
            self.measurement.one(expert.name, self.name, self.theta_0, tau, merged, recovered, None)
        prefix, _, leaf = self.place.rpartition(".")
        self.job.files.add(f"{prefix}.expert_{leaf}", torch.stack(own))
        self.job.files.add(f"{prefix}.merged_{leaf}", joint)
        return self.measurement
