"""A routed linear on a GPU in one kernel: W of the route is made tile by tile in registers, multiplied and forgotten.

Enters: x (tokens, in), bf16 or fp16, and the parts of a routed weight (`RouteParts`): weight and delta (out, in),
masks (experts, out, ceil(in/8)), scales (experts, out | 1), correction_a (experts, rank, in), correction_b (experts,
out, rank). Leaves: y (tokens, out) = x·Wᵣᵀ + bias of one route (`routed_linear`), or Wᵣ itself (`made_weight`).
Without gradients: the differentiable path is the torch code of `RoutedWeight`. Triton is optional; `available` tells
who can come here.

Invariant: an entry of Wᵣ is summed in fp32 in the order (θ₀ + (m·τ*)·s) + B·A and rounded once, to nearest even, to
the weight's dtype, before anything is multiplied with it. Multiply-adds are not fused (`enable_fp_fusion=False`), so
where no correction takes part (base, merged, kind paper and none, rank 0) each operation is the IEEE one of the torch
code, and so are the bits of Wᵣ. B·A sums exact products in fp32 in the tensor core's order, not in torch's, and not
in one order for all kernels here: a few fp32 roundings of B·A apart, which moves an entry to the next number of its
dtype only where the sum lies that near to a midpoint. y is summed in fp32 over rising columns, 64 at a time in every
configuration; the order within is the hardware's, and not cuBLAS's: y is near to, not bit for bit, what
nn.functional.linear gives with Wᵣ.
"""

import contextlib
import functools
import operator
import threading
from typing import Any

import torch

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE

from .routed_kernels_mmer import INTERPRETED, multiply_kernel, triton, weight_kernel

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("mask", "paper", "exact", "none")
# the same for all, so that no configuration changes the order in which columns are summed
BLOCK_IN = 64
_LOWEST_CAPABILITY = (8, 0)  # bf16 tensor cores
# Triton's autotuner holds the arguments of a launch in itself
_LAUNCHES = threading.Lock()
# most tokens -> (BLOCK_OUT, BLOCK_TOKENS, warps, stages) to try, once for each shape of weight; None: any number
_TILES: dict[int | None, tuple[tuple[int, int, int, int], ...]] = {
    16: ((16, 16, 4, 4), (32, 16, 4, 4), (64, 16, 4, 4), (128, 16, 8, 3)),
    64: ((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
    None: ((64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
}
_INTERPRETED_TILES = ((32, 16, 4, 1),)
_MADE_TILE = {"BLOCK_OUT": 32, "BLOCK_COLUMNS": 128, "num_warps": 4}


@functools.cache
def _tuned(most: int | None) -> Any:
    configs = [
        triton.Config(
            {"BLOCK_OUT": o, "BLOCK_TOKENS": t, "BLOCK_COLUMNS": BLOCK_IN}, num_warps=warps, num_stages=stages
        )
        for o, t, warps, stages in (_INTERPRETED_TILES if INTERPRETED else _TILES[most])
    ]
    key = ["OUT", "IN", "RANK", "DELTA", "MASK", "SCALE", "CORRECTED", "BIAS"]
    return triton.autotune(configs, key=key)(multiply_kernel)


@functools.cache
def _able(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LOWEST_CAPABILITY


def available(x: torch.Tensor) -> bool:
    """Whether the kernels here can take `x`: a plain bf16 or fp16 tensor on an NVIDIA GPU of compute capability 8.0 or
    more, no gradients recorded, nothing being traced, Triton there.
    """
    if triton is None or INTERPRETED or not x.is_cuda or x.dtype not in DTYPES or type(x) is not torch.Tensor:
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _able(x.device)


def _refuse(what: str, found: Any, wanted: Any):
    raise ValueError(f"{what}: found {found}, expected {wanted}; use the module's own forward for anything else")


class RouteParts:
    """What the weights of all routes are made from, checked once: a module can hold on to it until one of its
    parameters is another tensor. Raises ValueError for shapes, dtypes or devices that do not belong together.
    """

    def __init__(
        self,
        kind: str,
        weight: torch.Tensor,
        delta: torch.Tensor,
        masks: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        correction_a: torch.Tensor | None = None,
        correction_b: torch.Tensor | None = None,
    ):
        if kind not in KINDS:
            _refuse("kind", repr(kind), KINDS)
        if weight.ndim != 2 or weight.dtype not in DTYPES:
            _refuse("weight", (tuple(weight.shape), weight.dtype), f"(out, in) in one of {DTYPES}")
        self.weight, self.delta = weight, delta
        self.rows, self.columns = weight.shape
        width = (self.columns + 7) // 8
        own = {"masks": masks, "scales": scales, "correction_a": correction_a, "correction_b": correction_b}
        there = {name: part for name, part in own.items() if part is not None}
        allowed = {"mask": set(own), "paper": {"masks"}, "exact": {"correction_a", "correction_b"}, "none": set()}[
            kind
        ]
        if set(there) - allowed or (masks is None) != (kind in ("exact", "none")):
            _refuse(f"parts of kind {kind!r}", sorted(there), f"some of {sorted(allowed)}, masks where they are named")
        if (correction_a is None) != (correction_b is None):
            _refuse("correction", sorted(there), "both correction_a and correction_b, or neither")
        self.experts = next((len(part) for part in there.values()), None)
        self.rank = 0 if correction_a is None else correction_a.shape[1]
        shapes: dict[str, list[tuple]] = {
            "delta": [(self.rows, self.columns)],
            "masks": [(self.experts, self.rows, width)],
            "scales": [(self.experts, self.rows), (self.experts, 1)],
            "correction_a": [(self.experts, self.rank, self.columns)],
            "correction_b": [(self.experts, self.rows, self.rank)],
        }
        for name, part in {"delta": delta, **there}.items():
            if tuple(part.shape) not in shapes[name]:
                _refuse(f"shape of {name}", tuple(part.shape), " or ".join(map(str, shapes[name])))
            dtype = torch.uint8 if name == "masks" else weight.dtype
            if part.dtype != dtype or part.device != weight.device:
                _refuse(name, (part.dtype, part.device), (dtype, weight.device))
        for name, part in {"weight": weight, "delta": delta, **there}.items():
            if type(part) not in (torch.Tensor, torch.nn.Parameter) or not part.is_contiguous():
                _refuse(name, f"{type(part).__name__}, strides {part.stride()}", "a plain contiguous tensor")
        self.made_of = [weight, delta, *there.values()]
        # what is absent is never read: any pointer stands for it
        self.pointers = (weight, delta, *(weight if part is None else part for part in own.values()))
        self.sizes = {"OUT": self.rows, "IN": self.columns, "WIDTH": width, "RANK": self.rank}
        self.flags = {
            "DELTA": kind != "exact",
            "MASK": masks is not None,
            "SCALE": 0 if scales is None else 2 if scales.shape[1] == self.rows else 1,
            "CORRECTED": self.rank > 0,
            "BLOCK_RANK": max(16, 1 << (self.rank - 1).bit_length()) if self.rank else 16,
        }

    def of_these(self, parts: list[torch.Tensor]) -> bool:
        """Whether these are made of `parts`, in the order of `PARTS`, without those that are absent."""
        return len(parts) == len(self.made_of) and all(map(operator.is_, parts, self.made_of))

    @classmethod
    def of(cls, module: Any) -> "RouteParts":
        """The parts of a `RoutedWeight`."""
        own = (module.masks, module.scales, module.correction_a, module.correction_b)
        return cls(module.routed_kind, module.weight, module.delta, *own)

    def check_call(self, route: int, x: torch.Tensor | None = None, bias: torch.Tensor | None = None):
        highest = None if self.experts is None else FIRST_EXPERT_ROUTE + self.experts - 1
        if route < BASE_ROUTE or (highest is not None and route > highest):
            _refuse("route", route, "0 or more" if highest is None else f"0 to {highest}: {self.experts} experts")
        if triton is None:
            _refuse("Triton", "none that can be imported", "an installed one")
        if not self.weight.is_cuda and not INTERPRETED:
            _refuse("device", self.weight.device, "a GPU")
        if torch.is_grad_enabled() and any(part.requires_grad for part in (*self.pointers, x) if part is not None):
            _refuse("gradients", "recorded", "torch.no_grad()")
        if x is not None and (x.shape[-1:] != (self.columns,) or x.dtype != self.weight.dtype):
            _refuse("input", (tuple(x.shape), x.dtype), ((..., self.columns), self.weight.dtype))
        for name, part in (("input", x), ("bias", bias)):
            if part is not None and part.device != self.weight.device:
                _refuse(f"device of the {name}", part.device, self.weight.device)
        if bias is not None:
            found = (tuple(bias.shape), bias.dtype, bias.is_contiguous())
            if found != (wanted := ((self.rows,), self.weight.dtype, True)):
                _refuse("bias (shape, dtype, contiguous)", found, wanted)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def routed_linear(x: torch.Tensor, parts: RouteParts, route: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, in) -> (…, out), all tokens on `route`, with that route's `bias` (out,). Raises ValueError."""
    parts.check_call(route, x, bias)
    flat = x.reshape(-1, parts.columns).contiguous()
    tokens = flat.shape[0]
    y = flat.new_empty((tokens, parts.rows))

    def grid(meta):
        return triton.cdiv(tokens, meta["BLOCK_TOKENS"]), triton.cdiv(parts.rows, meta["BLOCK_OUT"])

    if y.numel():
        kernel = _tuned(next((most for most in _TILES if most is None or tokens <= most), None))
        with _LAUNCHES, _on(x.device):
            kernel[grid](
                flat, y, *parts.pointers, parts.weight if bias is None else bias, TOKENS=tokens, ROUTE=route,
                **parts.sizes, **parts.flags, BIAS=bias is not None, enable_fp_fusion=False,
            )  # fmt: skip
    return y.view(*x.shape[:-1], parts.rows)


def made_weight(parts: RouteParts, route: int) -> torch.Tensor:
    """Wᵣ (out, in) in one pass, for a weight that is kept or that multiplies very many tokens. Raises ValueError."""
    parts.check_call(route)
    made = torch.empty_like(parts.weight)
    grid = (triton.cdiv(parts.columns, _MADE_TILE["BLOCK_COLUMNS"]), triton.cdiv(parts.rows, _MADE_TILE["BLOCK_OUT"]))
    if made.numel():
        with _on(made.device):
            weight_kernel[grid](
                made, *parts.pointers, ROUTE=route, **parts.sizes, **parts.flags, **_MADE_TILE, enable_fp_fusion=False
            )
    return made
