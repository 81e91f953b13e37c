"""From a recipe to a merged repository: task vectors, TIES, masks, and everything on disk."""

from .adding import add
from .masks import correct, decouple, recover, rescale
from .merge import merge
from .recipe import Recipe
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
