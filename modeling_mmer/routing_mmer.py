"""Routed modules: each token once, with the parameters of its route.

Enters: a stock transformers LLM and the names of its tensors that experts changed. Leaves: the same LLM, its modules
turned in place into routed ones, which multiply each group of tokens of a `RoutePlan` once with that route's weight.
Invariant: without a plan, or with the base route alone, a routed module runs its own class's forward on its own
weight: that is the base LLM bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE

from .route_plan_mmer import RoutePlan, current_plan, route_scope
from .routed_weights_mmer import RoutedWeight, state_of

# up to so many, reading a weight is what a product takes: on a GPU it is made inside of the product then
FEW_TOKENS = 64


class RoutedLinear(RoutedWeight, nn.Linear):
    """nn.Linear with a weight (and a bias, where experts changed it) for each route."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = current_plan()
        if plan is None or plan.single == BASE_ROUTE:
            return nn.functional.linear(x, self.weight, self.bias)
        route = plan.single if plan.held else None
        if route is not None and (kept := self._kept.get(route)) is not None and not torch.is_grad_enabled():
            return nn.functional.linear(x, kept.weight, self.route_bias(route))
        return plan.routed(x, self._product)

    def _product(self, route: int, x: torch.Tensor) -> torch.Tensor:
        parts = None if route == BASE_ROUTE or route in self._kept else self.triton_parts(x)
        # last, and not where anything is traced: a length that is compared is no free one any more
        if parts is not None and x.shape[:-1].numel() <= FEW_TOKENS:
            from .routed_triton_mmer import routed_linear

            return routed_linear(x, parts, self.stored_route(route), self.route_bias(route))
        return nn.functional.linear(x, self.route_weight(route), self.route_bias(route))

    def route_bias(self, route: int) -> torch.Tensor | None:
        return route_tensor(self, "bias", route)


def route_tensor(module: Any, name: str, route: int) -> torch.Tensor | None:
    """A small tensor (norm weight, bias) as `route` has it: each expert's own, exactly."""
    own = module._parameters.get(f"expert_{name}")
    if own is None or route == BASE_ROUTE:
        return getattr(module, name)
    return getattr(module, f"merged_{name}") if route == MERGED_ROUTE else own[route - FIRST_EXPERT_ROUTE]


def _twin(module: nn.Module, **tensors: torch.Tensor | None) -> Any:
    """`module` with some parameters replaced, without touching it: other threads may be using it."""
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **tensors}}
    return twin


def _route_twin(module: Any, route: int) -> Any:
    """`module` with the small tensors of a route. Without gradients it is made once: what it holds are views."""
    own = module._parameters
    making = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if not making and (known := module._twins.get((route, module.training))) is not None:
        twin, sources = known
        if all(own[name] is part and part.data_ptr() == address for name, part, address in sources):
            return twin
    twin = _twin(module, **{name: route_tensor(module, name, route) for name in module.routed_tensors})
    if not making:
        tensors = [name for name in own if name.startswith(("expert_", "merged_"))]
        sources = tuple((name, own[name], own[name].data_ptr()) for name in tensors)
        module._twins[route, module.training] = twin, sources
    return twin


def _tokens_first(x: torch.Tensor) -> bool:
    """Whether a 4-D activation is (batch, sequence, heads, …), not (batch, heads, sequence, …).

    Both are views of one (batch, sequence, heads, …) buffer, so the sequence is the axis with the larger stride.
    """
    return x.ndim != 4 or x.stride(1) >= x.stride(2)


def _routed_tensors_forward(base: Any) -> Callable:
    def forward(self, x: torch.Tensor, *args, **kwargs):
        plan = current_plan()
        if plan is None or plan.single == BASE_ROUTE:
            return base.forward(self, x, *args, **kwargs)

        def compute(route, tokens):
            return base.forward(_route_twin(self, route), tokens, *args, **kwargs)

        if plan.single is not None or _tokens_first(x):
            return plan.routed(x, compute)
        return plan.routed(x.transpose(1, 2), compute).transpose(1, 2)

    return forward


def _routed_embedding_forward(base: Any) -> Callable:
    def forward(self, input_ids: torch.Tensor):
        plan = current_plan()
        if plan is None or plan.single == BASE_ROUTE:
            return base.forward(self, input_ids)
        return plan.routed(
            input_ids, lambda route, ids: embed_rows(self, self.route_weight(route, ids.flatten()), ids.shape)
        )

    return forward


def embed_rows(embedding: nn.Module, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`rows` (n, hidden) as the embedding's stock class would give them (gemma scales its own): (*shape, hidden)."""
    twin = _twin(embedding, weight=rows)
    twin.padding_idx = None
    positions = torch.arange(rows.shape[0], device=rows.device)
    stock: Any = getattr(type(embedding), "stock_class", type(embedding))
    return stock.forward(twin, positions).unflatten(0, shape)


def _routed_layer_forward(base: Any) -> Callable:
    def forward(self, *args, mmer_plan: RoutePlan | None = None, **kwargs):
        # set here and not around the whole LLM alone: gradient checkpointing runs this forward again, by itself
        if mmer_plan is current_plan() and not torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        with route_scope(mmer_plan):
            return base.forward(self, *args, **kwargs)

    return forward


_MAKERS = {"layer": _routed_layer_forward, "tensors": _routed_tensors_forward, "embedding": _routed_embedding_forward}
_ROUTED_CLASSES: dict[tuple[str, type], type] = {}


def _routed_class(role: str, base: type) -> Any:
    """A subclass of a stock module class, under the same name: transformers finds classes by name
    (`_no_split_modules`).
    """
    if (role, base) not in _ROUTED_CLASSES:
        parents = (RoutedWeight, base) if role == "embedding" else (base,)
        body = {
            "forward": _MAKERS[role](base),
            "__module__": base.__module__,
            "stock_class": base,
            # the class is made at run time, so pickle and deepcopy rebuild it from its parent
            "__reduce_ex__": lambda self, protocol: (_rebuild, (role, base), state_of(self)),
        }
        _ROUTED_CLASSES[role, base] = type(base.__name__, parents, body)
    return _ROUTED_CLASSES[role, base]


def _rebuild(role: str, base: type) -> nn.Module:
    cls = _routed_class(role, base)
    return cls.__new__(cls)


def route_weight_of(module: Any, experts: int, decoupling: dict) -> Any:
    """Turn a linear or an embedding, in place, into one whose weight depends on the route."""
    if isinstance(module, RoutedWeight):
        return module
    if type(module) is nn.Linear:
        module.__class__ = RoutedLinear
    elif isinstance(module, nn.Embedding):
        module.__class__ = _routed_class("embedding", type(module))
    else:
        raise ValueError(f"{type(module).__name__} can not carry a merged vector: only nn.Linear and nn.Embedding can")
    module.add_routes_(experts, decoupling["kind"], decoupling["scale"], decoupling["rank"])
    return module


def _route_tensor_of(module: Any, name: str, experts: int):
    """Give `module` each expert's own copy of one of its small tensors."""
    stock = getattr(module, name)
    own = {"expert": stock.detach().new_zeros((experts, *stock.shape)), "merged": torch.zeros_like(stock)}
    for whose, tensor in own.items():
        module.register_parameter(f"{whose}_{name}", nn.Parameter(tensor, requires_grad=False))
    if isinstance(module, nn.Linear):
        if not isinstance(module, RoutedLinear):
            module.__class__ = RoutedLinear
            vars(module).update(delta=None, _kept={})
        return
    if not hasattr(module, "routed_tensors"):
        module.__class__ = _routed_class("tensors", type(module))
        vars(module).update(routed_tensors=[], _twins={})
    module.routed_tensors.append(name)


def install_routing(llm: Any, delta_modules: list[str], expert_tensors: list[str], experts: int, decoupling: dict):
    """Turn the named modules of a stock LLM into routed ones, in place. Raises ValueError for a name that is not
    there.
    """
    modules = dict(llm.named_modules())
    for name in delta_modules:
        if name not in modules:
            raise ValueError(f"delta_modules: {type(llm).__name__} has no module {name!r}")
        route_weight_of(modules[name], experts, decoupling)
    for full_name in expert_tensors:
        module_name, _, name = full_name.rpartition(".")
        if module_name not in modules or getattr(modules[module_name], name, None) is None:
            raise ValueError(f"expert_tensors: {type(llm).__name__} has no tensor {full_name!r}")
        _route_tensor_of(modules[module_name], name, experts)
    if not hasattr(llm, "layers"):
        raise ValueError(f"{type(llm).__name__} has no `layers`: this LLM can not be routed")
    for layer in llm.layers:
        layer.__class__ = _routed_class("layer", type(layer))
