"""The arithmetic of the merge as compiled kernels: one block of rows in, numbers out, no temporary tensor.

Enters: NumPy blocks (R, C), C-contiguous, of a size that the processor's cache holds; tensors on disk as `raw`: their
16-bit patterns (uint16) or fp32. Leaves: what the functions of ties.py, masks.py, task_vectors.py, matrices.py and
report.py give, written into arrays of the caller. Invariants: fp32 results are bit for bit those of these functions;
a sum is gathered in fp64 row by row in one fixed pattern, so that neither the block nor the thread shows in it. All
kernels let other threads run.
"""

import numpy as np
from numba import njit

from .kernel_bits import (  # isort: skip
    BF16, FP16, FP32, LANES, bits, byte_of, conditions_of, count, counted, difference, floats, inside, ints, load,
    nothing, plus_products, select, size_of, snapped, store, total, wide, widened,
)  # fmt: skip
from .kernel_compiler import F32, F64, I64, INLINE, U8, U16, U32, array, check, kernel
from .kernel_methods import EMR, TASK_ARITHMETIC, TIES, few_experts, many_experts
from .kernel_rows import LATE, MOST, NO_SCALES, ROW_SCALES, Found, between, merge_rows

__all__ = [
    "BF16", "FP16", "FP32", "LANES", "MOST", "TIES", "TASK_ARITHMETIC", "EMR", "MASKED", "LOW_RANK", "STATIC",
    "NO_SCALES", "ROW_SCALES", "LATE", "Found", "widen", "task_vector", "count_broken", "histogram", "collect",
    "count_equal", "between", "merge_block", "mask_block", "measure_block", "residual_block", "conflicts_block",
    "energy_block", "merge_rows",
]  # fmt: skip

MASKED, LOW_RANK, STATIC = 0, 1, 2

_NO_PATTERNS = np.empty((0, 0), np.uint16)


# formats


@kernel((array(2, U16), I64, array(2, F32, True)))
def _widen(raw, fmt, out):
    check(raw.shape == out.shape)
    rows, columns = raw.shape
    for r in range(rows):
        stop = (r + 1) * columns
        for at in range(r * columns, stop, LANES):
            store(out, at, stop, widened(load(raw, at, stop), fmt))


def widen(raw: np.ndarray, fmt: int, out: np.ndarray):
    """raw -> the same numbers in fp32."""
    if fmt == FP32:
        np.copyto(out, raw)
    else:
        _widen(raw, fmt, out)


@kernel((array(2, U16), I64), (array(2, U32), I64))
def _count_broken(patterns, special):
    broken = 0
    for at in range(0, patterns.size, LANES):
        broken += count(load(patterns, at, patterns.size) & ints(special) == ints(special))
    return broken


_EXPONENTS = {BF16: 0x7F80, FP16: 0x7C00, FP32: 0x7F800000}


def count_broken(raw: np.ndarray, fmt: int) -> int:
    """How many entries are infinite or not a number: all bits of the exponent are set."""
    return _count_broken(raw.view(np.uint32) if fmt == FP32 else raw, _EXPONENTS[fmt])


@kernel((array(2, U16), array(2, U16), I64, I64, array(2, F32, True)))
def _task_vector_16(theta, theta_0, fmt, special, out):
    check(theta.shape == theta_0.shape and theta.shape == out.shape)
    broken, stop = 0, theta.size
    for at in range(0, stop, LANES):
        raw = load(theta, at, stop)
        broken += count(raw & ints(special) == ints(special))
        store(out, at, stop, difference(widened(raw, fmt), widened(load(theta_0, at, stop), fmt)))
    return broken


@kernel((array(2, F32), array(2, F32), I64, array(2, F32, True)))
def _task_vector_32(theta, theta_0, special, out):
    check(theta.shape == theta_0.shape and theta.shape == out.shape)
    broken, stop = 0, theta.size
    for at in range(0, stop, LANES):
        x = load(theta, at, stop)
        broken += count(bits(x) & ints(special) == ints(special))
        store(out, at, stop, difference(x, load(theta_0, at, stop)))
    return broken


def task_vector(theta: np.ndarray, theta_0: np.ndarray, fmt: int, out: np.ndarray) -> int:
    """out <- θ - θ₀, both raw of one format. Returns how many entries of θ are infinite or not a number."""
    if fmt == FP32:
        return _task_vector_32(theta, theta_0, _EXPONENTS[fmt], out)
    return _task_vector_16(theta, theta_0, fmt, _EXPONENTS[fmt], out)


# the k-th magnitude


@kernel((array(2, F32), array(1, I64, True)))
def histogram(tau, counts):
    """counts (32768,) += the upper 16 bits of |τ|, which are ordered as the magnitudes are."""
    check(counts.size == 1 << 15)
    patterns = tau.view(np.uint32)
    for r in range(tau.shape[0]):
        row = patterns[r]
        for j in range(row.size):
            counts[row[j] >> 16 & 0x7FFF] += 1


@kernel((array(2, F32), I64, array(1, U16, True)))
def collect(tau, bin, low):
    """low[:n] <- the lower 16 bits of the entries whose upper ones are `bin`, in memory order. Returns n."""
    patterns = tau.view(np.uint32)
    check(low.size >= tau.size)
    found = 0
    for r in range(tau.shape[0]):
        row = patterns[r]
        for j in range(row.size):
            low[found] = row[j]
            found += row[j] >> 16 & 0x7FFF == bin
    return found


@kernel((array(2, F32), F32))
def count_equal(tau, threshold):
    """How many entries have the magnitude `threshold`."""
    equal, stop = 0, tau.size
    for at in range(0, stop, LANES):
        found = byte_of(size_of(load(tau, at, stop)) == floats(threshold))
        equal += count(conditions_of(found & inside(stop - at)))
    return equal


# one merged vector


@kernel(
    (array(3, F32), array(1, I64), array(1, F32), array(1, I64, True), array(1, F32), F32, I64, I64)
    + (array(2, U16, True), array(2, F32, True))
)
def _merge(taus, order, thresholds, quotas, shares, alpha, method, fmt, raw, merged):
    """`merge_block`, of which thresholds, quotas and shares are given by rising share; `order` is that order."""
    experts, rows, columns = taus.shape
    check(merged.shape == (rows, columns) and (fmt == FP32 or raw.shape == merged.shape))
    trims = False
    for e in range(experts):
        trims |= thresholds[e] >= 0
    # the usual cases as constants, for which the compiler leaves out all else
    if experts == 3 and method == TIES and not trims:
        few_experts(taus, order, thresholds, quotas, shares, alpha, TIES, fmt, raw, merged, False, 3)
    elif experts == 2 and method == TIES and not trims:
        few_experts(taus, order, thresholds, quotas, shares, alpha, TIES, fmt, raw, merged, False, 2)
    elif experts <= 3:
        few_experts(taus, order, thresholds, quotas, shares, alpha, method, fmt, raw, merged, trims, experts)
    else:
        many_experts(taus, order, thresholds, quotas, shares, alpha, method, fmt, raw, merged, trims)


def merge_block(
    taus: np.ndarray,
    thresholds: np.ndarray,
    quotas: np.ndarray,
    shares: np.ndarray,
    alpha: float,
    method: int,
    fmt: int,
    merged_raw: np.ndarray,
    merged: np.ndarray,
):
    """Trim, merge and round: (E, R, C) -> τ* as it is stored, `merged_raw`, and its numbers, `merged`, both (R, C).

    A threshold below 0 trims nothing. `quotas`, how many entries equal to the threshold may stay, is used up here.
    `shares`: the weights over their largest, or for task arithmetic the weights. `taus` stays as it is. A sum of
    zeros of both signs is +0.
    """
    if not len(taus) == len(thresholds) == len(quotas) == len(shares) > 0:
        raise ValueError(
            f"{len(taus)} task vectors with {len(thresholds)} thresholds, {len(quotas)} quotas and {len(shares)} "
            "shares: expected one of each for every task vector"
        )
    order = np.argsort(shares, kind="stable")
    left = quotas[order]
    raw = _NO_PATTERNS if fmt == FP32 else merged_raw
    _merge(taus, order, thresholds[order], left, shares[order], alpha, method, fmt, raw, merged)
    quotas[order] = left
    if fmt == FP32:
        np.copyto(merged_raw, merged)


# each expert's own


@njit(**INLINE)
def _bytes(columns):
    return (columns + LANES - 1) // LANES


@kernel((array(2, F32), array(2, F32), F32, array(2, U8, True), array(2, F64, True)))
def mask_block(tau, merged, lam, packed, sums):
    """m of `decouple`, packed (R, ceil(C / 8)), and of each row Σ τ·(m·τ*) and Σ (m·τ*)²: sums (R, 2)."""
    zero, one, factor = floats(np.float32(0.0)), floats(np.float32(1.0)), floats(lam)
    rows, columns = tau.shape
    check(merged.shape == tau.shape and packed.shape == (rows, _bytes(columns)) and sums.shape == (rows, 2))
    for r in range(rows):
        start, stop, to = r * columns, (r + 1) * columns, packed[r]
        above, below = nothing(), nothing()
        for byte in range(to.size):
            at = start + byte * LANES
            t, m = load(tau, at, stop), load(merged, at, stop)
            one_sign = ((t > zero) & (m > zero)) | ((zero > t) & (zero > m))
            mask = one_sign & (size_of(t) >= factor * size_of(m - t))
            to[byte] = byte_of(mask)
            kept = wide(m * select(mask, one, zero))
            above, below = plus_products(above, wide(t), kept), plus_products(below, kept, kept)
        sums[r, 0], sums[r, 1] = total(above), total(below)


@kernel((array(2, F32), array(2, F32), array(2, U8), array(1, F32), array(2, F32, True)))
def residual_block(tau, merged, packed, scale, out):
    """out <- τ - s·(m·τ*). `scale` (R,), or (0,) for 1 everywhere."""
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    rows, columns = tau.shape
    check(merged.shape == tau.shape and out.shape == tau.shape and packed.shape == (rows, _bytes(columns)))
    check(scale.size == 0 or scale.size == rows)
    for r in range(rows):
        start, stop, bits_of = r * columns, (r + 1) * columns, packed[r]
        s = floats(scale[r] if scale.size else np.float32(1.0))
        for byte in range(bits_of.size):
            at = start + byte * LANES
            mask = conditions_of(bits_of[byte])
            own = select(mask, one, zero) * load(merged, at, stop) * s
            store(out, at, stop, load(tau, at, stop) - own)


@njit(**INLINE)
def _measure(tau, theta_0, merged, packed, scale, low_rank, fmt, kind, corrected, sums):
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    rows, columns = tau.shape
    for r in range(rows):
        start, stop = r * columns, (r + 1) * columns
        bits_of = packed[r if kind == MASKED else 0]
        s = floats(scale[r] if scale.size else np.float32(1.0))
        energy, kept, wrong, rounded, along = nothing(), nothing(), nothing(), nothing(), nothing()
        on, against, nonzero = 0, ints(0), ints(0)
        for byte in range(_bytes(columns)):
            at = start + byte * LANES
            t, b, m = load(tau, at, stop), load(theta_0, at, stop), load(merged, at, stop)
            wide_t = wide(t)
            energy = plus_products(energy, wide_t, wide_t)
            along = plus_products(along, wide_t, wide(b))
            changed = t != zero
            nonzero = nonzero - counted(changed)
            against = against - counted(changed & (m != zero) & (ints(0) > bits(t) ^ bits(m)))
            if kind == MASKED:
                mask = conditions_of(bits_of[byte])
                on += count(mask)
                own = select(mask, one, zero)
                kept = plus_products(kept, wide(t * own), wide_t)
                recovered = m * own * s
                if corrected:
                    recovered = recovered + load(low_rank, at, stop)
            elif kind == LOW_RANK:
                recovered = load(low_rank, at, stop)
            else:
                recovered = m
            error = wide(snapped(snapped(b, fmt) + recovered, fmt) - b - t)
            wrong = plus_products(wrong, error, error)
            rounding = wide(snapped(b + t, fmt) - b - t)
            rounded = plus_products(rounded, rounding, rounding)
        sums[r, 0], sums[r, 1], sums[r, 2], sums[r, 3] = total(energy), total(kept), total(wrong), total(rounded)
        sums[r, 4], sums[r, 5], sums[r, 6], sums[r, 7] = on, total(against), total(nonzero), total(along)


@kernel((*[array(2, F32)] * 3, array(2, U8), array(1, F32), array(2, F32), I64, I64, array(2, F64, True)))
def measure_block(tau, theta_0, merged, packed, scale, low_rank, fmt, kind, sums):
    """What the merge did to one expert in these rows, as `Measurement.one` has it.

    sums (R, 8): Σ τ², Σ τ²·m, Σ error², Σ rounding², Σ m, entries of opposite signs in τ and τ*, entries of τ that
    are not 0, Σ τ·θ₀. The recovered vector is by `kind` s·(m·τ*) + BA (MASKED; `scale` (0,) and `low_rank` (0, 0)
    where there is none), BA alone (LOW_RANK), or τ* (STATIC).
    """
    rows, columns = tau.shape
    corrected = kind == LOW_RANK or low_rank.size > 0
    check(theta_0.shape == tau.shape and merged.shape == tau.shape and sums.shape == (rows, 8))
    check(kind != MASKED or packed.shape == (rows, _bytes(columns)))
    check(not corrected or low_rank.shape == tau.shape)
    check(scale.size == 0 or scale.size == rows)
    # the usual cases as constants, for which the compiler leaves out all else
    if fmt == BF16 and kind == MASKED:
        _measure(tau, theta_0, merged, packed, scale, low_rank, BF16, MASKED, corrected, sums)
    elif fmt == FP16 and kind == MASKED:
        _measure(tau, theta_0, merged, packed, scale, low_rank, FP16, MASKED, corrected, sums)
    else:
        _measure(tau, theta_0, merged, packed, scale, low_rank, fmt, kind, corrected, sums)


# experts beside one another


@kernel((array(3, F32), array(2, I64, True)))
def conflicts_block(taus, sums):
    """Of each row: entries where experts disagree in sign, and entries that two or more changed: sums (R, 2)."""
    zero = floats(np.float32(0.0))
    experts, rows, columns = taus.shape
    check(sums.shape == (rows, 2))
    for r in range(rows):
        conflicts = shared = 0
        stop = (r + 1) * columns
        for at in range(r * columns, stop, LANES):
            up = down = several = 0
            for e in range(experts):
                t = load(taus, e * rows * columns + at, e * rows * columns + stop)
                above, below = byte_of(t > zero), byte_of(zero > t)
                several |= (up | down) & (above | below)
                up |= above
                down |= below
            conflicts += count(conditions_of(up & down))
            shared += count(conditions_of(several))
        sums[r, 0], sums[r, 1] = conflicts, shared


@kernel((array(2, F32), array(1, F64, True)))
def energy_block(theta_0, sums):
    """Σ θ₀² of each row: sums (R,)."""
    rows, columns = theta_0.shape
    check(sums.size == rows)
    for r in range(rows):
        stop, energy = (r + 1) * columns, nothing()
        for at in range(r * columns, stop, LANES):
            x = wide(load(theta_0, at, stop))
            energy = plus_products(energy, x, x)
        sums[r] = total(energy)
