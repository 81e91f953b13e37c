"""What is left of each original expert in a merged model.

Enters: items with known answers, an original expert, a merged folder. Leaves: accuracies with their Wilson intervals,
retention (merged ÷ original) and agreement (share of items answered with the same words as the original). Invariant:
every model of a comparison sees the same items in the same batches, and decodes greedily.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .intervals import wilson
from .lab.datasets import LabItem, score
from .lab.experts import new_tokens


@dataclass(frozen=True)
class Score:
    """The answers of one model to one list of items."""

    answers: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.right), len(self.right))

    def retention(self, original: "Score") -> float:
        """This accuracy over the original's. Raises ValueError when the original got nothing right."""
        if not any(original.right):
            raise ValueError("the original expert answers nothing right: retention has no meaning")
        return self.accuracy / original.accuracy

    def against(self, original: "Score") -> dict[str, Any]:
        """What tables show of it: n, accuracy, interval, retention and agreement."""
        return {
            "n": len(self.right),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "retention": self.retention(original),
            "agreement": self.agreement(original),
        }

    def agreement(self, original: "Score") -> float:
        """The share of items that both answer with the same words."""
        same = [a == b for a, b in zip(self.answers, original.answers, strict=True)]
        return sum(same) / len(same)


def evaluate(
    model: Any,
    decode: Callable[[torch.Tensor], list[str]],
    batches: Sequence[dict[str, torch.Tensor]],
    items: Sequence[LabItem],
    route: int | None = None,
    label: str = "",
) -> Score:
    """Greedy answers to `items`, whose model inputs are `batches` in the same order.

    `route` sends every token, media and text, through one route of a merged model; None leaves the inputs' own routes.
    """
    answers: list[str] = []
    for batch in tqdm(batches, desc=label, leave=False):
        inputs = dict(batch)
        if route is not None:
            ids = inputs["input_ids"]
            inputs["route_ids"] = torch.full_like(ids, route)
            inputs["text_route"] = torch.full((ids.shape[0],), route)
        answers += decode(new_tokens(model, inputs))
    right = tuple(score(answer, item.answer) for answer, item in zip(answers, items, strict=True))
    return Score(tuple(answers), right)


def batched(items: Sequence[LabItem], size: int) -> list[Sequence[LabItem]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
