"""The compiled kernels: formats, the k-th magnitude, what they refuse, and that neither block nor thread shows."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core.caching import CacheImpl

from merging_mmer import kernel_compiler, kernels
from merging_mmer.task_vectors import task_vector
from merging_mmer.ties import kept_count

from .kernel_blocks import (
    DTYPES,
    FORMATS,
    NO_MASK,
    NO_MATRIX,
    NO_VECTOR,
    SEEDS,
    SHAPES,
    masked,
    measured,
    merged_block,
    raw_of,
    same_bits,
    t,
    tensor_of,
    values,
    widened,
)

# formats


@pytest.mark.parametrize("fmt", [kernels.BF16, kernels.FP16])
def test_every_16_bit_number_is_widened_exactly(fmt):
    raw = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    expected = tensor_of(raw, fmt).float().numpy()
    found = widened(raw, fmt)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    same_bits(np.where(np.isnan(found), np.float32(0), found), np.where(np.isnan(expected), np.float32(0), expected))
    assert kernels.count_broken(raw, fmt) == int((~np.isfinite(expected)).sum()) > 0


@pytest.mark.parametrize("fmt", sorted(DTYPES))
def test_rounding_to_a_format_is_torchs(fmt):
    """Of every 16-bit number, the midpoints between two of them and their neighbours, and random patterns."""
    rng = np.random.default_rng(0)
    patterns = [rng.integers(0, 1 << 32, 1 << 17, dtype=np.uint32)]
    for of in (kernels.BF16, kernels.FP16):
        exact = widened(np.arange(1 << 16, dtype=np.uint16).reshape(1, -1), of).view(np.uint32)[0]
        half = 0x8000 if of == kernels.BF16 else 0x1000
        patterns += [exact, *(exact + np.uint32(half + near) for near in (-1, 0, 1))]
    # multiples of a half of the smallest fp16 number
    patterns.append((np.arange(4096, dtype=np.float32) * np.float32(2.0**-25)).view(np.uint32))
    taus = np.concatenate(patterns)[None, None].view(np.float32)
    stored, merged, _ = merged_block(taus, [1.0], "task_arithmetic", 1.0, fmt)
    expected = t(taus[0]).to(DTYPES[fmt])
    broken = torch.isnan(expected).numpy()
    np.testing.assert_array_equal(np.isnan(merged), broken)
    np.testing.assert_array_equal(np.isnan(tensor_of(stored, fmt).float().numpy()), broken)
    same_bits(stored[~broken], raw_of(expected)[~broken])
    same_bits(merged[~broken], expected.float().numpy()[~broken])


@settings(max_examples=60, deadline=None)
@given(SEEDS, SHAPES, FORMATS)
def test_the_task_vector_is_torchs(seed, shape, fmt):
    rng = np.random.default_rng(seed)
    theta_0 = t(values(rng, *shape)).to(DTYPES[fmt])
    theta = torch.where(t(rng.random(shape) < 0.4), theta_0, t(values(rng, *shape)).to(DTYPES[fmt]))
    theta, theta_0 = (torch.where(x.isinf(), 1.0, x) for x in (theta, theta_0))
    out = np.empty(shape, np.float32)
    assert kernels.task_vector(raw_of(theta), raw_of(theta_0), fmt, out) == 0
    same_bits(out, task_vector(theta, theta_0))


def test_equal_entries_have_a_task_vector_of_plus_zero():
    for fmt, dtype in DTYPES.items():
        out = np.empty((1, 4), np.float32)
        theta, theta_0 = torch.tensor([[0.0, -0.0, -0.0, 3.0]]), torch.tensor([[-0.0, 0.0, -0.0, 3.0]])
        kernels.task_vector(raw_of(theta.to(dtype)), raw_of(theta_0.to(dtype)), fmt, out)
        same_bits(out, np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("fmt", sorted(DTYPES))
def test_broken_entries_are_counted(fmt):
    theta = torch.ones(3, 300).to(DTYPES[fmt])
    theta[0, 0], theta[1, 299], theta[2, 128] = math.inf, -math.inf, math.nan
    out = np.empty((3, 300), np.float32)
    ones = raw_of(torch.ones(3, 300).to(DTYPES[fmt]))
    assert kernels.task_vector(raw_of(theta), ones, fmt, out) == kernels.count_broken(raw_of(theta), fmt) == 3
    assert kernels.count_broken(ones, fmt) == 0


def test_blocks_that_can_not_be_written_are_read():
    raw = np.ones((2, 9), np.uint16)
    raw.setflags(write=False)
    assert widened(raw, kernels.FP16).tolist() == [[2.0**-24] * 9] * 2


def test_a_block_of_another_type_is_refused():
    with pytest.raises(TypeError):
        kernels.energy_block(np.ones((2, 3)), np.empty(2))
    with pytest.raises(TypeError):
        kernels.widen(np.ones((2, 3), np.int32), kernels.BF16, np.empty((2, 3), np.float32))


def test_blocks_that_do_not_belong_together_are_refused():
    a, wide, one = np.zeros((2, 9), np.float32), np.zeros((2, 10), np.float32), np.ones(1, np.float32)
    raw, packed, sums = np.zeros((2, 9), np.uint16), np.zeros((2, 2), np.uint8), np.zeros((2, 2))
    calls = [
        lambda: kernels.widen(raw, kernels.BF16, wide),
        lambda: kernels.task_vector(raw, raw, kernels.BF16, wide),
        lambda: kernels.task_vector(a, wide, kernels.FP32, a),
        lambda: kernels.histogram(a, np.zeros(1 << 16, np.int64)),
        lambda: kernels.collect(a, 0, np.zeros(17, np.uint16)),
        lambda: kernels.merge_block(a[None], -one, np.zeros(1, np.int64), one, 1.0, 0, kernels.FP32, wide, wide),
        lambda: kernels.mask_block(a, wide, 1.0, packed, sums),
        lambda: kernels.mask_block(a, a, 1.0, packed[:, :1].copy(), sums),
        lambda: kernels.residual_block(a, a, packed, np.ones(3, np.float32), a),
        lambda: measured(a, a, a, NO_MASK, NO_VECTOR, NO_MATRIX, kernels.BF16, kernels.MASKED),
        lambda: measured(a, a, a, packed, NO_VECTOR, wide, kernels.BF16, kernels.MASKED),
        lambda: measured(a, a, a, NO_MASK, NO_VECTOR, NO_MATRIX, kernels.BF16, kernels.LOW_RANK),
        lambda: kernels.conflicts_block(a[None], np.zeros((1, 2), np.int64)),
        lambda: kernels.energy_block(a, np.zeros(3)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="differ in their rows or columns"):
            call()
    with pytest.raises(ValueError, match="1 task vectors with 2 thresholds, 2 quotas and 1 shares"):
        merged_block(a[None], [1.0], "ties", 1.0, kernels.FP32, thresholds=[-1.0, -1.0], quotas=[0, 0])


# the k-th magnitude


@settings(max_examples=40, deadline=None)
@given(SEEDS, SHAPES, st.floats(0.01, 0.99))
def test_histogram_and_collect_find_the_kth_magnitude(seed, shape, density):
    tau = values(np.random.default_rng(seed), *shape)
    counts, low = np.zeros(1 << 15, np.int64), np.empty(tau.size, np.uint16)
    kernels.histogram(tau, counts)
    assert counts.sum() == tau.size
    kept = kept_count(tau.size, density)
    above, bin_ = 0, len(counts) - 1
    while above + counts[bin_] < kept:
        above, bin_ = above + counts[bin_], bin_ - 1
    found = kernels.collect(tau, bin_, low)
    bits = np.abs(tau).view(np.uint32).ravel()
    assert low[:found].tolist() == (bits[bits >> 16 == bin_] & 0xFFFF).tolist()
    lowest = np.sort(low[:found])[::-1][kept - above - 1]
    threshold = np.array([bin_ << 16 | int(lowest)], np.uint32).view(np.float32)[0]
    assert threshold == np.sort(np.abs(tau).ravel())[tau.size - kept]
    assert kernels.count_equal(tau, threshold) == int((np.abs(tau) == threshold).sum())
    kernels.histogram(tau, counts)
    assert counts.sum() == 2 * tau.size


# the block, the thread


def everything(theta, theta_0, fmt, rows):
    """All that the kernels give of some rows of three experts' matrices."""
    theta_0 = np.ascontiguousarray(theta_0[rows])
    taus = np.empty((len(theta), *theta_0.shape), np.float32)
    for e, one in enumerate(theta):
        kernels.task_vector(np.ascontiguousarray(one[rows]), theta_0, fmt, taus[e])
    start = widened(theta_0, fmt)
    stored, merged, _ = merged_block(taus, [1.0, 0.5, 0.8], "ties", 0.9, fmt)
    parts = [stored, merged]
    for tau in taus:
        packed, sums = masked(tau, merged)
        scale = np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1e-300), 1.0).astype(np.float32)
        residual = np.empty_like(tau)
        kernels.residual_block(tau, merged, packed, scale, residual)
        parts += [packed, sums, scale, residual]
        parts.append(measured(tau, start, merged, packed, scale, residual, fmt, kernels.MASKED))
    conflicts, energy = np.empty((len(start), 2), np.int64), np.empty(len(start))
    kernels.conflicts_block(taus, conflicts)
    kernels.energy_block(start, energy)
    return [*parts, conflicts, energy]


@pytest.mark.parametrize("fmt", sorted(DTYPES))
@pytest.mark.parametrize("columns", [9, 1001])
def test_neither_the_block_nor_the_thread_shows(fmt, columns):
    rng = np.random.default_rng(3)
    theta_0 = rng.normal(0, 1, (24, columns)).astype(np.float32)
    theta = [
        raw_of(t(theta_0 + rng.normal(0, 0.1, theta_0.shape).astype(np.float32)).to(DTYPES[fmt])) for _ in range(3)
    ]
    theta_0 = raw_of(t(theta_0).to(DTYPES[fmt]))
    whole = everything(theta, theta_0, fmt, slice(None))
    for rows in (1, 7):
        blocks = [slice(first, first + rows) for first in range(0, 24, rows)]
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda block: everything(theta, theta_0, fmt, block), blocks))
        for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
            same_bits(np.concatenate(found), expected)


# compiled code


def test_kernels_work_without_a_folder_to_keep_them_in(monkeypatch):
    def double(x):
        return 2 * x

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        njit([(kernel_compiler.F64,)], cache=True)(double)
    assert kernel_compiler._compiled(double, [(kernel_compiler.F64,)])(1.5) == 3.0


def test_kept_code_is_that_of_its_sources(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(kernel_compiler, "__file__", str(tmp_path / "kernel_compiler.py"))
    for text in ("1", "2", "1"):
        (tmp_path / "kernel_bits.py").write_text(text)
        kernel_compiler._sources.cache_clear()
        names.append(kernel_compiler._sources())
    kernel_compiler._sources.cache_clear()
    assert names[0] == names[2] != names[1]
