"""The merge: a recipe in, a Hub repository on disk out.

What it needs is imported while the inputs are being hashed: to import it takes seconds, and one processor. Invariant:
the output folder appears at once and whole, or not at all.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .input_hashes import InputHashes, likely_files
from .recipe import Recipe
from .start import collector_paused

if TYPE_CHECKING:
    from .plan import MergePlan
    from .report import MergeReport


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    progress: bool = True,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    finish: Callable[[Path], object] | None = None,
    threads: int | None = None,
    block: int | None = None,
    device: str = "cpu",
    ray: str | None = None,
) -> "MergeReport":
    """Merge what `recipe` names into the new folder `out`.

    A merge that was killed goes on where it was when it is called again, and gives the same bytes. `finish` is called
    with the finished folder, just before it appears under its name, to add files to it (a card).

    threads: workers, each with one tensor at a time; as many as the process has processors when absent. block: entries
    of a block. device: where the arithmetic is done ("cuda"). ray: the address of a Ray cluster whose nodes do the
    work, `auto` for the one that runs here; they must see `out`, and the sources of the recipe. Threads, block and
    cluster change no byte.

    Raises ValueError for a recipe, base or expert that does not fit, and for an `out` that holds something (unless
    `overwrite`); OSError for a disk without room. Nothing is left behind then.
    """
    started = time.monotonic()
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} is not empty. Give another folder, or overwrite=True to replace it")
    workplace = out.parent / f".{out.name}.partial"
    _check_device(device, ray)
    threads = _processors() if threads is None else threads
    with _cluster(ray) as connected, _parents(out), _alone(workplace):
        put_back(workplace, out)
        try:
            recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
            unfinished = workplace / out.name
            # one processor is this thread's, which makes ready meanwhile
            with InputHashes(max(1, threads - 1), connected) as hashed:
                hashed.start(likely_files(recipe))
                with collector_paused():
                    from .opened_merge import OpenedMerge

                    opened = OpenedMerge(
                        recipe, max_shard_size, trust_remote_code, threads, block, device, progress, connected
                    )
                    hashed.need(opened.files())
                    opened.prepare()
                report = opened.run(unfinished, hashed, started)
            if finish is not None:
                finish(unfinished)
        except Exception:
            # an interrupt is no Exception: it leaves what is done, to go on from
            shutil.rmtree(workplace, ignore_errors=True)
            raise
        put_in_place(unfinished, out)
        shutil.rmtree(workplace)
    return report


def plan(
    recipe: Recipe | str | Path,
    max_shard_size: str | int = "2GB",
    trust_remote_code: bool = False,
    threads: int | None = None,
    block: int | None = None,
) -> "MergePlan":
    """What `merge` would do, without writing anything. Raises ValueError as `merge` does."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    threads = _processors() if threads is None else threads
    with collector_paused():
        from .opened_merge import OpenedMerge

        opened = OpenedMerge(recipe, max_shard_size, trust_remote_code, threads, block, "cpu", False)
        opened.prepare()
    return opened.plan


def _cluster(address: str | None) -> Any:
    """The connected module `ray`, or None."""
    if address is None:
        return nullcontext()
    from .ray_engine import cluster  # imports what opens checkpoints

    return cluster(address)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """The folders above `out` are there; those that were made for it go again where the merge is refused."""
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        with suppress(OSError):  # somebody else put something there
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def _alone(workplace: Path) -> Iterator[None]:
    """Raises ValueError where another process is merging into the same folder."""
    workplace.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder = os.open(workplace, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{workplace}: another process is merging into this folder. Wait for it") from error
        yield
    finally:
        os.close(folder)


def _check_device(device: str, ray: str | None):
    if device == "cpu":
        return
    if ray is not None:
        raise ValueError(f"found device {device!r} and a Ray cluster, whose workers use CPUs: give one of the two")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which is not to be had here: {error}") from error


def put_in_place(unfinished: Path, out: Path):
    """Give a finished folder its name. What stood there is beside it then, under the name `<out>.replaced`."""
    old = unfinished.with_name(f"{out.name}.replaced")
    if out.exists():
        os.replace(out, old)
    os.replace(unfinished, out)


def put_back(workplace: Path, out: Path):
    """Give an old folder its name back, where its successor did not get it: a process killed between two renamings."""
    old = workplace / f"{out.name}.replaced"
    if not out.exists() and old.is_dir():
        os.replace(old, out)


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
