"""The table that `mmer evaluate` prints.

Enters: an `Evaluation`. Leaves: a table of rich. Invariant: nothing heavy is imported here.
"""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .results import Evaluation, Result


def evaluated(evaluation: "Evaluation") -> Table:
    table = Table("task", "route", "n", "score", "95 %", title=f"evaluation of {escape(evaluation.model['name'])}")
    compared = any(result.original for result in evaluation.results)
    if compared:
        for column in ("original", "its score", "retention", "95 %", "same words"):
            table.add_column(column)
    for result in evaluation.results:
        low, high = result.interval
        row = [
            f"{escape(result.task)} ({result.metric})", result.route, str(result.n),
            _score(result, result.value), f"{_score(result, low)} – {_score(result, high)}",
        ]  # fmt: skip
        table.add_row(*row, *(_beside(result) if compared else ()))
    return table


def _score(result: "Result", value: float) -> str:
    return f"{value:.1%}" if result.shares else f"{value:.3f}"


def _beside(result: "Result") -> list[str]:
    own = result.original
    if own is None:
        return ["–"] * 5
    spread = result.retention_interval
    return [
        escape(own.name),
        _score(result, own.value),
        "–" if result.retention is None else f"{result.retention:.1%}",
        "–" if spread is None else f"{spread[0]:.1%} – {spread[1]:.1%}",
        "–" if result.agreement is None else f"{result.agreement:.1%}",
    ]


__all__ = ["evaluated"]
