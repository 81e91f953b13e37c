"""How the parts of routed linears are divided among the ranks of a tensor parallel run.

Enters: a model and the plan that its LLM's class has, {name with * for numbers: style}. Leaves: the plan with a rule
for each part that the style of its linear would divide along the wrong axis: a linear divided over its outputs keeps
correction_a whole and divides scales and biases over the outputs; one divided over its inputs keeps scales and
correction_b whole. Invariant: on each rank the formula of `RoutedWeight` gives that rank's piece of a route's weight.
"""

import re
from typing import Any

from torch import nn

from .routed_weights_mmer import RoutedWeight

_WHOLE, _OVER_LAST = "replicate", "rowwise"


class RoutedParallelism:
    """Mixed into the model, before PreTrainedModel."""

    _tp_plan: Any

    def init_parallel_plans(self):
        super().init_parallel_plans()  # type: ignore[misc]
        self._tp_plan = routed_tp_plan(self, self._tp_plan)

    def _resolve_parallel_plans(self, distributed_config: Any):
        plans = super()._resolve_parallel_plans(distributed_config)  # type: ignore[misc]
        check_tp_plan(self, plans[0], distributed_config.tp_size or 1)
        return plans


def routed_tp_plan(model: Any, plan: dict[str, str]) -> dict[str, str]:
    rules = dict(plan)
    for name, module in model.named_modules():
        if not isinstance(module, RoutedWeight):
            continue
        generic = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        if not isinstance(module, nn.Linear):
            # rows are taken by id, of every part: the table stays whole
            rules.pop(generic, None)
            continue
        style = plan.get(generic, "")
        for part, value in module._parameters.items():
            if value is not None and (rule := _rule(style, part, value)) is not None:
                rules[f"{generic}.{part}"] = rule
    return rules


def _rule(style: str, part: str, value: Any) -> str | None:
    if style.startswith("colwise"):
        if part == "correction_a":
            return _WHOLE
        if part in ("scales", "expert_bias"):
            return _OVER_LAST if value.shape[-1] > 1 else _WHOLE
    if style.startswith("rowwise") and part in ("scales", "correction_b", "expert_bias", "merged_bias"):
        return _WHOLE
    return None


def check_tp_plan(model: Any, plan: dict[str, str], ranks: int):
    """Raises ValueError where a linear of `plan` (full names) can not be divided over its inputs among `ranks`."""
    for name, style in plan.items():
        if not style.startswith("rowwise"):
            continue
        module = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if not isinstance(module, RoutedWeight):
            continue
        columns = module.weight.shape[1]
        if module.masks is not None and columns % (8 * ranks):
            raise ValueError(
                f"{name} has {columns} inputs: {ranks} ranks would divide its masks within a byte; expected a "
                f"multiple of {8 * ranks}, so take fewer ranks"
            )
        if "expert_bias" in module._parameters:
            raise ValueError(
                f"{name} is divided over its inputs and has a bias for each expert, which each rank would add: "
                "load it without tensor parallelism"
            )
