"""A model that has let go of what only some routes need.

Enters: a model whose tensors are there, and the routes that are wanted. Leaves: the same model without the other
experts' encoders, masks, scales and corrections, and without τ* where no route that is left is made from it.
Invariants: a route that is left has the bits it had; one that is not is refused by name, never answered by another.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE, ROUTE_NAMES, named_route

from .routed_weights_mmer import OWN_PARTS, RoutedWeight


class FewerRoutes:
    """Mixed into the model, in front of what saves it."""

    config: Any
    modules: Any
    parameters: Any
    _left: tuple[int, ...] | None = None  # routes; None where all are there

    def only_routes(self, routes: Iterable[str]):
        """Let go of all that other routes than these need; `base`, which all are made from, always stays.

        Without `merged`, and with experts of kind `exact`, that includes τ*, as large as the base. What was let go
        comes back when the model is loaded again; a model of fewer routes is not saved. Raises ValueError for an
        unknown route, for one that was let go before, and for tensors that are divided over ranks or offloaded.
        """
        names = self.config.expert_names
        left = tuple(sorted({BASE_ROUTE, *(named_route(name, names) for name in routes)}))
        self.check_left(left)
        if any(parameter.is_meta or hasattr(parameter, "placements") for parameter in self.parameters()):
            raise ValueError(
                "only_routes found tensors that are divided over ranks or offloaded, expected all in memory: load the "
                "model onto the CPU, let routes go, and move it then"
            )
        done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # a tied head and embedding stay tied
        for module in self.modules():
            if isinstance(module, RoutedWeight) and module.delta is not None:
                _cut(module, left, done)
        for module in [module for module in self.modules() if isinstance(module, FewerRoutes)]:
            module._left = left
            towers = getattr(module, "experts", {})
            for name in [name for name in towers if FIRST_EXPERT_ROUTE + names.index(name) not in left]:
                del towers[name]

    def check_left(self, routes: Iterable[int]):
        """Raises ValueError where one of `routes` was let go."""
        if self._left is None:
            return
        names = [*ROUTE_NAMES, *self.config.expert_names]
        for route in routes:
            if route not in self._left:
                raise ValueError(
                    f"route {names[route]!r} was let go by only_routes, which left {[names[r] for r in self._left]}: "
                    f"load the model again, and name {names[route]!r} too"
                )

    def save_pretrained(self, *args, **kwargs):
        if self._left is not None:
            names = [*ROUTE_NAMES, *self.config.expert_names]
            raise ValueError(
                f"save_pretrained: only_routes left {[names[r] for r in self._left]} of {names}, expected all routes: "
                "load the model again, or export a route by `mmer export`, or take experts out by `mmer remove`"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def _cut(module: Any, left: tuple[int, ...], done: dict[int, tuple[nn.Parameter, nn.Parameter]]):
    """Leave a routed weight the slices of the experts in `left`, and τ* where some route there is made from it."""
    experts = [route for route in left if route >= FIRST_EXPERT_ROUTE]
    places = [module.place(route) for route in experts]
    for name in OWN_PARTS:
        if (part := module._parameters.get(name)) is not None:
            if id(part) not in done:
                done[id(part)] = part, nn.Parameter(part.detach()[places].clone(), requires_grad=part.requires_grad)
            module._parameters[name] = done[id(part)][1]
    if MERGED_ROUTE not in left and (not experts or module.routed_kind == "exact"):
        module._parameters["delta"] = module.weight  # never read, but a routed weight has one
    module._places = {route: place for place, route in enumerate(experts)}
    module._kept, module._triton_parts = {}, None
