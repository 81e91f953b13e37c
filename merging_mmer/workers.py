"""What a worker does with one part of a merge; any number of them work side by side.

Enters: the job that all share, and a part of its plan. Leaves: the part's bytes at their places, and its numbers as
plain values. Invariant: a part needs no other part.
"""

from typing import Any

import torch

from .matrix_work import Job, MatrixWork
from .naming import stored_name
from .plan import Part
from .tensor_work import TensorWork


def do_part(job: Job, part: Part, device: str = "cpu") -> dict[str, Any] | None:
    """Write the part's tensors; what was measured, as `Measurement.state` gives it, None of towers and added rows."""
    if part.kind == "tower":
        expert = next(expert for expert in job.experts if expert.name == part.expert)
        job.files.add(part.stored[0].name, expert.tower_tensor(part.name.partition(":")[2]))
        return None
    if part.kind == "rows":
        for stored, rows in zip(part.stored, job.added_rows, strict=True):
            job.files.add(stored.name, rows)
        return None
    theta_0 = job.base.tensor(part.name)
    job.files.add(stored_name(part.name), theta_0.to(job.dtype))
    if part.kind == "same":
        return _same(job, theta_0)
    if part.kind == "small":
        return TensorWork(job, part.name, device).small().state()
    if device == "cpu":
        return MatrixWork(job, part.name).run().state()
    return TensorWork(job, part.name, device).matrix().state()


def _same(job: Job, theta_0: torch.Tensor) -> dict[str, Any]:
    measurement = job.measurement()
    measurement.same(theta_0)
    return measurement.state()
