"""Routed modules: each token once, with the parameters of its route.

Enters: a stock transformers LLM and the names of its tensors that experts changed. Leaves: the same LLM, its modules
turned in place into routed ones. A forward plans once which tokens take which route (`RoutePlan`); every routed module
multiplies each group of tokens once with that route's weight. Without a plan, or with the base route alone, a routed
module runs its own class's forward on its own weight: that is the base LLM bit for bit.

Shapes: weight and delta (out, in), masks (experts, out, ceil(in/8)), scales (experts, out | 1), correction_a
(experts, rank, in), correction_b (experts, out, rank). Route ids: 0 base, 1 merged, 2 + i expert i.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import CompileableContextVar

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE

_BIT_SHIFTS = tuple(range(8))


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """bool (…, n) -> uint8 (…, ceil(n / 8)); bit j of byte b is column 8b + j, the padding bits are 0."""
    padded = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    shifts = torch.tensor(_BIT_SHIFTS, dtype=torch.uint8, device=bits.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 (…, ceil(columns / 8)) -> bool (…, columns), the inverse of `pack_bits`."""
    shifts = torch.tensor(_BIT_SHIFTS, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :columns].bool()


class RoutePlan:
    """Which tokens take which route, worked out once a forward and shared by all layers.

    `route_ids` is int64 (batch, sequence). `single` is the route when all tokens share one, else None. Otherwise
    `groups` holds (route, index of its tokens in the flattened batch), in rising order of route.
    """

    def __init__(self, route_ids: torch.Tensor):
        self.route_ids = route_ids
        routes = torch.unique(route_ids).tolist()
        self.single = routes[0] if len(routes) == 1 else None
        self._groups: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        self._back: dict[torch.device, torch.Tensor] = {}
        if self.single is None:
            flat = route_ids.flatten()
            self._prepare([(route, torch.nonzero(flat == route).squeeze(-1)) for route in routes])

    def _prepare(self, groups: list[tuple[int, torch.Tensor]]):
        device = groups[0][1].device
        self._groups[device] = groups
        self._back[device] = torch.argsort(torch.cat([index for _, index in groups]))

    def routed(self, x: torch.Tensor, compute: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`compute(route, tokens)` on each group of the tokens of `x` (batch, sequence, …), put back in order."""
        if self.single is not None:
            return compute(self.single, x)
        if x.device not in self._groups:
            self._prepare([(route, index.to(x.device)) for route, index in next(iter(self._groups.values()))])
        tokens = x.flatten(0, 1)
        if tokens.shape[0] != self.route_ids.numel():
            raise ValueError(
                f"{tokens.shape[0]} tokens reached a routed module, but the routes are for {self.route_ids.numel()}: "
                f"route_ids has shape {tuple(self.route_ids.shape)}, the input {tuple(x.shape)}"
            )
        parts = [compute(route, tokens[index]) for route, index in self._groups[x.device]]
        return torch.cat(parts)[self._back[x.device]].unflatten(0, x.shape[:2])

    def keep(self, positions: slice | torch.Tensor) -> "RoutePlan":
        """The plan of some positions of the sequence, as `logits_to_keep` names them."""
        return RoutePlan(self.route_ids[:, positions])


_PLAN = CompileableContextVar("mmer_route_plan")


@contextlib.contextmanager
def route_scope(plan: RoutePlan | None):
    """Routed modules called inside follow `plan`. Per thread and per task, and undone on the way out."""
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


def _parameter(tensor: torch.Tensor, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=trained)


class RoutedWeight:
    """The weight of every route, from (weight, delta, masks, scales, corrections). Mixed into linears and embeddings.

    `kind` mask: θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ; paper: θ₀ + mᵢ⊙τ*; exact: θ₀ + BᵢAᵢ; none: θ₀ + τ* for every expert
    (the paper's reconstruction, design of the repo §2). Summed in fp32 and rounded once to the weight's dtype.
    """

    weight: torch.Tensor
    routed_kind: str
    # parameters, or None where the kind has no such part
    delta: Any
    masks: Any
    scales: Any
    correction_a: Any
    correction_b: Any
    _kept: dict[int, tuple[tuple, torch.Tensor]]

    def add_routes_(self, experts: int, kind: str, scale: str, rank: int):
        rows, columns = self.weight.shape
        new = self.weight.new_zeros
        self.routed_kind = kind
        self.delta = _parameter(torch.zeros_like(self.weight), trained=self.weight.requires_grad)
        self.masks = self.scales = self.correction_a = self.correction_b = None
        if kind in ("mask", "paper"):
            self.masks = _parameter(new((experts, rows, (columns + 7) // 8), dtype=torch.uint8))
        if kind == "mask" and scale != "none":
            self.scales = _parameter(new((experts, rows if scale == "row" else 1)))
        rank = min(rank, rows, columns)
        if kind in ("mask", "exact") and rank:
            self.correction_a = _parameter(new((experts, rank, columns)))
            self.correction_b = _parameter(new((experts, rows, rank)))
        self._kept = {}

    def route_weight(self, route: int, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The weight of a route (some of its rows with `rows`), in the weight's dtype."""
        if route == BASE_ROUTE or self.delta is None:
            return self.weight[rows]
        kept = self._kept.get(route)
        if kept is not None and not torch.is_grad_enabled() and kept[0] == self._versions():
            return kept[1][rows]
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight[rows].to(exact)
        if route == MERGED_ROUTE or self.routed_kind == "none":
            return (total + self.delta[rows].to(exact)).to(self.weight.dtype)
        expert = route - FIRST_EXPERT_ROUTE
        if self.masks is not None:
            own = unpack_bits(self.masks[expert, rows], self.weight.shape[1]) * self.delta[rows].to(exact)
            if self.scales is not None:
                scales = self.scales[expert]
                own = own * (scales if scales.shape[0] == 1 else scales[rows].unsqueeze(-1)).to(exact)
            total = total + own
        if self.correction_a is not None:
            total = total + self.correction_b[expert, rows].to(exact) @ self.correction_a[expert].to(exact)
        return total.to(self.weight.dtype)

    def _versions(self) -> tuple:
        parts = (self.weight, self.delta, self.masks, self.scales, self.correction_a, self.correction_b)
        return tuple((part.data_ptr(), part._version) for part in parts if part is not None)

    def keep_(self, routes: Iterable[int]):
        """Hold the weights of `routes` and drop all others. Used without gradients only, and never after a change."""
        wanted = [route for route in routes if route != BASE_ROUTE and self.delta is not None]
        versions = self._versions() if wanted else ()
        kept = {}
        with torch.no_grad():
            for route in wanted:
                old = self._kept.get(route)
                kept[route] = old if old is not None and old[0] == versions else (versions, self.route_weight(route))
        self._kept = kept

    def _apply(self, fn, recurse=True):
        self._kept = {}  # a move or a cast makes new tensors; a kept weight would stay behind
        return super()._apply(fn, recurse)  # type: ignore[misc]


class RoutedLinear(RoutedWeight, nn.Linear):
    """nn.Linear with a weight (and a bias, where experts changed it) for each route."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = _PLAN.get()
        if plan is None or plan.single == BASE_ROUTE:
            return nn.functional.linear(x, self.weight, self.bias)
        return plan.routed(
            x, lambda route, t: nn.functional.linear(t, self.route_weight(route), self.route_bias(route))
        )

    def route_bias(self, route: int) -> torch.Tensor | None:
        return route_tensor(self, "bias", route)


def route_tensor(module: Any, name: str, route: int) -> torch.Tensor | None:
    """A small tensor (norm weight, bias) as `route` has it: each expert's own, exactly."""
    own = getattr(module, f"expert_{name}", None)
    if own is None or route == BASE_ROUTE:
        return getattr(module, name)
    return getattr(module, f"merged_{name}") if route == MERGED_ROUTE else own[route - FIRST_EXPERT_ROUTE]


def _twin(module: nn.Module, **tensors: torch.Tensor | None) -> Any:
    """`module` with some parameters replaced, without touching it: other threads may be using it."""
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **tensors}}
    return twin


def _tokens_first(x: torch.Tensor) -> bool:
    """Whether a 4-D activation is (batch, sequence, heads, …), not (batch, heads, sequence, …).

    Both are views of one (batch, sequence, heads, …) buffer, so the sequence is the axis with the larger stride.
    """
    return x.ndim != 4 or x.stride(1) >= x.stride(2)


def _routed_tensors_forward(base: Any) -> Callable:
    def forward(self, x: torch.Tensor, *args, **kwargs):
        plan = _PLAN.get()
        if plan is None or plan.single == BASE_ROUTE:
            return base.forward(self, x, *args, **kwargs)

        def compute(route, tokens):
            own = {name: route_tensor(self, name, route) for name in self.routed_tensors}
            return base.forward(_twin(self, **own), tokens, *args, **kwargs)

        if plan.single is not None or _tokens_first(x):
            return plan.routed(x, compute)
        return plan.routed(x.transpose(1, 2), compute).transpose(1, 2)

    return forward


def _routed_embedding_forward(base: Any) -> Callable:
    def forward(self, input_ids: torch.Tensor):
        plan = _PLAN.get()
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
        # set here and not around the whole LLM: gradient checkpointing runs this forward again, alone
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
            "__reduce_ex__": lambda self, protocol: (_rebuild, (role, base), self.__dict__),
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
    module.register_parameter(f"expert_{name}", _parameter(stock.detach().new_zeros((experts, *stock.shape))))
    module.register_parameter(f"merged_{name}", _parameter(torch.zeros_like(stock)))
    if isinstance(module, nn.Linear):
        if not isinstance(module, RoutedLinear):
            module.__class__ = RoutedLinear
            vars(module).update(delta=None, _kept={})
        return
    if not hasattr(module, "routed_tensors"):
        module.__class__ = _routed_class("tensors", type(module))
        module.routed_tensors = []
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
