"""The Triton programs behind `routed_triton_mmer`: tiles of the weight of a route, made and multiplied on a GPU.

Enters: pointers to contiguous tensors, as `routed_triton_mmer` checks and names them: x (tokens, in), weight and
delta (out, in), masks (experts, out, width = ceil(in/8)), scales (experts, out | 1), correction_a (experts, rank, in),
correction_b (experts, out, rank). Leaves: y (tokens, out), or the weight of a route (out, in). Without Triton this
file can be read as well; its functions are then not compiled and not called. Invariant: nothing outside of the tensors
is read or written, whatever the sizes; an entry of a weight is summed in fp32 as (θ₀ + (m·τ*)·s) + B·A, rounded once.
"""

from __future__ import annotations  # without Triton there is no tl.constexpr to annotate with

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jit(kernel: Callable) -> Any:
    # numbers that differ from call to call make no new program
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=("ROUTE", "TOKENS"))


# In the kernels: rows are int64 (BLOCK_OUT,), `route` is known at run time, what the weight has is known at compile
# time: DELTA whether experts add τ* (kind none), MASK, SCALE 0 none 1 tensor 2 row, CORRECTED.


@_jit
def _row_scales(
    scales, rows, route, OUT, SCALE: tl.constexpr, BLOCK_OUT: tl.constexpr
):  # -> fp32 (BLOCK_OUT,), 1 where there is none
    expert = tl.maximum(route - 2, 0).to(tl.int64)
    own = (rows < OUT) & (route >= 2)
    if SCALE == 2:
        found = tl.load(scales + expert * OUT + rows, mask=own, other=1.0).to(tl.float32)
    elif SCALE == 1:
        found = tl.load(scales + expert + rows * 0, mask=own, other=1.0).to(tl.float32)
    else:
        found = tl.full((BLOCK_OUT,), 1.0, tl.float32)
    return found


@_jit
def _row_correction(
    correction_b, rows, route, OUT, RANK, CORRECTED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr
):  # -> (BLOCK_OUT, BLOCK_RANK) of the expert's B, 0 from the rank on
    if CORRECTED:
        expert = tl.maximum(route - 2, 0).to(tl.int64)
        ranks = tl.arange(0, BLOCK_RANK)
        own = (rows < OUT)[:, None] & (ranks < RANK)[None, :] & (route >= 2)
        found = tl.load(correction_b + (expert * OUT + rows)[:, None] * RANK + ranks[None, :], mask=own, other=0.0)
    else:
        found = tl.zeros((BLOCK_OUT, BLOCK_RANK), tl.float32)
    return found


@_jit
def _weight_tile(
    weight,
    delta,
    masks,
    correction_a,
    row_scales,
    row_correction,
    rows,
    start,
    route,
    OUT,
    IN,
    WIDTH,
    RANK,
    DELTA: tl.constexpr,
    MASK: tl.constexpr,
    SCALE: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # -> (BLOCK_OUT, BLOCK_COLUMNS) of Wᵣ, rounded to the weight's dtype, 0 outside of it
    expert = tl.maximum(route - 2, 0).to(tl.int64)
    of_expert = route >= 2
    changed = route == 1
    if DELTA:
        changed = route >= 1
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < OUT)[:, None] & (columns < IN)[None, :]
    at = rows[:, None] * IN + columns[None, :]
    base = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(delta + at, mask=inside & changed, other=0.0).to(tl.float32)
    if MASK:
        places = start // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
        there = (rows < OUT)[:, None] & (places < WIDTH)[None, :] & of_expert
        packed = tl.load(masks + (expert * OUT + rows)[:, None] * WIDTH + places[None, :], mask=there, other=0)
        bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        # multiplied, not selected: the zeros keep their signs, and a broken number stays one, as in torch
        masked = tl.reshape(bits, (BLOCK_OUT, BLOCK_COLUMNS)).to(tl.float32) * own
        if SCALE > 0:
            masked = masked * row_scales[:, None]
        own = tl.where(of_expert, masked, own)
    total = tl.where(changed, base + own, base)  # not base + 0, which turns -0 into 0
    if CORRECTED:
        ranks = tl.arange(0, BLOCK_RANK)
        there = (ranks < RANK)[:, None] & (columns < IN)[None, :] & of_expert
        a = tl.load(correction_a + (expert * RANK + ranks)[:, None] * IN + columns[None, :], mask=there, other=0.0)
        total = tl.where(of_expert, total + tl.dot(row_correction, a, out_dtype=tl.float32), total)
    return total.to(weight.dtype.element_ty)


@_jit
def multiply_kernel(
    x,
    y,
    weight,
    delta,
    masks,
    scales,
    correction_a,
    correction_b,
    bias,
    TOKENS,
    ROUTE,
    OUT,
    IN,
    WIDTH,
    RANK,
    DELTA: tl.constexpr,
    MASK: tl.constexpr,
    SCALE: tl.constexpr,
    CORRECTED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = places < TOKENS
    tokens = places.to(tl.int64)
    rows = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    row_scales = _row_scales(scales, rows, ROUTE, OUT, SCALE, BLOCK_OUT)
    row_correction = _row_correction(correction_b, rows, ROUTE, OUT, RANK, CORRECTED, BLOCK_OUT, BLOCK_RANK)
    # W stands on the left: a single token is then a narrow tile, not a short one, and W need not leave the registers
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for start in range(0, IN, BLOCK_COLUMNS):
        w = _weight_tile(
            weight,
            delta,
            masks,
            correction_a,
            row_scales,
            row_correction,
            rows,
            start,
            ROUTE,
            OUT,
            IN,
            WIDTH,
            RANK,
            DELTA,
            MASK,
            SCALE,
            CORRECTED,
            BLOCK_OUT,
            BLOCK_COLUMNS,
            BLOCK_RANK,
        )
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        there = present[:, None] & (columns < IN)[None, :]
        values = tl.load(x + tokens[:, None] * IN + columns[None, :], mask=there, other=0.0)
        total = tl.dot(w, tl.trans(values), total)
    if BIAS:
        total += tl.load(bias + rows, mask=rows < OUT, other=0.0).to(tl.float32)[:, None]
    there = present[None, :] & (rows < OUT)[:, None]
    tl.store(y + tokens[None, :] * OUT + rows[:, None], total.to(y.dtype.element_ty), mask=there)


@_jit
def weight_kernel(
    made,
    weight,
    delta,
    masks,
    scales,
    correction_a,
    correction_b,
    ROUTE,
    OUT,
    IN,
    WIDTH,
    RANK,
    DELTA: tl.constexpr,
    MASK: tl.constexpr,
    SCALE: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    start = tl.program_id(0) * BLOCK_COLUMNS
    row_scales = _row_scales(scales, rows, ROUTE, OUT, SCALE, BLOCK_OUT)
    row_correction = _row_correction(correction_b, rows, ROUTE, OUT, RANK, CORRECTED, BLOCK_OUT, BLOCK_RANK)
    w = _weight_tile(
        weight,
        delta,
        masks,
        correction_a,
        row_scales,
        row_correction,
        rows,
        start,
        ROUTE,
        OUT,
        IN,
        WIDTH,
        RANK,
        DELTA,
        MASK,
        SCALE,
        CORRECTED,
        BLOCK_OUT,
        BLOCK_COLUMNS,
        BLOCK_RANK,
    )
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < OUT)[:, None] & (columns < IN)[None, :]
    tl.store(made + rows[:, None] * IN + columns[None, :], w, mask=inside)


# by the environment variable TRITON_INTERPRET=1, read when Triton is first imported: CPU tensors, slowly, for tests
INTERPRETED = triton is not None and not isinstance(multiply_kernel, triton.JITFunction)
