"""What `mmer inspect` reports of a source: groups of tensors, a vocabulary, and all of it together.

Enters: what a look into a source saw. Leaves: `Inspection`, plain numbers and words, as the command line prints it and
as JSON holds it. Invariant: a value of a tensor is never in it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .comparison import Fit

LLM, VOCABULARY, UNKNOWN = "language model", "vocabulary", "unknown"
MERGED_PARTS = {
    "delta": "merged vector",
    "masks": "masks",
    "scales": "scales",
    "correction_a": "corrections",
    "correction_b": "corrections",
}
ORDER = (
    LLM,
    VOCABULARY,
    "base",
    *dict.fromkeys(MERGED_PARTS.values()),
    "norms and biases of experts",
    "added tokens",
)


@dataclass
class Group:
    """Tensors that belong together: "language model", "vocabulary", "tower: vision_tower", "unknown", …"""

    name: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)

    def add(self, shape: tuple[int, ...], dtype: torch.dtype):
        numbers, kind = torch.Size(shape).numel(), str(dtype).removeprefix("torch.")
        self.tensors += 1
        self.parameters += numbers
        self.bytes += numbers * dtype.itemsize
        self.dtypes[kind] = self.dtypes.get(kind, 0) + 1


@dataclass
class Words:
    """A vocabulary. rows: of the embedding; padding: rows behind the last token; placeholders: modality -> token, id;
    added: tokens that stand behind the ordinary ones."""

    rows: int
    tokens: int
    padding: int
    added: list[str] = field(default_factory=list)
    placeholders: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Inspection:
    """What a source is. kind: "language model", "multimodal checkpoint", "adapter", "merged" or "unknown"; `problems`
    are reasons why it cannot be used, whatever the base; `fit` is None without a base."""

    source: str
    kind: str
    architecture: str = ""
    model_type: str = ""
    groups: list[Group] = field(default_factory=list)
    words: Words | None = None
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fit: Fit | None = None

    @property
    def ok(self) -> bool:
        """It can be read whole, and fits the base where one was given."""
        return not self.problems and (self.fit is None or self.fit.fits)

    def group(self, name: str) -> Group:
        """The group of this name, made when it is new."""
        for group in self.groups:
            if group.name == name:
                return group
        self.groups.append(Group(name))
        return self.groups[-1]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}
