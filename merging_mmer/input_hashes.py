"""The sha256 of every file that a merge reads, found while the merge makes ready.

Enters: the files of base and experts. Leaves: path -> sha256, by threads that start at once. Invariant: what was
hashed is what was read, or `check` says which file was changed in between.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from .ray_engine import hashes_on
from .report import sha256


class Cancelled(Exception):
    """Nobody waits for the hashes any more."""


class InputHashes:
    """`stats`: file -> (size, mtime in ns) before it was read. ray: the cluster that hashes, instead of threads."""

    def __init__(self, files: Iterable[Path], threads: int, ray: Any = None):
        self.files = list(dict.fromkeys(files))
        self.stats = {file: _stat(file) for file in self.files}
        self._stop, self._ray = Event(), ray
        self._pool = ThreadPoolExecutor(threads)
        self._running: dict[Path, Future[str]] = {}
        self._known: dict[str, str] | None = None
        if ray is None:
            largest = sorted(self.files, key=lambda file: -self.stats[file][0])
            self._running = {file: self._pool.submit(sha256, file, self._go_on) for file in largest}

    def __enter__(self) -> "InputHashes":
        return self

    def __exit__(self, *_: object):
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _go_on(self):
        if self._stop.is_set():
            raise Cancelled

    def result(self) -> dict[str, str]:
        """sha256 by path, when all are found."""
        if self._known is None:
            if self._ray is not None:
                found = hashes_on(self._ray, self.files)
            else:
                found = [self._running[file].result() for file in self.files]
            self._known = dict(zip(map(str, self.files), found, strict=True))
        return self._known

    def check(self):
        """Raises ValueError for a file that is not as it was when its hash was found."""
        changed = [file for file, stat in self.stats.items() if _stat(file) != stat]
        if changed:
            raise ValueError(f"{changed[0]} was changed while it was being merged. Merge again")


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
