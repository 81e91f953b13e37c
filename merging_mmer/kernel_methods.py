"""One merged vector as the kernels make it: trim, and the three methods of ties.py.

Enters: task vectors (E, R, C), and thresholds, quotas and shares in the order of rising shares. Leaves: τ* (R, C), as
it is stored and as its numbers. Invariant: the terms of a sum of three or more are added in rising order, so that the
result does not depend on the order of the experts.
"""

import numpy as np
from numba import njit

from .kernel_bits import (
    FP32,
    LANES,
    bits,
    byte_of,
    conditions_of,
    floats,
    inside,
    ints,
    load,
    numbers,
    pattern,
    select,
    size_of,
    store,
    widened,
)
from .kernel_compiler import INLINE

TIES, TASK_ARITHMETIC, EMR = 0, 1, 2


@njit(**INLINE)
def trimmed(x, threshold, quota, left):
    """(τ̂, the quota left): |τ| above the threshold, and the first `quota` of those equal to it.

    `left` entries lie before the end of the row. A threshold below 0 trims nothing.
    """
    if threshold < 0:
        return x, quota
    size = size_of(x)
    keep = byte_of(size > floats(threshold))
    equal = byte_of(size == floats(threshold)) & inside(left)
    if equal and quota > 0:
        for i in range(LANES):
            if quota > 0 and equal >> i & 1:
                keep |= 1 << i
                quota -= 1
    return select(conditions_of(keep), x, floats(np.float32(0.0))), quota


@njit(**INLINE)
def _lower(a, b):
    return select(a > b, b, a)


@njit(**INLINE)
def _upper(a, b):
    return select(a > b, a, b)


@njit(**INLINE)
def _agreeing(x, sign):
    """|x| where x has the sign, else 0."""
    return _upper(numbers(bits(x) ^ sign), floats(np.float32(0.0)))


@njit(**INLINE)
def _counted(x, sign, share):
    """The share where x has the sign, else 0."""
    zero = floats(np.float32(0.0))
    return select(numbers(bits(x) ^ sign) > zero, share, zero)


@njit(**INLINE)
def _signed(size, sign, summed, alpha):
    """alpha times the number of that size and sign, 0 where no sign was elected."""
    zero = floats(np.float32(0.0))
    return select(summed != zero, numbers(bits(size) ^ sign), zero) * alpha


@njit(**INLINE)
def _mean(agreeing, counted):
    zero = floats(np.float32(0.0))
    return agreeing / select(counted > zero, counted, floats(np.float32(1.0)))


@njit(**INLINE)
def few(a, b, c, u, v, w, experts, alpha, method):
    """τ* of up to three experts with the entries a, b, c and the shares u <= v <= w, 0 for one that is not there."""
    x, y, z = a * u, b * v, c * w
    if experts > 2:  # sort
        x, y = _lower(x, y), _upper(x, y)
        y, z = _lower(y, z), _upper(y, z)
        x, y = _lower(x, y), _upper(x, y)
    summed = x
    if experts > 1:
        summed = summed + y
    if experts > 2:
        summed = summed + z
    if method == TASK_ARITHMETIC:
        return summed * alpha
    sign = bits(summed) & ints(0x80000000)
    if method == EMR:
        size = _upper(_upper(_agreeing(a, sign), _agreeing(b, sign)), _agreeing(c, sign))
        return _signed(size, sign, summed, alpha)
    # the terms that agree, the others as 0, are in order as they stand
    agreeing, counted = _agreeing(x, sign), _counted(a, sign, u)
    if experts > 1:
        agreeing, counted = agreeing + _agreeing(y, sign), counted + _counted(b, sign, v)
    if experts > 2:
        agreeing, counted = agreeing + _agreeing(z, sign), counted + _counted(c, sign, w)
    return _signed(_mean(agreeing, counted), sign, summed, alpha)


@njit(**INLINE)
def _write(found, fmt, raw, merged, at, stop):
    if fmt == FP32:
        store(merged, at, stop, found)
    else:
        stored = pattern(found, fmt)
        store(raw, at, stop, stored)
        store(merged, at, stop, widened(stored, fmt))


@njit(**INLINE)
def few_experts(taus, order, thresholds, quotas, shares, alpha, method, fmt, raw, merged, trims, experts):
    """τ* of blocks (E, R, C) of up to three experts, all in registers."""
    rows, columns = merged.shape
    size = rows * columns
    first, second, third = order[0] * size, order[min(1, experts - 1)] * size, order[min(2, experts - 1)] * size
    none = np.float32(0.0)
    t, u, v = thresholds[0], thresholds[min(1, experts - 1)], thresholds[min(2, experts - 1)]
    p, q, s = quotas[0], quotas[min(1, experts - 1)], quotas[min(2, experts - 1)]
    x, y, z = (
        floats(shares[0]),
        floats(shares[1] if experts > 1 else none),
        floats(shares[2] if experts > 2 else none),
    )
    for r in range(rows):
        stop = (r + 1) * columns
        for at in range(r * columns, stop, LANES):
            b = c = floats(none)
            a = load(taus, first + at, first + stop)
            if experts > 1:
                b = load(taus, second + at, second + stop)
            if experts > 2:
                c = load(taus, third + at, third + stop)
            if trims:
                a, p = trimmed(a, t, p, stop - at)
                if experts > 1:
                    b, q = trimmed(b, u, q, stop - at)
                if experts > 2:
                    c, s = trimmed(c, v, s, stop - at)
            _write(few(a, b, c, x, y, z, experts, floats(alpha), method), fmt, raw, merged, at, stop)
    quotas[0] = p
    if experts > 1:
        quotas[1] = q
    if experts > 2:
        quotas[2] = s


@njit(**INLINE)
def many_experts(taus, order, thresholds, quotas, shares, alpha, method, fmt, raw, merged, trims):
    """τ* of blocks (E, R, C) of any number of experts.

    No array is handed to another function inside the loops, where numba would count the reference for each eight
    numbers; and none is sorted in place, which ends in slow masked stores.
    """
    experts, rows, columns = taus.shape
    entries, ordered = np.empty(experts * LANES, np.float32), np.empty(experts * LANES, np.float32)
    terms = np.empty(2 * experts * LANES, np.float32)
    zero, factor = floats(np.float32(0.0)), floats(alpha)
    for r in range(rows):
        stop = (r + 1) * columns
        for at in range(r * columns, stop, LANES):
            for e in range(experts):
                first, i = order[e] * rows * columns, e * LANES
                own = load(taus, first + at, first + stop)
                if trims:
                    own, quotas[e] = trimmed(own, thresholds[e], quotas[e], stop - at)
                store(entries, i, i + LANES, own)
                store(terms, i, i + LANES, own * floats(shares[e]))
            source, target = 0, experts * LANES
            summed = floats(np.float32(-0.0))  # what a sum begins with that is to be -0 where all terms are
            for done in range(experts):  # the least of the terms that are left; the others go to the other half
                least = load(terms, source, source + LANES)
                for i in range(LANES, (experts - done) * LANES, LANES):
                    term, to = load(terms, source + i, source + i + LANES), target + i - LANES
                    store(terms, to, to + LANES, _upper(least, term))
                    least = _lower(least, term)
                store(ordered, done * LANES, (done + 1) * LANES, least)
                summed = summed + least
                source, target = target, source
            sign = bits(summed) & ints(0x80000000)
            size = counted = zero
            if method == EMR:
                for i in range(0, experts * LANES, LANES):
                    size = _upper(size, _agreeing(load(entries, i, i + LANES), sign))
            elif method == TIES:
                for e in range(experts):
                    i = e * LANES
                    size = size + _agreeing(load(ordered, i, i + LANES), sign)
                    counted = counted + _counted(load(entries, i, i + LANES), sign, floats(shares[e]))
                size = _mean(size, counted)
            found = summed * factor if method == TASK_ARITHMETIC else _signed(size, sign, summed, factor)
            _write(found, fmt, raw, merged, at, stop)
