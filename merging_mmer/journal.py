"""How a merge that was killed goes on: which parts of the folder are done, and what was measured of them.

Enters: after each part whose bytes are all written, its name and its numbers. Leaves: journal.jsonl beside the
unfinished folder, one line a part. Invariant: a journal is only followed by the same merge: same recipe, same input
files (by sha256), same code; anything else starts afresh. A line that was cut off by the kill does not count.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy
import torch

NAME = "journal.jsonl"


def fingerprint(settings: Any, inputs: Mapping[str, str]) -> str:
    """What a merge depends on: its settings, its input files (path -> sha256), our own code, the libraries."""
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    depends = [settings, sorted(inputs.items()), code, torch.__version__, numpy.__version__]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


class Journal:
    """`done`: part -> its numbers. `begin` starts a new journal, `add` writes a line; threads may share it."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.done: dict[str, Any] = {}
        self.same = False
        self._lock = Lock()
        self._file: IO[bytes] | None = None
        if not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off
        if lines and _line(lines[0]) == {"key": key}:
            self.same = True
            for line in lines[1:]:
                entry = _line(line)
                if entry is None:
                    break
                self.done[entry["part"]] = entry["numbers"]

    def begin(self):
        """Open for writing: behind what is there of the same merge, else anew."""
        if self.same:
            lines = [{"key": self.key}, *({"part": part, "numbers": of} for part, of in self.done.items())]
        else:
            self.done, lines = {}, [{"key": self.key}]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def add(self, part: str, numbers: Any):
        line = json.dumps({"part": part, "numbers": numbers}).encode() + b"\n"
        with self._lock:
            assert self._file is not None
            self._file.write(line)
            self.done[part] = numbers

    def close(self):
        if self._file is not None:
            self._file.close()


def _line(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
