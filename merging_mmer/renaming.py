"""Checkpoints of other code: their tensors under the names that a class has today.

Enters: one or several checkpoints, each with rules for its names. Leaves: `RenamedCheckpoint`, which is read like any
other. Invariants: a name that no rule knows stays as it is, so that it is listed as unknown and not skipped; what a
rule leaves out is in `left_out` with the reason; two tensors never take one name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from .checkpoints import Checkpoint


@dataclass(frozen=True)
class Rule:
    """A saved name that matches `pattern` as a whole takes the `names` (as in re.sub); without names it is left out
    for the `reason`. flatten: a first dimension of one is dropped."""

    pattern: str
    names: tuple[str, ...] = ()
    reason: str = ""
    flatten: bool = False


def rename(pattern: str, *names: str, flatten: bool = False) -> Rule:
    return Rule(pattern, names, flatten=flatten)


def leave_out(pattern: str, reason: str) -> Rule:
    return Rule(pattern, reason=reason)


@dataclass(frozen=True)
class Part:
    """A checkpoint and the rules for its names; the first that matches holds."""

    checkpoint: Checkpoint
    rules: tuple[Rule, ...]

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern, Rule]]:
        return [(re.compile(rule.pattern), rule) for rule in self.rules]

    def places(self, key: str) -> tuple[list[str], Rule | None]:
        """The new names of a saved one, and the rule that gave them."""
        for pattern, rule in self._compiled:
            if found := pattern.fullmatch(key):
                return [found.expand(name) for name in rule.names], rule
        return [key], None


class RenamedCheckpoint(Checkpoint):
    """Several checkpoints as one. `files` are those of all, `left_out` maps saved names to reasons."""

    def __init__(self, folder: Path, parts: Sequence[Part]):
        self.folder, self.beside = folder, {}
        self.files = list(dict.fromkeys(file for part in parts for file in part.checkpoint.files))
        self.left_out: dict[str, str] = {}
        self._sources: dict[str, tuple[Checkpoint, str, bool]] = {}
        for part in parts:
            for key in part.checkpoint.keys():
                names, rule = part.places(key)
                if not names and rule is not None:
                    self.left_out[key] = rule.reason
                for name in names:
                    if name in self._sources:
                        raise ValueError(
                            f"{folder}: {self._sources[name][1]!r} and {key!r} are both {name!r}; expected one of them"
                        )
                    self._sources[name] = part.checkpoint, key, rule is not None and rule.flatten

    def keys(self) -> list[str]:
        return list(self._sources)

    def place(self, key: str) -> Path:
        checkpoint, saved, _ = self._sources[key]
        return checkpoint.place(saved)

    def saved_name(self, key: str) -> str:
        """What the tensor is called in its file."""
        return self._sources[key][1]

    def shape(self, key: str) -> tuple[int, ...]:
        checkpoint, saved, flatten = self._sources[key]
        shape = checkpoint.shape(saved)
        return shape[1:] if flatten and shape[:1] == (1,) else shape

    def dtype(self, key: str) -> torch.dtype:
        checkpoint, saved, _ = self._sources[key]
        return checkpoint.dtype(saved)

    def tensor(self, key: str) -> torch.Tensor:
        checkpoint, saved, _ = self._sources[key]
        return checkpoint.tensor(saved).reshape(self.shape(key))


__all__ = ["Part", "RenamedCheckpoint", "Rule", "leave_out", "rename"]
