"""The Triton kernels against the definition, on CPU tensors in Triton's interpreter, and through its compiler.

The interpreter has to be chosen before Triton is first imported, so the cases run in children of this process: the
`interpreted_*` functions with TRITON_INTERPRET=1, the `compiled_*` ones without. A GPU is not needed for either. The
interpreter multiplies fp16 as numpy does; its bf16 is cut, not rounded, and can not be multiplied: bf16 is tried where
sums are exact, and in the compiler.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from configuration_mmer.export_mmer import write_hub_code
from modeling_mmer import routed_weights_mmer
from modeling_mmer.route_plan_mmer import RoutePlan, route_scope
from modeling_mmer.routed_kernels_mmer import multiply_kernel, weight_kernel
from modeling_mmer.routed_triton_mmer import (
    _TILES,
    BLOCK_IN,
    INTERPRETED,
    RouteParts,
    available,
    made_weight,
    routed_linear,
)
from modeling_mmer.routed_weights_mmer import pack_bits
from modeling_mmer.routing_mmer import route_weight_of

EXPERTS = 2
ROUTES = 2 + EXPERTS
KINDS = [("mask", "row", 4), ("mask", "tensor", 0), ("mask", "none", 17), ("paper", "none", 0), ("exact", "none", 3)]
KINDS += [("mask", "row", 0), ("exact", "none", 0), ("none", "none", 0)]
SIZES = [(37, 75), (5, 3), (32, 136)]


def in_a_child(functions: str, tmp_path, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        f"python_functions={functions}",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, (
        done.stdout + done.stderr
    )


def test_the_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    in_a_child("interpreted_*", tmp_path, TRITON_INTERPRET="1")


def test_the_kernels_in_the_compiler(tmp_path):
    pytest.importorskip("triton")
    in_a_child("compiled_*", tmp_path, TRITON_INTERPRET="0")


def test_nobody_needs_triton(tmp_path):
    """The Hub does not ask for it, and the flat files are read without it."""
    for path in write_hub_code(tmp_path / "flat"):
        assert "triton" not in get_imports(path)
    code = """
import sys, torch
sys.modules["triton"] = None
from flat import routed_triton_mmer as there
assert there.triton is None and not there.available(torch.zeros(1, dtype=torch.float16))
half = torch.zeros(4, 4, dtype=torch.float16)
try: there.made_weight(there.RouteParts("none", half, half), 1)
except ValueError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Triton: found none" in done.stdout


def test_a_cpu_tensor_goes_elsewhere():
    with torch.no_grad():
        assert not available(torch.zeros(1, 4, dtype=torch.float16))
    if not INTERPRETED:
        half = torch.zeros(4, 4, dtype=torch.float16)
        with pytest.raises(ValueError, match="device: found cpu, expected a GPU"):
            routed_linear(half, RouteParts("none", half, half), 1)


# what the kernels are compared with


def surrounded(tensor):
    """The same numbers between others that would spoil every result: reading beside a tensor can not go unseen."""
    whole = torch.full(
        (tensor.numel() + 512,), 255 if tensor.dtype == torch.uint8 else float("nan"), dtype=tensor.dtype
    )
    whole[256:-256] = tensor.flatten()
    return whole[256:-256].view(tensor.shape)


def routed_module(rows, columns, kind, scale, rank, dtype=torch.float16, seed=0):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
    module = route_weight_of(linear, EXPERTS, {"kind": kind, "scale": scale, "rank": rank})
    for name, part in list(module.named_parameters()):
        if name == "masks":
            values = pack_bits(torch.rand(EXPERTS, rows, columns) < 0.4)
        else:
            values = (torch.randn(part.shape) * (0.3 if name.startswith("correction") else 1)).to(dtype)
        module.register_parameter(name, torch.nn.Parameter(surrounded(values), requires_grad=False))
    return module


def definition(module, route):
    """The weight of a route, entry by entry in fp32, before it is rounded; without the correction, and the latter."""
    weight, delta = (part.float().numpy() for part in (module.weight, module.delta))
    rows, columns = weight.shape
    total, correction = weight.copy(), np.zeros((rows, columns))
    expert = route - 2
    for i in range(rows):
        for j in range(columns):
            if route == 1 or (route >= 2 and module.routed_kind == "none"):
                total[i, j] = weight[i, j] + delta[i, j]
            elif route >= 2 and module.masks is not None:
                bit = np.float32(int(module.masks[expert, i, j // 8]) >> j % 8 & 1)
                own = bit * delta[i, j]
                if module.scales is not None:
                    scales = module.scales[expert].float().numpy()
                    own = own * scales[i if len(scales) > 1 else 0]
                total[i, j] = weight[i, j] + own
    if route >= 2 and module.correction_a is not None:
        correction = module.correction_b[expert].double().numpy() @ module.correction_a[expert].double().numpy()
    return torch.from_numpy(total), torch.from_numpy(correction)


def inputs(tokens, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return surrounded(torch.randn(tokens, columns, generator=generator).half())


def check_product(y, x, weights, bias=None, corrected=False):
    """`weights` (tokens, out, in) are those that each token is to be multiplied with. Corrected ones are summed in
    another order for another block: two of a row may be rounded the other way.
    """
    wanted = torch.einsum("ti,toi->to", x.double(), weights.double())
    size = torch.einsum("ti,toi->to", x.double().abs(), weights.double().abs())
    wanted = wanted if bias is None else wanted + bias.double()
    assert y.dtype == torch.float16
    if corrected:
        size = size + 2e5 * 2.0**-10 * (x.unsqueeze(1).double() * weights).abs().amax(-1)
    assert ((y.double() - wanted).abs() <= 2.0**-11 * wanted.abs() + 1e-5 * size + 1e-7).all()


# in the interpreter


@pytest.mark.parametrize(("kind", "scale", "rank"), KINDS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def interpreted_weights(rows, columns, kind, scale, rank):
    assert INTERPRETED
    module = routed_module(rows, columns, kind, scale, rank)
    parts = RouteParts.of(module)
    for route in range(ROUTES):
        made, (plain, correction) = made_weight(parts, route), definition(module, route)
        theirs = module.route_weight(route)
        if route < 2 or module.correction_a is None:
            assert torch.equal(made.view(torch.int16), plain.half().view(torch.int16))
            assert torch.equal(made.view(torch.int16), theirs.view(torch.int16))
        else:
            wanted = plain.double() + correction
            assert ((made.double() - wanted).abs() <= 2.0**-11 * wanted.abs() + 2e-6).all()
            other = made != theirs
            below, above = (torch.nextafter(theirs[other], torch.full((), end).half()) for end in (-9e4, 9e4))
            assert ((made[other] == below) | (made[other] == above)).all() and other.float().mean() < 0.02


def interpreted_signs_of_zero_and_broken_numbers():
    module = routed_module(8, 16, "mask", "row", 0)
    module.weight[:] = -0.0
    module.delta[:, :8], module.delta[0, 8] = -1.0, float("inf")
    parts = RouteParts.of(module)
    for route in range(ROUTES):
        made, theirs = made_weight(parts, route), module.route_weight(route)
        assert torch.equal(made.isnan(), theirs.isnan()) and made.isnan().any() == (
            route >= 2 and theirs.isnan().any()
        )
        assert torch.equal(made.nan_to_num(7), theirs.nan_to_num(7))
        assert torch.equal(made.signbit()[~made.isnan()], theirs.signbit()[~made.isnan()])


@pytest.mark.parametrize(("kind", "scale", "rank"), [("mask", "row", 0), ("paper", "none", 0), ("none", "none", 0)])
def interpreted_weights_of_bf16(kind, scale, rank):
    module = routed_module(37, 75, kind, scale, rank, torch.bfloat16)
    for name, part in module.named_parameters():
        if name != "masks":
            part.copy_(torch.randint(-8, 9, part.shape))
    for route in range(ROUTES):
        assert torch.equal(made_weight(RouteParts.of(module), route), module.route_weight(route))


@pytest.mark.parametrize(("kind", "scale", "rank"), KINDS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 32, 64), (19, 35, 75)])
def interpreted_one_route(tokens, rows, columns, kind, scale, rank):
    module = routed_module(rows, columns, kind, scale, rank)
    parts, x, bias = RouteParts.of(module), inputs(tokens, columns), inputs(1, rows, seed=2)[0]
    for route in range(ROUTES):
        weights = made_weight(parts, route).expand(tokens, rows, columns)
        if (kind, scale, rank) == KINDS[0]:
            check_product(routed_linear(x, parts, route), x, weights, None, rank > 0)
        check_product(routed_linear(x, parts, route, bias), x, weights, bias, rank > 0)


def interpreted_without_tokens_and_with_strides():
    parts = RouteParts.of(routed_module(37, 75, "mask", "row", 4))
    assert routed_linear(inputs(0, 75), parts, 2).shape == (0, 37)
    x = inputs(75, 6).T
    assert torch.equal(routed_linear(x, parts, 3), routed_linear(x.contiguous(), parts, 3))


def interpreted_parts_that_do_not_belong_together():
    good = routed_module(8, 16, "mask", "row", 4)
    names = ("weight", "delta", "masks", "scales", "correction_a", "correction_b")
    of = {name: getattr(good, name) for name in names}
    RouteParts("mask", **of)
    wrong = {
        "kind: found 'sum'": ("sum", {}),
        "shape of delta": ("mask", {"delta": of["delta"][:, :8]}),
        "shape of masks": ("mask", {"masks": of["masks"][:, :, :1]}),
        "shape of scales": ("mask", {"scales": of["scales"][:, :3]}),
        "shape of correction_a": ("mask", {"correction_a": of["correction_a"][:1]}),
        "shape of correction_b": ("mask", {"correction_b": of["correction_b"][:, :, :2]}),
        "delta: found": ("mask", {"delta": of["delta"].bfloat16()}),
        "masks: found": ("mask", {"masks": of["masks"].char()}),
        "weight: found": ("mask", {"weight": of["weight"].float()}),
        "delta: found Parameter|delta: found Tensor, strides": ("mask", {"delta": of["delta"].T.contiguous().T}),
        "parts of kind 'mask'": ("mask", {"masks": None}),
        "parts of kind 'paper'": ("paper", {}),
        "parts of kind 'exact'": ("exact", {}),
        "parts of kind 'none'": ("none", {}),
        "both correction_a and correction_b": ("mask", {"correction_b": None}),
    }
    for message, (kind, changed) in wrong.items():
        with pytest.raises(ValueError, match=message):
            RouteParts(kind, **{**of, **changed})


def interpreted_calls_that_are_refused():
    module = routed_module(8, 16, "mask", "row", 4)
    parts, x = RouteParts.of(module), inputs(5, 16)
    for message, call in {
        "route: found 4": lambda: routed_linear(x, parts, 4),
        "route: found -1": lambda: made_weight(parts, -1),
        "route: found -2": lambda: routed_linear(x, parts, -2),
        "input: found .*float32": lambda: routed_linear(x.float(), parts, 0),
        "input: found .*12": lambda: routed_linear(x[:, :12], parts, 0),
        "bias.*found .*7,": lambda: routed_linear(x, parts, 0, x[0, :7].clone()),
        "bias.*found .*float32": lambda: routed_linear(x, parts, 2, x[0, :8].float()),
        "gradients: found": lambda: routed_linear(x.clone().requires_grad_(), parts, 2),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def interpreted_routed_modules_come_here(monkeypatch):
    """Few tokens of packed weights by the product, weights by `made_weight`; held ones and the base's stay torch's."""
    from modeling_mmer import routed_triton_mmer

    module, x, ran = routed_module(35, 75, "mask", "row", 4), inputs(6, 75).view(2, 3, 75), []
    names = ("routed_linear", "made_weight")
    for name in names:
        own = getattr(routed_triton_mmer, name)
        monkeypatch.setattr(routed_triton_mmer, name, lambda *a, n=name, f=own: ran.append((n, f(*a))) or ran[-1][1])
    monkeypatch.setattr(routed_weights_mmer, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(routed_triton_mmer, "available", lambda x: not torch.is_grad_enabled())
    routes = torch.tensor([[2, 2, 1], [0, 2, 3]])
    with torch.no_grad(), route_scope(RoutePlan(routes)):
        y = module(x)
    assert [name for name, _ in ran] == ["routed_linear"] * 3
    weights = torch.stack([definition(module, route)[0] + definition(module, route)[1] for route in range(ROUTES)])
    wanted = torch.einsum("bti,btoi->bto", x.double(), weights.half().double()[routes])
    assert (y.double() - wanted).abs().max() < 0.02 * wanted.abs().max()
    many = x.flatten(0, 1).repeat(20, 1)[None]
    with torch.no_grad(), route_scope(RoutePlan.one(2, many.shape[:2], x.device)):
        got = module(many)
    name, made = ran.pop()
    assert name == "made_weight" and torch.equal(got, torch.nn.functional.linear(many, made))
    module.keep_([2])
    ran.clear()
    with torch.no_grad(), route_scope(RoutePlan.one(2, x.shape[:2], x.device)):
        assert torch.equal(module(x), torch.nn.functional.linear(x, made)) and not ran
    module.delta = torch.nn.Parameter(surrounded(torch.zeros_like(module.delta)), requires_grad=False)
    assert torch.equal(module.route_weight(1), module.weight)
    with torch.no_grad():
        assert torch.equal(module.route_weight(1), module.weight) and ran.pop()[0] == "made_weight"
    assert copy.deepcopy(module)._triton_parts is None and module.half()._triton_parts is None


# in the compiler

FLAGS = {"DELTA": True, "MASK": True, "SCALE": 2, "CORRECTED": True, "BLOCK_RANK": 16}
LARGEST = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that one program can have


def compiled(kernel, capability, warps, stages, fusion=False, **flags):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"masks": "*u8"}
    signature = {
        name: "constexpr" if name in flags else "i32" if name.isupper() else types.get(name, "*bf16")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in flags.items()}
    aligned = [n for n, name in enumerate(kernel.arg_names) if name not in {*flags, "TOKENS", "ROUTE"}]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    program = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert program.metadata.shared <= LARGEST[capability]
    return program.asm["ptx"]


def operations(code):
    return set(re.findall(r"\b(?:mul|add|sub|fma|cvt)\.[\w.]*f(?:16|32)\b", code))


def compiled_weights_fuse_nothing():
    """A fused multiply-add would skip the rounding of (m·τ*)·s. What is marked .rn may not be fused, the rest may."""
    flags = {**FLAGS, "CORRECTED": False, "BLOCK_OUT": 32, "BLOCK_COLUMNS": 128}
    assert {"mul.f32", "add.f32"} <= operations(compiled(weight_kernel, 90, 4, 3, fusion=True, **flags))
    found = operations(compiled(weight_kernel, 90, 4, 3, **flags))
    assert {"mul.rn.f32", "add.rn.f32", "cvt.rn.bf16.f32"} <= found
    assert not {name for name in found if name.startswith("fma") or name in ("mul.f32", "add.f32") or ".ftz" in name}


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
@pytest.mark.parametrize("most", [16, None])
def compiled_products_use_tensor_cores(capability, instruction, most):
    rows, tokens, warps, stages = _TILES[most][-1]
    blocks = {"BLOCK_OUT": rows, "BLOCK_TOKENS": tokens, "BLOCK_COLUMNS": BLOCK_IN}
    flags = {**FLAGS, **blocks, "BIAS": most is None}
    code = compiled(multiply_kernel, capability, warps, stages, **flags)
    assert instruction in code and "cp.async" in code
    found = operations(code)
    assert found and not {name for name in found if name.startswith("fma") or name == "mul.f32" or ".ftz" in name}
