"""What an evaluation found: numbers with their intervals, and the file that a model card is made from.

Enters: scores, one number an item, of the merged model and, where there is one, of the original on the same items.
Leaves: `Result`s, and evaluation.json:

    {"format": 1, "mmer": version,
     "model": {"name", "report_sha256"},          the merged folder; the hash of its merge_report.json says which merge
     "settings": {"dtype", "device", "batch_size", "limit", "torch", "transformers"},
     "tasks": [{"task": its name, "task_type": the Hub's word for it, "dataset": its name,
       "source": {"dataset": what a task calls it for the Hub, "config", "split", "revision"},
       "expert": whose task it is, null where it is nobody's alone, "experts": [all that encoded media], "route",
       "metric": the Hub's word, "metric_name", "scorer", "value", "n", "interval": [low, high],
       "interval_kind": "wilson" | "bootstrap", "template", "max_new_tokens",
       "original": null | {"name": the expert's, or "base", "source", "value", "interval"},
       "retention", "retention_interval", "agreement": null without an original}]}

Invariants: no path of the machine is in the file; retention and agreement are of the same items.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import of_mean, of_ratio, wilson
from .scorers import Metric

FORMAT, NAME = 1, "evaluation.json"


def interval(scores: Sequence[float], shares: bool) -> tuple[float, float]:
    """95 %: Wilson's where scores are 0 or 1, else by drawing items."""
    return wilson(round(sum(scores)), len(scores)) if shares else of_mean(scores)


def retention(merged: Sequence[float], original: Sequence[float]) -> float | None:
    """The merged model's mean over the original's, None where that is not above 0: it then has no meaning."""
    below = float(np.mean(original))
    return float(np.mean(merged)) / below if below > 0 else None


@dataclass(frozen=True)
class Original:
    """What was compared with. name: the expert's, or "base"; source: a Hub id, or a folder's name."""

    name: str
    source: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Result:
    """One task on one route, a row of the file. agreement: the share of items that both answer in the same words."""

    task: str
    task_type: str
    dataset: str
    source: dict[str, str | None]
    expert: str | None
    experts: list[str]
    route: str
    metric: str
    metric_name: str
    scorer: str
    value: float
    n: int
    interval: tuple[float, float]
    interval_kind: str
    template: str | None
    max_new_tokens: int
    original: Original | None = None
    retention: float | None = None
    retention_interval: tuple[float, float] | None = None
    agreement: float | None = None

    @property
    def shares(self) -> bool:
        return self.interval_kind == "wilson"


def measured(scores: Sequence[float], metric: Metric) -> dict[str, Any]:
    """The fields of a Result that say what was measured."""
    return {
        "metric": metric.type,
        "metric_name": metric.name,
        "value": float(np.mean(scores)),
        "n": len(scores),
        "interval": interval(scores, metric.shares),
        "interval_kind": "wilson" if metric.shares else "bootstrap",
    }


def compared(
    original: tuple[str, str],
    scores: tuple[Sequence[float], Sequence[float]],
    answers: tuple[Sequence[str], Sequence[str]],
    metric: Metric,
) -> dict[str, Any]:
    """The fields that say what is left. original: name and source; scores, answers: (merged model's, original's)."""
    ours, theirs = scores
    same = [one == other for one, other in zip(*answers, strict=True)]
    return {
        "original": Original(*original, float(np.mean(theirs)), interval(theirs, metric.shares)),
        "retention": retention(ours, theirs),
        "retention_interval": of_ratio(ours, theirs),
        "agreement": sum(same) / len(same),
    }


@dataclass
class Evaluation:
    """All of a run. `model` and `settings` are as in the file."""

    model: dict[str, str]
    settings: dict[str, Any]
    mmer: str
    results: list[Result] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        values = asdict(self)
        values["tasks"] = values.pop("results")
        return {"format": FORMAT, **values}

    def write(self, path: Path) -> Path:
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path


__all__ = ["FORMAT", "NAME", "Evaluation", "Original", "Result", "compared", "interval", "measured", "retention"]
