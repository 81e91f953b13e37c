"""What was measured of a merged model: evaluation.json, for the card's table, its front matter and its plot.

Enters: evaluation.json, as `mmer evaluate` writes it into a merged folder. Leaves: `Result`, one for each task and
route; the fields of model-index. Invariant: every number of a card stands in the file; a folder without the file has
no results, and a file of another form is refused.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

FILE = "evaluation.json"


@dataclass(frozen=True)
class Result:
    """One row: `value` with its 95 % `interval` over `n` items, and beside it what the original expert reached."""

    task: str
    task_type: str
    dataset: str
    expert: str | None
    route: str
    metric: str
    value: float
    n: int
    interval: tuple[float, float]
    original: float | None
    original_interval: tuple[float, float] | None
    retention: float | None
    retention_interval: tuple[float, float] | None
    agreement: float | None
    scorer: str

    @property
    def label(self) -> str:
        own = self.route in (self.expert, "auto")
        return self.task if own else f"{self.task} ({self.route})"


def read_results(folder: Path) -> list[Result]:
    """The rows of evaluation.json; [] without one. Raises ValueError for a file of another form."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return [_result(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; expected what `mmer evaluate` writes. Evaluate again, or take "
            "the file away for a card without results"
        ) from error


def _result(row: dict[str, Any]) -> Result:
    original = row["original"] or {}
    made = Result(
        **{key: str(row[key]) for key in ("task", "task_type", "dataset", "route", "metric", "scorer")},
        expert=row["expert"],
        value=_number(row["value"]),
        n=int(row["n"]),
        interval=_interval(row["interval"]),
        original=_number(original["value"]) if original else None,
        original_interval=_interval(original["interval"]) if original else None,
        retention=None if row["retention"] is None else _number(row["retention"]),
        retention_interval=_interval(row["retention_interval"]) if row.get("retention_interval") else None,
        agreement=None if row["agreement"] is None else _number(row["agreement"]),
    )
    return made


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"found {value!r}, expected a number")
    return float(value)


def _interval(values: Any) -> tuple[float, float]:
    low, high = map(_number, values)
    if low > high:
        raise ValueError(f"found the interval {values}, expected its lower end first")
    return low, high


def shown(value: float, interval: tuple[float, float] | None = None, ratio: bool = False) -> str:
    """A share or ratio in percent, anything larger as it is, with its interval."""
    shares = ratio or ((interval or (value, value))[1] <= 1 and value <= 1)

    def one(number: float) -> str:
        return f"{number:.1%}" if shares else f"{number:.4g}"

    return one(value) + (f" ({one(interval[0])} – {one(interval[1])})" if interval else "")


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def table(results: list[Result]) -> list[dict[str, str]]:
    """The rows of the card's table."""
    return [
        {
            "task": result.task,
            "dataset": result.dataset,
            "route": result.route,
            "metric": result.metric,
            "n": str(result.n),
            "value": shown(result.value, result.interval),
            "original": "–" if result.original is None else shown(result.original, result.original_interval),
            "retention": "–" if result.retention is None else shown(result.retention, result.retention_interval, True),
            "agreement": share(result.agreement),
        }
        for result in results
    ]


def eval_results(results: list[Result]) -> list[EvalResult]:
    """For `ModelCardData(eval_results=…)`: the values, and the retention where there is one."""
    made = []
    for result in results:
        where: dict[str, Any] = {
            "task_type": result.task_type,
            "task_name": result.task,
            "dataset_name": result.dataset,
            "dataset_type": re.sub(r"[^\w./-]+", "-", result.dataset).strip("-").lower() or "unnamed",
        }
        # the Hub joins tasks of one kind on one dataset under the first one's name: the metric says which is which
        metric, words = f"{result.task}: {result.metric}", f"route {result.route}, n = {result.n}"
        name = f"{metric} ({words}, 95 % interval {result.interval[0]:.4g} – {result.interval[1]:.4g})"
        made.append(
            EvalResult(**where, metric_type=result.metric, metric_value=round(result.value, 6), metric_name=name)
        )
        if result.retention is not None:
            name = f"{metric} over the original expert's ({words})"
            value = round(result.retention, 6)
            made.append(EvalResult(**where, metric_type="retention", metric_value=value, metric_name=name))
    return made
