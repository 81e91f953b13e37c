"""Which tokens take which route, worked out once a forward, before any layer runs.

Enters: token ids and routes as users and processors give them. Leaves: a `RoutePlan` that all layers of the forward
share, reaching them through `route_scope`. Invariants: a plan's groups are known on the host, so that no layer waits
for the device; each token is in exactly one group; routes depend on what was passed, never on the state of a cache.
"""

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from configuration_mmer.routes_mmer import AUTO, BASE_ROUTE, named_route, route_tokens

TextRoute = str | list[str] | torch.Tensor


class RoutePlan:
    """The groups of tokens of one route each.

    `route_ids` is int64 (batch, sequence), `text_route` int64 (batch,), the routes of what comes next, where known.
    `single` is the route when all tokens share one, else None. Otherwise `routes` and `sizes` are the groups, and
    `order` is None where the flattened batch consists of the groups one behind the other; else it is the index that
    sorts its tokens by route, and `back` its inverse. `last` is the plan of the last position, which is what
    `generate` asks the head for; None where that is this plan itself. `held`: the weights of `single` that are held
    were looked at, as `generate` does once for all its steps, and are not looked at again.
    """

    held = False

    def __init__(self, route_ids: torch.Tensor, text_route: torch.Tensor | None = None):
        self.route_ids, self.text_route = route_ids, text_route
        host = route_ids.detach().to("cpu")  # the only wait for the device
        flat = host.flatten()
        runs, lengths = torch.unique_consecutive(flat, return_counts=True)
        self.order: dict[torch.device, torch.Tensor] | None = None
        self.back: dict[torch.device, torch.Tensor] = {}
        if len(runs) > len(runs.unique()):
            order = torch.argsort(flat, stable=True)
            runs, lengths = torch.unique_consecutive(flat[order], return_counts=True)
            self.order = {order.device: order}
            self.back = {order.device: torch.argsort(order)}
        self.routes: list[int] = runs.tolist()
        self.sizes: list[int] = lengths.tolist()
        self.single = BASE_ROUTE if not self.routes else self.routes[0] if len(self.routes) == 1 else None
        mixed = self.single is None and route_ids.shape[1] > 1
        self.last: RoutePlan | None = RoutePlan(host[:, -1:]) if mixed else None
        self.to(route_ids.device)

    @classmethod
    def one(cls, route: int, shape: torch.Size, device: torch.device) -> "RoutePlan":
        """All tokens of a batch (batch, sequence) on one route. Nothing is asked of the device."""
        plan = cls.__new__(cls)
        plan.route_ids = torch.full(shape, route, device=device)
        plan.text_route = plan.route_ids[:, 0] if shape[1] else torch.full(shape[:1], route, device=device)
        plan.single, plan.routes, plan.sizes, plan.last = route, [route], [shape[0] * shape[1]], None
        plan.order, plan.back = None, {}
        return plan

    def to(self, device: torch.device) -> "RoutePlan":
        """This plan for tokens on another device; the host does not wait for it."""
        self.route_ids = self.route_ids.to(device, non_blocking=True)
        if self.text_route is not None:
            self.text_route = self.text_route.to(device, non_blocking=True)
        if self.last is not None:
            self.last.to(device)
        self._prepare(device)
        return self

    def _prepare(self, device: torch.device):
        if self.order is not None and device not in self.order:
            self.back[device] = next(iter(self.back.values())).to(device, non_blocking=True)
            self.order[device] = next(iter(self.order.values())).to(device, non_blocking=True)

    def routed(self, x: torch.Tensor, compute: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`compute(route, tokens)` on each group of the tokens of `x` (batch, sequence, …), put back in order."""
        if self.single is not None:
            return compute(self.single, x)
        tokens = x.flatten(0, 1)
        if tokens.shape[0] != self.route_ids.numel():
            raise ValueError(
                f"{tokens.shape[0]} tokens reached a routed module, but the routes are for {self.route_ids.numel()}: "
                f"route_ids has shape {tuple(self.route_ids.shape)}, the input {tuple(x.shape)}"
            )
        if self.order is not None:
            self._prepare(x.device)
            tokens = tokens[self.order[x.device]]
        parts = [compute(route, part) for route, part in zip(self.routes, tokens.split(self.sizes), strict=True)]
        together = torch.cat(parts)
        if self.order is not None:
            together = together[self.back[x.device]]
        return together.unflatten(0, x.shape[:2])

    def keep(self, positions: slice | torch.Tensor) -> "RoutePlan":
        """The plan of some positions of the sequence, as `logits_to_keep` names them."""
        if self.single is None and isinstance(positions, slice) and positions == slice(-1, None):
            return self if self.last is None else self.last
        kept = self.route_ids[:, positions]
        if self.single is None:
            return RoutePlan(kept)
        plan = RoutePlan.one(self.single, kept.shape, kept.device)
        plan.held = self.held
        return plan


class _Current:
    """The plan that is followed: per thread and task, or, in what torch.compile traces, one for the process, since no
    context variable can be traced. Scopes are nested: a layer's inside the model's.
    """

    def __init__(self):
        self.variable: ContextVar[RoutePlan | None] = ContextVar("mmer_route_plan", default=None)
        self.traced: RoutePlan | None = None
        self.tracing = False


_CURRENT = _Current()


def current_plan() -> RoutePlan | None:
    return _CURRENT.traced if _CURRENT.tracing else _CURRENT.variable.get()


@contextlib.contextmanager
def route_scope(plan: RoutePlan | None):
    """Routed modules called inside follow `plan`. Undone on the way out."""
    if torch.compiler.is_compiling():
        before = _CURRENT.traced, _CURRENT.tracing
        _CURRENT.traced, _CURRENT.tracing = plan, True
        try:
            yield
        finally:
            _CURRENT.traced, _CURRENT.tracing = before
    else:
        token = _CURRENT.variable.set(plan)
        try:
            yield
        finally:
            _CURRENT.variable.reset(token)


class RoutePlanning:
    """Mixed into the model: from what a caller passes to a `RoutePlan`."""

    config: Any
    check_left: Any

    def routes(self, input_ids: torch.Tensor, text_route: TextRoute | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(`route_ids`, `text_route`) from the placeholders, as the processor makes them."""
        config = self.config
        wanted = config.text_route if text_route is None else text_route
        return route_tokens(input_ids, config.placeholder_experts(), config.expert_names, wanted)

    def plan_routes(
        self,
        input_ids: torch.Tensor | None = None,
        route_ids: torch.Tensor | None = None,
        text_route: TextRoute | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        **others: Any,
    ) -> RoutePlan:
        """The `route_plan` of a forward with these arguments; what else is passed does not matter for it.

        A forward compiled with fullgraph needs it for prompts with media, whose features are then passed as
        `media_embeds` (`embed_media`). It also serves several forwards of one batch. Raises ValueError for an unknown
        route, and for another number of samples.
        """
        plan = self._planned(input_ids, route_ids, text_route, inputs_embeds, cache)
        self.check_left(plan.routes)
        return plan

    def _planned(self, input_ids, route_ids, text_route, inputs_embeds, cache) -> RoutePlan:
        if route_ids is not None and isinstance(text_route, torch.Tensor):
            return RoutePlan(route_ids, text_route)
        if text_route is None and route_ids is None:
            # a decoding loop of the user's own passes neither: what the prompt was given travels with its cache
            text_route = getattr(cache, "mmer_text_route", None)
        # a route named in words overrules the ids that the processor passed along
        overruled = input_ids is not None and isinstance(text_route, (str, list))
        if input_ids is None:
            # embeddings that come without ids are text, as far as can be known
            if inputs_embeds is None:
                raise ValueError("pass input_ids or inputs_embeds: exactly one of the two")
            input_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        derived, text_route = self.routes(input_ids, text_route)
        return RoutePlan(derived if route_ids is None or overruled else route_ids, text_route)

    @torch.compiler.disable
    def _plan_outside(self, *args: Any) -> RoutePlan:
        """`plan_routes`, outside of a compiled graph: a break in it, or with fullgraph torch's error."""
        return self.plan_routes(*args)

    def _plan(self, input_ids, route_ids, text_route, inputs_embeds, cache, media_embeds) -> RoutePlan:
        if not torch.compiler.is_compiling():
            return self.plan_routes(input_ids, route_ids, text_route, inputs_embeds, cache)
        known = route_ids is None and media_embeds is None and getattr(cache, "mmer_text_route", None) is None
        if known and (text_route is None or isinstance(text_route, str)):
            # text alone: one route, which no value has to be looked at for
            name = self.config.text_route if text_route is None else text_route
            route = BASE_ROUTE if name == AUTO else named_route(name, self.config.expert_names)
            self.check_left([route])
            given = inputs_embeds if input_ids is None else input_ids
            return RoutePlan.one(route, given.shape[:2], given.device)
        return self._plan_outside(input_ids, route_ids, text_route, inputs_embeds, cache)
