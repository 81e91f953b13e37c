"""The sha256 of every file that a merge reads, found while the merge makes ready.

Enters: the weight files that a recipe is likely to mean, before anything heavy is imported; then the files of the
opened base and experts. Leaves: path -> sha256, by threads that start at once. Invariant: what was hashed is what was
read, or `check` says which file was changed in between.
"""

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from .recipe import Recipe

# a whole number of pages everywhere; long enough that a thread is seldom in want of the interpreter's lock, which the
# main thread gives away only every 5 ms while it imports
_WINDOW = 1 << 26
_WEIGHTS = (".safetensors", ".bin")


class Cancelled(Exception):
    """Nobody waits for the hash any more."""


def sha256(path: Path, before: Callable[[], object] = bool) -> str:
    """`before` is called before each window of the file, and may raise to end it.

    The file is mapped window by window: nothing is copied, and no more of it than a window is ever resident.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, _WINDOW):
            before()
            length = min(_WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as window:
                digest.update(window)
    return digest.hexdigest()


def hashes(files: Sequence[Path], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 by file name; a second file of one name (checkpoint and adapter) gets its number behind it."""
    found: dict[str, str] = {}
    for file in files:
        name = file.name if file.name not in found else f"{file.name} ({len(found)})"
        found[name] = sha256(file) if known is None else known[str(file)]
    return found


def likely_files(recipe: Recipe) -> list[Path]:
    """The weight files in the folders that a recipe names: most of what its merge will read.

    A guess that costs nothing when it is wrong. What is no plain file is left to those who refuse it.
    """
    experts = recipe.experts.values()
    sources = [recipe.base, *(source for e in experts for source in (e.model, e.lora, e.tower) if source)]
    found: list[Path] = []
    folders = dict.fromkeys(Path(source).expanduser() for source in sources)
    for folder in filter(Path.is_dir, folders):
        there = sorted(path for path in folder.glob("*model*") if path.suffix in _WEIGHTS and os.path.isfile(path))
        kinds = [path.suffix for path in there]
        # as transformers does: safetensors where there are any
        found += [path for path in there if path.suffix == (_WEIGHTS[0] if _WEIGHTS[0] in kinds else path.suffix)]
    return found


class InputHashes:
    """Hashes files by `threads` threads, and by the one that waits for the result.

    `files`: those that are needed, in order. `stats`: file -> (size, mtime in ns) before it was read. ray: the cluster
    that hashes, instead of threads.
    """

    def __init__(self, threads: int, ray: Any = None):
        self.files: list[Path] = []
        self.stats: dict[Path, tuple[int, int]] = {}
        self._ray, self._threads, self._stop = ray, threads, Event()
        self._pool = ThreadPoolExecutor(threads)
        self._found: dict[Path, Future[str]] = {}
        self._waiting: deque[Path] = deque()
        self._needed: set[Path] | None = None  # not known yet
        self._known: dict[str, str] | None = None

    def __enter__(self) -> "InputHashes":
        return self

    def __exit__(self, *_: object):
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, files: Iterable[Path]):
        """Begin with these, the largest first. Raises OSError for one that is not there."""
        new = [file for file in dict.fromkeys(files) if file not in self.stats]
        self.stats |= {file: _stat(file) for file in new}
        if self._ray is None:
            self._found |= {file: Future() for file in new}
            self._waiting.extend(sorted(new, key=lambda file: -self.stats[file][0]))
            for _ in range(min(self._threads, len(new))):
                self._pool.submit(self._work)

    def need(self, files: Iterable[Path]):
        """These, and no others of those that were begun, are what `result` is about."""
        self.files = list(dict.fromkeys(files))
        self._needed = set(self.files)
        self.stats = {file: stat for file, stat in self.stats.items() if file in self._needed}
        self.start(self.files)

    def _work(self):
        while True:
            try:
                file = self._waiting.popleft()
            except IndexError:  # all are done, or in the hands of another thread
                return
            try:
                self._found[file].set_result(sha256(file, lambda: self._go_on(file)))
            except BaseException as error:
                self._found[file].set_exception(error)
                if not isinstance(error, Exception):  # an interrupt, where the main thread hashes
                    raise

    def _go_on(self, file: Path):
        if self._stop.is_set() or (self._needed is not None and file not in self._needed):
            raise Cancelled

    def result(self) -> dict[str, str]:
        """sha256 by path, when all are found."""
        if self._known is None:
            if self._ray is not None:
                from .ray_engine import hashes_on  # opens checkpoints, which needs torch; this module starts without

                found = hashes_on(self._ray, self.files)
            else:
                self._work()
                found = [self._found[file].result() for file in self.files]
            self._known = dict(zip(map(str, self.files), found, strict=True))
        return self._known

    def check(self):
        """Raises ValueError for a file that is not as it was when its hash was found."""
        changed = [file for file in self.files if _stat(file) != self.stats[file]]
        if changed:
            raise ValueError(f"{changed[0]} was changed while it was being merged. Merge again")


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


__all__ = ["Cancelled", "InputHashes", "hashes", "likely_files", "sha256"]
