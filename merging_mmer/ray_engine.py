"""A merge over many machines: the parts of the plan as tasks of a Ray cluster.

Enters: the plan, and what a worker needs to open base and experts by itself: the settled recipe, with sources that
every node sees (a shared folder, or the Hub). Leaves: the parts' bytes, written by the workers into the planned files,
which lie in a folder that every node sees, and the parts' numbers. Invariants: a part's bytes depend on nothing but
the part, so a part whose worker or node was lost is done again and the folder is that of a local merge, byte for byte;
a worker works only on inputs with the hashes that the driver found.
"""

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .experts import Base, Expert, open_expert
from .input_hashes import sha256
from .matrix_work import Job
from .placement import PlacedFiles, Placement
from .plan import Part
from .recipe import Recipe
from .task_vectors import one_thread
from .workers import do_part

# parts are small things to send about: several of them are one task, up to this many bytes to read
_TASK = 64 << 20
_RETRIES = 8
_PATIENCE = 10  # seconds


@dataclass(frozen=True)
class Order:
    """What a worker must know, apart from the parts. recipe: as JSON, settled. inputs: (path, size, mtime, sha256)."""

    recipe: str
    tokens: int
    dtype: torch.dtype
    rank: int
    block: int
    trust_remote_code: bool
    folder: Path
    inputs: tuple[tuple[str, int, int, str], ...]


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The connected module `ray`. Raises ValueError where it is not installed or no cluster answers."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("a merge over a cluster needs Ray: pip install 'mmer[ray]'") from error
    mine = not ray.is_initialized()
    try:
        _answers(address)
        if mine:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        raise ValueError(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


def _answers(address: str):
    """Raises OSError where nothing listens at host:port; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def hashes_on(ray: Any, files: Sequence[Path]) -> list[str]:
    """sha256 of every file, by whichever node is free."""
    task = ray.remote(max_retries=_RETRIES)(sha256)
    return ray.get([task.remote(file) for file in files])


def parts_on(
    ray: Any, order: Order, placement: Placement, thresholds: Mapping[str, Any], parts: Iterable[Part]
) -> Iterator[tuple[Part, dict[str, Any] | None]]:
    """(part, its numbers) as they come. Raises the first error of a worker; other tasks are cancelled then."""
    task = ray.remote(max_retries=_RETRIES)(_do_parts)
    plan, shared = ray.put(placement), ray.put(dict(thresholds))
    running = {task.remote(order, plan, shared, batch): batch for batch in batches(parts)}
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            yield from zip(running.pop(ready), ray.get(ready), strict=True)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from error
    finally:
        for left in running:
            ray.cancel(left, force=True)


def batches(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts in their order, as many in one task as read `_TASK` bytes together."""
    made: list[list[Part]] = []
    room = 0
    for part in parts:
        if part.reads > room or not made:
            made.append([])
            room = _TASK
        made[-1].append(part)
        room -= part.reads
    return made


# on a node


def _do_parts(
    order: Order, placement: Placement, thresholds: dict[str, Any], parts: Sequence[Part]
) -> list[dict[str, Any] | None]:
    with one_thread():
        recipe, base, experts = _open(order)
        files = PlacedFiles(order.folder, placement, keep=True, make=False)
        job = Job(
            recipe, base, experts, order.tokens, order.dtype, order.rank, files,
            thresholds=thresholds, block=order.block,
        )  # fmt: skip
        try:
            return [do_part(job, part) for part in parts]
        finally:
            files.close()


@lru_cache(maxsize=1)
def _open(order: Order) -> tuple[Recipe, Base, list[Expert]]:
    """Base and experts, opened once in a worker's process."""
    recipe = Recipe.model_validate_json(order.recipe)
    base = Base(recipe.base, order.trust_remote_code)
    experts = [open_expert(name, e, base, order.trust_remote_code) for name, e in recipe.experts.items()]
    files = [*base.files(), *(file for expert in experts for file in expert.files())]
    _check_inputs(list(dict.fromkeys(files)), order.inputs)
    return recipe, base, experts


def _check_inputs(files: Sequence[Path], known: Sequence[tuple[str, int, int, str]]):
    if len(files) != len(known):
        raise ValueError(f"{socket.gethostname()} finds {len(files)} input files where the driver found {len(known)}")
    for file, (path, size, mtime, digest) in zip(files, known, strict=True):
        stat = file.stat()
        if str(file) == path and (stat.st_size, stat.st_mtime_ns) == (size, mtime):
            continue  # the very file, in a shared folder
        if sha256(file) != digest:
            raise ValueError(
                f"{file} on {socket.gethostname()} is not the {os.path.basename(path)} that the driver read: give a "
                "shared folder, or a Hub id with its revision (org/name@revision)"
            )
