"""From a recipe to a merged repository: task vectors, TIES, masks, and everything on disk."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# at once, since a module has its name; it imports nothing heavy before it is called
from .merge import merge
from .recipe import Recipe

if TYPE_CHECKING:
    from .adding import add
    from .masks import correct, decouple, recover, rescale
    from .removing import remove
    from .report import MergeReport
    from .task_vectors import task_vector
    from .ties import disjoint_mean, elect, emr, merge_vectors, task_arithmetic, trim

__all__ = [
    "MergeReport",
    "Recipe",
    "add",
    "correct",
    "decouple",
    "disjoint_mean",
    "elect",
    "emr",
    "merge",
    "merge_vectors",
    "recover",
    "remove",
    "rescale",
    "task_arithmetic",
    "task_vector",
    "trim",
]

# the others are imported when they are asked for: torch and transformers alone take seconds
_HOMES = {
    "adding": ("add",),
    "masks": ("correct", "decouple", "recover", "rescale"),
    "removing": ("remove",),
    "report": ("MergeReport",),
    "task_vectors": ("task_vector",),
    "ties": ("disjoint_mean", "elect", "emr", "merge_vectors", "task_arithmetic", "trim"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
