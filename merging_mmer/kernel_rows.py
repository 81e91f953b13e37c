"""Dense experts through a whole matrix in one kernel, on the values as they lie in their files.

Enters: θ₀ and the θ of up to three experts, 16-bit patterns of one format, C-contiguous, a multiple of eight columns,
and which rows to do. Leaves: what task_vector, merge_block, mask_block, conflicts_block, energy_block and, unless it
is to come later, measure_block of kernels.py give of them; and the magnitudes inside a bracket. Invariants: each bit
is that of those kernels, which go over blocks in fp32; τ never goes through the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from .kernel_bits import (  # isort: skip
    BF16, FP16, LANES, byte_of, conditions_of, counted, difference, floats, ints, load, nothing, pattern,
    plus_products, select, size_of, snapped, store, total, wide, widened,
)  # fmt: skip
from .kernel_compiler import F32, F64, I64, INLINE, U8, U16, array, check, kernel
from .kernel_methods import TIES, few, trimmed

__all__ = ["LATE", "MOST", "NO_SCALES", "ROW_SCALES", "Found", "between", "merge_rows"]

MOST = 3  # experts
# how experts are measured: with the mask alone, with scales that are found row by row, or later
NO_SCALES, ROW_SCALES, LATE = 0, 1, 2


# the k-th magnitude


@njit(**INLINE)
def _tau(theta, base, at, fmt):
    return difference(widened(load(theta, at, at + LANES), fmt), base)


@njit(**INLINE)
def _between(theta, theta_0, fmt, low, high, found, counts):
    last, above, on_high, on_low = 0, ints(0), ints(0), ints(0)
    sizes = np.empty(LANES, np.float32)
    for at in range(0, theta.size, LANES):
        size = size_of(_tau(theta, widened(load(theta_0, at, at + LANES), fmt), at, fmt))
        above = above - counted(size > floats(high))
        on_high = on_high - counted(size == floats(high))
        on_low = on_low - counted(size == floats(low))
        within = byte_of((size > floats(low)) & (floats(high) > size))
        if within:
            store(sizes, 0, LANES, size)
            for i in range(LANES):
                found[last] = sizes[i]
                last += within >> i & 1
    counts[0], counts[1], counts[2], counts[3] = total(above), total(on_high), total(on_low), last


@kernel((array(2, U16), array(2, U16), I64, F32, F32, array(1, F32, True), array(1, I64, True)))
def between(theta, theta_0, fmt, low, high, found, counts):
    """counts <- how many |θ - θ₀| are above `high`, equal to it, equal to `low`, and between the two.

    The last ones are put into `found`, which has room for one more than all, in memory order.
    """
    check(theta.shape == theta_0.shape and found.size > theta.size and theta.size % LANES == 0)
    check(counts.size == 4 and theta.size < 1 << 31)  # counted in lanes of 32 bits
    if fmt == BF16:
        _between(theta, theta_0, BF16, low, high, found, counts)
    else:
        _between(theta, theta_0, FP16, low, high, found, counts)


# merge, mask, measure


@njit(**INLINE)
def _gather(theta, theta_0, delta, packed, fits, sums, e, r, row, lam, fmt):
    """One expert's mask of row `row` of the matrix, which is row r of the block, and its sums, but for the error."""
    zero, one, factor = floats(np.float32(0.0)), floats(np.float32(1.0)), floats(lam)
    start, here = row * theta_0.shape[1], r * theta_0.shape[1]
    above, below, energy, kept, along = nothing(), nothing(), nothing(), nothing(), nothing()
    on, against, nonzero = ints(0), ints(0), ints(0)
    for byte in range(packed.shape[2]):
        at, to = start + byte * LANES, here + byte * LANES
        base = widened(load(theta_0, at, at + LANES), fmt)
        t, m = _tau(theta, base, at, fmt), widened(load(delta, to, to + LANES), fmt)
        up, down, m_up, m_down = t > zero, zero > t, m > zero, zero > m
        mask = ((up & m_up) | (down & m_down)) & (size_of(t) >= factor * size_of(m - t))
        packed[e, r, byte] = byte_of(mask)
        on, nonzero = on - counted(mask), nonzero - counted(up | down)
        against = against - counted((up & m_down) | (down & m_up))
        bit = select(mask, one, zero)
        wide_t, own = wide(t), wide(m * bit)
        above, below = plus_products(above, wide_t, own), plus_products(below, own, own)
        energy, along = plus_products(energy, wide_t, wide_t), plus_products(along, wide_t, wide(base))
        kept = plus_products(kept, wide(t * bit), wide_t)
    fits[e, row, 0], fits[e, row, 1] = total(above), total(below)
    sums[e, row, 0], sums[e, row, 1], sums[e, row, 7] = total(energy), total(kept), total(along)
    sums[e, row, 4], sums[e, row, 5], sums[e, row, 6] = total(on), total(against), total(nonzero)
    # what rounding θ₀ + τ to the format of θ costs: nothing. Where τ is θ - θ₀ exactly, the sum is θ. Where it is not,
    # the last place of θ is below that of τ, and the sum, a multiple of that place near θ, has no more places than
    # the format holds. Only of infinities no difference is left.
    sums[e, row, 3] = total(energy) * 0.0


@njit(**INLINE)
def _fit(sums, scales, e, row, fmt):
    """The row's least-squares factor, 1 where there is nothing to fit, rounded as it is stored."""
    above, below, at = sums[e, row, 0], sums[e, row, 1], e * sums.shape[1] + row
    fitted = above / below if below > 0 else 1.0
    store(scales, at, at + 1, widened(pattern(floats(np.float32(fitted)), fmt), fmt))


@njit(**INLINE)
def _error(theta, theta_0, delta, packed, e, r, row, scale, fmt):
    """Σ error² of row `row` of the matrix, which is row r of the block, after it was merged."""
    zero, one, s, wrong = floats(np.float32(0.0)), floats(np.float32(1.0)), floats(scale), nothing()
    start, here = row * theta_0.shape[1], r * theta_0.shape[1]
    for byte in range(packed.shape[2]):
        at, to = start + byte * LANES, here + byte * LANES
        base = widened(load(theta_0, at, at + LANES), fmt)
        own = widened(load(delta, to, to + LANES), fmt) * select(conditions_of(packed[e, r, byte]), one, zero)
        error = wide(snapped(base + own * s, fmt) - base - _tau(theta, base, at, fmt))
        wrong = plus_products(wrong, error, error)
    return total(wrong)


@njit(**INLINE)
def _rows(
    theta_0, a_raw, b_raw, c_raw, first, order, thresholds, quotas, shares, lams, alpha, method, fmt, kind, delta,
    packed, fits, scales, conflicts, energies, sums, trims, experts,
):  # fmt: skip
    none, zero = np.float32(0.0), floats(np.float32(0.0))
    rows, columns = delta.shape
    second, third = min(1, experts - 1), min(2, experts - 1)
    thetas = (a_raw, b_raw, c_raw)
    t, u, v = thresholds[0], thresholds[second], thresholds[third]
    p, q, s = quotas[0], quotas[second], quotas[third]
    x, y, z = floats(shares[0]), floats(shares[1] if experts > 1 else none), floats(shares[2] if experts > 2 else none)
    for r in range(rows):
        row, start, here = first + r, (first + r) * columns, r * columns
        energy, differ, several = nothing(), ints(0), ints(0)
        for place in range(0, columns, LANES):
            at, to = start + place, here + place
            base = widened(load(theta_0, at, at + LANES), fmt)
            wide_base = wide(base)
            energy = plus_products(energy, wide_base, wide_base)
            a = _tau(a_raw, base, at, fmt)
            b = c = zero
            if experts > 1:
                b = _tau(b_raw, base, at, fmt)
            if experts > 2:
                c = _tau(c_raw, base, at, fmt)
            kept_a, kept_b, kept_c = a, b, c
            if trims:
                kept_a, p = trimmed(a, t, p, LANES)
                if experts > 1:
                    kept_b, q = trimmed(b, u, q, LANES)
                if experts > 2:
                    kept_c, s = trimmed(c, v, s, LANES)
            stored = pattern(few(kept_a, kept_b, kept_c, x, y, z, experts, floats(alpha), method), fmt)
            store(delta, to, to + LANES, stored)
            if experts > 1:
                up, down = (a > zero) | (b > zero) | (c > zero), (zero > a) | (zero > b) | (zero > c)
                both = ((a != zero) & (b != zero)) | ((c != zero) & ((a != zero) | (b != zero)))
                differ, several = differ - counted(up & down), several - counted(both)
        energies[row], conflicts[row, 0], conflicts[row, 1] = total(energy), total(differ), total(several)
        for e in range(experts):
            _gather(thetas[e], theta_0, delta, packed, fits, sums, order[e], r, row, lams[e], fmt)
            if kind == ROW_SCALES:
                _fit(fits, scales, order[e], row, fmt)
            if kind != LATE:
                scale = scales[order[e], row] if kind == ROW_SCALES else np.float32(1.0)
                sums[order[e], row, 2] = _error(thetas[e], theta_0, delta, packed, order[e], r, row, scale, fmt)
    quotas[0] = p
    if experts > 1:
        quotas[1] = q
    if experts > 2:
        quotas[2] = s


_RAW = array(2, U16)


@kernel(
    (_RAW, _RAW, _RAW, _RAW, I64, I64, array(1, I64), array(1, F32), array(1, I64, True), array(1, F32))
    + (array(1, F32), F32, I64, I64, I64, array(2, U16, True), array(3, U8, True), array(3, F64, True))
    + (array(2, F32, True), array(2, I64, True), array(1, F64, True), array(3, F64, True))
)
def _merge_rows(
    theta_0, a, b, c, experts, first, order, thresholds, quotas, shares, lams, alpha, method, fmt, kind, delta,
    packed, fits, scales, conflicts, energies, sums,
):  # fmt: skip
    rows, columns = delta.shape
    all_rows = theta_0.shape[0]
    check(theta_0.shape[1] == columns and columns % LANES == 0 and 0 <= first and first + rows <= all_rows)
    for theta in (a, b, c):
        check(theta.shape[1] == columns and theta.shape[0] >= first + rows)
    check(1 <= experts and experts <= MOST and packed.shape == (experts, rows, columns // LANES))
    check(fits.shape == (experts, all_rows, 2) and sums.shape == (experts, all_rows, 8))
    check(conflicts.shape == (all_rows, 2) and energies.size == all_rows)
    check(kind != ROW_SCALES or scales.shape == (experts, all_rows))
    for each in (thresholds, shares, lams):
        check(each.size == experts)
    check(order.size == experts and quotas.size == experts)
    trims = False
    for e in range(experts):
        trims |= thresholds[e] >= 0
        check(0 <= order[e] and order[e] < experts)
    # the usual cases as constants, for which the compiler leaves out all else
    if experts == 3 and method == TIES and fmt == BF16 and not trims:
        _rows(
            theta_0, a, b, c, first, order, thresholds, quotas, shares, lams, alpha, TIES, BF16, kind, delta, packed,
            fits, scales, conflicts, energies, sums, False, 3,
        )  # fmt: skip
    elif experts == 3 and method == TIES and fmt == BF16:
        _rows(
            theta_0, a, b, c, first, order, thresholds, quotas, shares, lams, alpha, TIES, BF16, kind, delta, packed,
            fits, scales, conflicts, energies, sums, True, 3,
        )  # fmt: skip
    else:
        _rows(
            theta_0, a, b, c, first, order, thresholds, quotas, shares, lams, alpha, method, fmt, kind, delta, packed,
            fits, scales, conflicts, energies, sums, trims, experts,
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What `merge_rows` finds of a matrix of R rows: sums of its rows, float64, and scales as they are stored.

    fits (E, R, 2) as `mask_block` has them, sums (E, R, 8) as `measure_block`, scales (E, R) fp32, conflicts (R, 2)
    int64, energy (R,).
    """

    fits: np.ndarray
    sums: np.ndarray
    scales: np.ndarray
    conflicts: np.ndarray
    energy: np.ndarray


def merge_rows(
    theta_0: np.ndarray, thetas: Sequence[np.ndarray], first: int, thresholds: np.ndarray, quotas: np.ndarray,
    shares: np.ndarray, lams: np.ndarray, alpha: float, method: int, fmt: int, kind: int, delta: np.ndarray,
    packed: np.ndarray, found: Found,
):  # fmt: skip
    """The rows from `first` on, as many as `delta` has, of matrices that lie in their files whole.

    theta_0 and thetas: raw, of up to `MOST` experts, a multiple of eight columns. delta (r, C) <- τ* as it is stored,
    packed (E, r, C / 8) <- masks, and into `found` what those rows give. kind: ROW_SCALES fits them and measures with
    them, NO_SCALES measures without; LATE measures no error, and leaves `sums` and `scales` to others. The rest is as
    in `merge_block` and `mask_block`.
    """
    if not len(thetas) == len(thresholds) == len(quotas) == len(shares) == len(lams) or not 0 < len(thetas) <= MOST:
        raise ValueError(
            f"{len(thetas)} experts with {len(thresholds)} thresholds, {len(quotas)} quotas, {len(shares)} shares and "
            f"{len(lams)} lambdas: expected one of each for every expert, of which there may be {MOST}"
        )
    order = np.argsort(shares, kind="stable")
    three = [thetas[e] for e in order]
    three += [theta_0] * (MOST - len(three))
    left = quotas[order]
    _merge_rows(
        theta_0, *three, len(thetas), first, order, thresholds[order], left, shares[order], lams[order], alpha,
        method, fmt, kind, delta, packed, found.fits, found.scales, found.conflicts, found.energy, found.sums,
    )  # fmt: skip
    quotas[order] = left
