"""How a merge that was killed goes on: which step comes next, and what was gathered before it.

Enters: after each shard that was written, the step whose tensors are not all on disk yet, and the state from just
before it. Leaves: journal.json beside the shards, replaced at once and whole. Invariant: a journal is only followed
by the same merge: same recipe, same input files (names, sizes, times), same code; anything else starts afresh.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_NAME = "journal.json"


def fingerprint(settings: Any, files: Iterable[Path]) -> str:
    """What a merge depends on: its settings, its input files as the file system tells them apart, and our own code."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(json.dumps([settings, stats, code, torch.__version__]).encode()).hexdigest()


class Journal:
    """`step` is where to start, `shards` how many shards are written, `state` what to restore (None: nothing)."""

    def __init__(self, folder: Path, key: str):
        self.path, self.key = folder / _NAME, key
        self.step, self.shards, self.state = 0, 0, None
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["key"] == key:
                self.step, self.shards, self.state = found["step"], found["shards"], found["state"]

    def write(self, step: int, shards: int, state: Any):
        values = {"key": self.key, "step": step, "shards": shards, "state": state}
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text(json.dumps(values), encoding="utf-8")
        os.replace(fresh, self.path)

    def remove(self):
        self.path.unlink(missing_ok=True)
