"""The weight of each route, made from what a repository stores, and held where it is wanted often.

Shapes: weight and delta (out, in), masks (experts, out, ceil(in/8)), scales (experts, out | 1), correction_a
(experts, rank, in), correction_b (experts, out, rank). Route ids: 0 base, 1 merged, 2 + i expert i. Invariants: a held
weight has the bits of one that is made anew, and is never used after a change of its parts; a sum is taken in fp32 and
rounded once.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE

# entries made at a time: on a CPU few enough for its cache, else for little memory beside the weights
_CPU_BLOCK, _BLOCK = 1 << 17, 1 << 25
OWN_PARTS = ("masks", "scales", "correction_a", "correction_b")  # one slice for each expert
PARTS = ("weight", "delta", *OWN_PARTS)
_TRITON_DEVICES = ("cuda",)
_BIT_SHIFTS = tuple(range(8))
_BYTES: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """bool (…, n) -> uint8 (…, ceil(n / 8)); bit j of byte b is column 8b + j, the padding bits are 0."""
    padded = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    shifts = torch.tensor(_BIT_SHIFTS, dtype=torch.uint8, device=bits.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 (…, ceil(columns / 8)) -> bool (…, columns), the inverse of `pack_bits`."""
    shifts = torch.tensor(_BIT_SHIFTS, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :columns].bool()


def _bits_of_bytes(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(256, 8): the bits of every byte as numbers. Looking a byte up takes a fraction of the time of shifting it."""
    if (device, dtype) not in _BYTES:
        every = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)
        _BYTES[device, dtype] = unpack_bits(every, 8).to(dtype)
    return _BYTES[device, dtype]


def _parameter(tensor: torch.Tensor, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=trained)


def state_of(module: Any) -> dict[str, Any]:
    """What a copy takes over: not what was made of the tensors here, since it has tensors of its own."""
    made: dict[str, Any] = {"_kept": {}, "_twins": {}, "_triton_parts": None}
    return {name: made.get(name, value) for name, value in vars(module).items()}


class Kept(NamedTuple):
    """A route's weight, and what it was made from: (name, tensor, version, address) of each part."""

    weight: torch.Tensor
    parts: tuple[tuple[str, torch.Tensor, int, int], ...]

    def fresh(self, now: dict[str, Any]) -> bool:
        for name, part, version, address in self.parts:
            if now[name] is not part or part._version != version or part.data_ptr() != address:
                return False
        return True


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
    _parameters: dict[str, Any]
    _kept: dict[int, Kept]
    _triton_parts: Any = None
    _places: dict[int, int] | None = None  # an expert's route -> its slice, where not all are there any more

    def add_routes_(self, experts: int, kind: str, scale: str, rank: int):
        rows, columns = self.weight.shape
        # on the meta device zeros take many steps of Python, and are none
        new = functools.partial(
            torch.empty if self.weight.is_meta else torch.zeros, device=self.weight.device, dtype=self.weight.dtype
        )
        self.routed_kind = kind
        self.delta = _parameter(new((rows, columns)), trained=self.weight.requires_grad)
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

    def place(self, route: int) -> int:
        """Where an expert's slice is among the experts'."""
        return route - FIRST_EXPERT_ROUTE if self._places is None else self._places[route]

    def stored_route(self, route: int) -> int:
        """The route as the kernels count it: by the slices that are there."""
        return route if route < FIRST_EXPERT_ROUTE else FIRST_EXPERT_ROUTE + self.place(route)

    def route_weight(self, route: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The weight of a route (some of its rows with `rows`, an index), in the weight's dtype."""
        kept = self._kept.get(route)
        if kept is not None and not torch.is_grad_enabled():
            if torch.compiler.is_compiling() or kept.fresh(self._parameters):
                return kept.weight if rows is None else kept.weight[rows]
            self._kept.pop(route, None)  # a part was changed or moved
        if route == BASE_ROUTE or self.delta is None:
            return self.weight if rows is None else self.weight[rows]
        if rows is None and self._in_blocks():
            return self._made(route)
        return self._sum(route, slice(None) if rows is None else rows)

    def _sum(self, route: int, rows: torch.Tensor | slice) -> torch.Tensor:
        """The formula on some rows, differentiable, for any kind of tensor (sharded, quantised)."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight[rows]
        if hasattr(type(weight), "tensor_data_names"):  # torchao's; a plain tensor has a `dequantize` too
            weight = weight.dequantize()
        total = weight.to(exact)
        if route == MERGED_ROUTE or self.routed_kind == "none":
            return (total + self.delta[rows].to(exact)).to(self.weight.dtype)
        expert = self.place(route)
        if self.masks is not None:
            own = unpack_bits(self.masks[expert, rows], self.weight.shape[1]) * self.delta[rows].to(exact)
            if self.scales is not None:
                scales = self.scales[expert]
                own = own * (scales if scales.shape[0] == 1 else scales[rows].unsqueeze(-1)).to(exact)
            total = total + own
        if self.correction_a is not None:
            total = total + self.correction_b[expert, rows].to(exact) @ self.correction_a[expert].to(exact)
        return total.to(self.weight.dtype)

    def _in_blocks(self) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_meta:
            return False
        parts = (self._parameters.get(name) for name in PARTS)
        return all(part is None or type(part) is nn.Parameter for part in parts)

    def _made(self, route: int) -> torch.Tensor:
        """`_sum` of all rows, without gradients: block by block, few passes, no temporary of the whole size."""
        weight, delta = self.weight.detach(), self.delta.detach()
        if (parts := self.triton_parts(weight)) is not None:
            from .routed_triton_mmer import made_weight

            return made_weight(parts, self.stored_route(route))
        exact = torch.promote_types(weight.dtype, torch.float32)
        made = torch.empty_like(weight)
        expert = -1 if route == MERGED_ROUTE or self.routed_kind == "none" else self.place(route)
        a = b = scales = None
        if expert >= 0 and self.correction_a is not None:
            a, b = (part[expert].detach().to(exact) for part in (self.correction_a, self.correction_b))
        if expert >= 0 and self.scales is not None:
            scales = self.scales[expert].detach().to(exact).unsqueeze(-1).expand(len(weight), 1)
        table = None if expert < 0 or self.masks is None else _bits_of_bytes(weight.device, exact)
        step = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _BLOCK) // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            if expert < 0:
                own = delta[rows].to(exact, copy=True).add_(weight[rows])
            elif table is not None:
                own = nn.functional.embedding(self.masks[expert, rows].int(), table).flatten(1)[:, : weight.shape[1]]
                own.mul_(delta[rows])
                if scales is not None:
                    own.mul_(scales[rows])
                own.add_(weight[rows])
            else:
                own = weight[rows].to(exact, copy=True)
            if a is not None and b is not None:
                own.add_(b[rows] @ a)
            made[rows] = own
        return made

    def triton_parts(self, x: torch.Tensor) -> Any:
        """This weight's parts as the Triton kernels take them, or None where they can not, or not with `x`."""
        if x.device.type not in _TRITON_DEVICES or self.delta is None or not self._in_blocks():
            return None
        # only a machine with a GPU has a reason to import Triton
        from .routed_triton_mmer import RouteParts, available

        parts = [part for name in PARTS if (part := self._parameters.get(name)) is not None]
        dtypes = {part.dtype for part in parts} - {torch.uint8}
        plain = all(part.is_contiguous() and part.device == x.device for part in parts)
        if dtypes != {x.dtype} or not plain or not available(x):
            return None
        if self._triton_parts is None or not self._triton_parts.of_these(parts):
            self._triton_parts = RouteParts.of(self)
        return self._triton_parts

    def keep_(self, routes: Iterable[int], of_others: dict[tuple[int, int], Kept] | None = None):
        """Hold the weights of `routes` and drop all others. Used without gradients only, and never after a change.

        of_others: (id of θ₀, route) -> what another module with the same tensors holds, a tied head and embedding.
        """
        kept, of_others = {}, {} if of_others is None else of_others
        # a rank has its own piece of a divided weight, and an offloaded one is there, only while its forward runs
        divided = any(hasattr(part, "placements") for part in self._parameters.values())
        if self.delta is None or self.weight.is_meta or divided:
            routes = ()
        with torch.no_grad():
            for route in routes:
                if route == BASE_ROUTE:
                    continue
                key = id(self.weight), route
                old = of_others.get(key, self._kept.get(route))
                if old is None or not old.fresh(self._parameters):
                    here = [(name, self._parameters.get(name)) for name in PARTS]
                    parts = tuple((n, part, part._version, part.data_ptr()) for n, part in here if part is not None)
                    old = Kept(self.route_weight(route), parts)
                kept[route] = of_others[key] = old
        self._kept = kept

    def route_bytes(self) -> int:
        """What one more held route takes."""
        return 0 if self.delta is None else self.weight.nbytes

    def _apply(self, fn, recurse=True):
        # a move or a cast makes new tensors; what was made of the old ones would stay behind
        self._kept, self._triton_parts = {}, None
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self):
        return state_of(self)
