"""Blocks for the kernels, and the kernels with their outputs allocated."""

import numpy as np
import torch
from hypothesis import strategies as st

from merging_mmer import kernels
from merging_mmer.ties import relative

DTYPES = {kernels.BF16: torch.bfloat16, kernels.FP16: torch.float16, kernels.FP32: torch.float32}
METHODS = {"ties": kernels.TIES, "task_arithmetic": kernels.TASK_ARITHMETIC, "emr": kernels.EMR}
FORMATS = st.sampled_from(sorted(DTYPES))
# one entry, less and more than a byte of mask bits, and many of them
COLUMNS = (1, 7, 8, 9, 127, 128, 129, 255, 261, 1001)
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from(COLUMNS))
SEEDS = st.integers(0, 2**32 - 1)
SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1.2e-39, -1.2e-39, 6e-8, -6e-8, 0.5, -0.5, 1.0, -1.0, 65519.0, -65520.0, 1e38, -1e38],
    np.float32,
)
NO_MATRIX, NO_VECTOR, NO_MASK = np.empty((0, 0), np.float32), np.empty(0, np.float32), np.empty((0, 0), np.uint8)


def values(rng, *shape, special=0.3):
    """fp32 of many sizes, with zeros of both signs, subnormals, huge numbers, and magnitudes that occur again."""
    found = rng.normal(0, 1, shape).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 2, shape)
    found = np.where(rng.random(shape) < 0.4, np.round(found * 4) / 4, found)
    return np.where(rng.random(shape) < special, rng.choice(SPECIAL, shape), found).astype(np.float32)


def t(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def raw_of(tensor):
    """A tensor's own bits, as the kernels take them."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


def tensor_of(raw, fmt):
    return t(raw) if fmt == kernels.FP32 else t(raw.view(np.int16)).view(DTYPES[fmt])


def raw_like(shape, fmt):
    return np.empty(shape, np.float32 if fmt == kernels.FP32 else np.uint16)


def same_bits(found, expected):
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    assert found.dtype == expected.dtype and found.shape == expected.shape
    pattern = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(found.dtype.itemsize, found.dtype)
    np.testing.assert_array_equal(found.view(pattern), expected.view(pattern))


def widened(raw, fmt):
    out = np.empty(raw.shape, np.float32)
    kernels.widen(raw, fmt, out)
    return out


def merged_block(taus, weights, method, alpha, fmt, thresholds=None, quotas=None):
    """(τ* as stored, its numbers, the quotas left) of (E, R, C)."""
    experts = len(taus)
    thresholds = np.full(experts, -1, np.float32) if thresholds is None else np.array(thresholds, np.float32)
    quotas = np.zeros(experts, np.int64) if quotas is None else np.array(quotas, np.int64)
    shares = weights if method == "task_arithmetic" else relative(weights, experts)
    stored, merged = raw_like(taus.shape[1:], fmt), np.empty(taus.shape[1:], np.float32)
    shares = np.array(shares, np.float32)
    kernels.merge_block(taus, thresholds, quotas, shares, alpha, METHODS[method], fmt, stored, merged)
    return stored, merged, quotas


def masked(tau, merged, lam=1.0):
    packed, sums = np.empty((len(tau), (tau.shape[1] + 7) // 8), np.uint8), np.empty((len(tau), 2))
    kernels.mask_block(tau, merged, np.float32(lam), packed, sums)
    return packed, sums


def measured(tau, theta_0, merged, packed, scale, low_rank, fmt, kind):
    sums = np.empty((len(tau), 8))
    kernels.measure_block(tau, theta_0, merged, packed, scale, low_rank, fmt, kind, sums)
    return sums
