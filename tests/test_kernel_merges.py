"""The kernels of τ*, masks and measures: bit for bit the torch functions, by value against the definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer import kernels
from merging_mmer.masks import decouple, recover, rescale
from merging_mmer.report import Measurement
from merging_mmer.ties import kept_count, merge_vectors, trim, trim_at
from modeling_mmer.routed_weights_mmer import pack_bits, unpack_bits

from .kernel_blocks import (
    DTYPES,
    FORMATS,
    METHODS,
    NO_MASK,
    NO_MATRIX,
    NO_VECTOR,
    SEEDS,
    SHAPES,
    masked,
    measured,
    merged_block,
    raw_like,
    raw_of,
    same_bits,
    t,
    values,
    widened,
)

# one merged vector


@settings(max_examples=150, deadline=None)
@given(
    SEEDS,
    SHAPES,
    FORMATS,
    st.sampled_from(sorted(METHODS)),
    st.lists(st.sampled_from([1.0, 0.5, 0.3, 2.0, 1e-30]), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.7, 1.5]),
    st.sampled_from([None, 0.01, 0.2, 0.5, 0.9]),
)
def test_the_merged_vector_is_torchs(seed, shape, fmt, method, weights, alpha, density):
    rng = np.random.default_rng(seed)
    taus = values(rng, len(weights), *shape)
    before = taus.copy()
    expected, thresholds, quotas = [], [], []
    for e, tau in enumerate(t(taus)):
        if density is None or e == 1:
            expected.append(tau)
            thresholds.append(-1.0)
            quotas.append(7)
            continue
        kept = kept_count(tau.numel(), density)
        thresholds.append(tau.abs().flatten().kthvalue(tau.numel() - kept + 1).values.item())
        quotas.append(kept - int((tau.abs() > thresholds[-1]).sum()))
        expected.append(trim_at(tau, thresholds[-1], quotas[-1])[0])
        assert torch.equal(expected[-1], trim(tau, density))
    stored, merged, left = merged_block(taus, weights, method, alpha, fmt, thresholds, quotas)
    whole = merge_vectors(method, expected, weights, alpha).to(DTYPES[fmt])
    clear = np.ones(shape, bool)
    if method == "task_arithmetic" and len(weights) > 2:
        # of a +0 and a -0 torch's minimum is either, by the place in the tensor: so is the sign of a sum of such zeros
        terms = np.stack([tau.numpy() * np.float32(weight) for tau, weight in zip(expected, weights, strict=True)])
        clear = (terms != 0).any(0)
        same_bits(merged[~clear], np.where(np.signbit(terms).all(0), np.float32(-0.0), np.float32(0.0))[~clear])
    same_bits(stored[clear], raw_of(whole)[clear])
    same_bits(merged, widened(stored, fmt))
    same_bits(taus, before)
    assert left.tolist() == [7 if of < 0 else 0 for of in thresholds]


def slow_merge(column, weights, method, alpha):
    """τ* of one entry, from the definitions, in fp64."""
    relative = weights if method == "task_arithmetic" else [w / max(weights) for w in weights]
    total = math.fsum(w * x for w, x in zip(relative, column, strict=True))
    if method == "task_arithmetic":
        return alpha * total
    sign = (total > 0) - (total < 0)
    agreeing = [(w, x) for w, x in zip(relative, column, strict=True) if x * sign > 0]
    if not agreeing:
        return 0.0
    if method == "emr":
        return alpha * sign * max(abs(x) for _, x in agreeing)
    return alpha * math.fsum(w * x for w, x in agreeing) / math.fsum(w for w, _ in agreeing)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 64])
def test_the_merged_vector_by_the_definition(method, experts):
    rng = np.random.default_rng(experts)
    taus = rng.normal(0, 1, (experts, 2, 13)).astype(np.float32)
    weights = [float(w) for w in rng.uniform(0.2, 2, experts)]
    _, merged, _ = merged_block(taus, weights, method, 0.7, kernels.FP32)
    for r in range(2):
        for c in range(13):
            expected = slow_merge([float(x) for x in taus[:, r, c]], weights, method, 0.7)
            assert merged[r, c] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_quotas_run_over_the_blocks_in_memory_order():
    taus = np.array([[[1.0, -1.0, 2.0], [-1.0, 1.0, 0.5]]], np.float32)
    quotas, found = np.array([3], np.int64), []
    for r in range(2):
        stored, merged = raw_like((1, 3), kernels.BF16), np.empty((1, 3), np.float32)
        block = np.ascontiguousarray(taus[:, r : r + 1])
        one = np.ones(1, np.float32)
        kernels.merge_block(block, one, quotas, one, 1.0, kernels.TIES, kernels.BF16, stored, merged)
        found.append(merged[0].tolist())
    assert found == [[1.0, -1.0, 2.0], [-1.0, 0.0, 0.0]] and quotas.tolist() == [0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_order_of_experts_does_not_matter(method):
    taus = values(np.random.default_rng(5), 5, 3, 261)
    weights = [0.3, 1.0, 0.7, 1.0, 0.1]
    first, _, _ = merged_block(taus, weights, method, 0.9, kernels.FP32)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        again, _, _ = merged_block(taus[order], [weights[e] for e in order], method, 0.9, kernels.FP32)
        same_bits(again, first)


# masks, scales, residuals


@settings(max_examples=80, deadline=None)
@given(SEEDS, SHAPES, FORMATS, st.sampled_from([0.0, 0.5, 0.8, 1.0, 3.0]))
def test_the_mask_is_torchs(seed, shape, fmt, lam):
    rng = np.random.default_rng(seed)
    tau = values(rng, *shape)
    merged = np.where(rng.random(shape) < 0.5, tau * rng.choice([0.5, 1.0, 2.0, -1.0], shape), values(rng, *shape))
    merged = t(merged.astype(np.float32)).to(DTYPES[fmt]).float()
    merged = torch.where(merged.isinf(), 1.0, merged)
    packed, sums = masked(tau, merged.numpy(), lam)
    mask = decouple(t(tau), merged, lam)
    same_bits(packed, pack_bits(mask))
    own = mask.numpy() * merged.numpy().astype(np.float64)
    for r in range(shape[0]):
        assert sums[r, 0] == pytest.approx(math.fsum(tau[r].astype(np.float64) * own[r]), rel=1e-12)
        assert sums[r, 1] == pytest.approx(math.fsum(own[r] * own[r]), rel=1e-12)
    scale = rescale(t(tau), mask, merged, "row")
    assert scale is not None
    found = np.where(sums[:, 1] > 0, sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1.0), 1.0)
    with np.errstate(over="ignore"):  # an infinite scale, on both sides
        np.testing.assert_allclose(found.astype(np.float32), scale.numpy(), rtol=1.2e-7)


def test_the_mask_by_the_definition():
    tau = np.array([[1.0, 1.0, 1.0, -1.0, 1.0, 0.0, 1.0, -1.0, 1.0]], np.float32)
    merged = np.array([[1.0, 2.0, 2.01, -0.1, -1.0, 1.0, 0.0, -2.0, 0.5]], np.float32)
    packed, sums = masked(tau, merged)
    assert unpack_bits(t(packed), 9)[0].tolist() == [True, True, False, True, False, False, False, True, True]
    assert sums[0].tolist() == pytest.approx([1 + 2 + 0.1 + 2 + 0.5, 1 + 4 + 0.01 + 4 + 0.25])
    assert packed.shape == (1, 2) and packed[0, 1] == 1
    assert unpack_bits(t(masked(tau, merged, 2.0)[0]), 9)[0].tolist() == [True] + [False] * 7 + [True]


@settings(max_examples=40, deadline=None)
@given(SEEDS, SHAPES, st.booleans())
def test_the_residual_is_torchs(seed, shape, scaled):
    rng = np.random.default_rng(seed)
    tau, merged = values(rng, *shape), values(rng, *shape)
    packed, _ = masked(tau, merged)
    mask = unpack_bits(t(packed), shape[1])
    scale = rng.uniform(0.5, 2, shape[0]).astype(np.float32) if scaled else NO_VECTOR
    out = np.empty(shape, np.float32)
    kernels.residual_block(tau, merged, packed, scale, out)
    same_bits(out, t(tau) - recover(mask, t(merged), t(scale) if scaled else None))


# measures


@settings(max_examples=120, deadline=None)
@given(
    SEEDS, SHAPES, FORMATS, st.sampled_from([kernels.MASKED, kernels.LOW_RANK, kernels.STATIC]), *[st.booleans()] * 2
)
def test_the_measures_are_torchs(seed, shape, fmt, kind, scaled, corrected):
    rng = np.random.default_rng(seed)
    tau, merged, theta_0, low_rank = (np.clip(values(rng, *shape), -3e4, 3e4) for _ in range(4))
    merged = t(merged).to(DTYPES[fmt]).float().numpy()
    scale = rng.uniform(0.5, 2, shape[0]).astype(np.float32) if scaled and kind == kernels.MASKED else NO_VECTOR
    low_rank = low_rank if (corrected and kind == kernels.MASKED) or kind == kernels.LOW_RANK else NO_MATRIX
    packed = masked(tau, merged)[0] if kind == kernels.MASKED else NO_MASK
    sums = measured(tau, theta_0, merged, packed, scale, low_rank, fmt, kind)

    mask = unpack_bits(t(packed), shape[1]) if kind == kernels.MASKED else None
    if kind == kernels.STATIC:
        recovered = t(merged)
    elif kind == kernels.LOW_RANK:
        recovered = torch.zeros(shape) + t(low_rank)
    else:
        recovered = recover(mask, t(merged), t(scale) if scaled else None)
        recovered = recovered + t(low_rank) if len(low_rank) else recovered
    for r in range(shape[0]):
        one = Measurement(["x"], DTYPES[fmt])
        own = None if mask is None else mask[r]
        one.one("x", "w", t(theta_0[r]), t(tau[r]), t(merged[r]), recovered[r], own)
        of = one.sums["x"]["w"]
        assert sums[r, 4:7].tolist() == [of.on, of.against, of.nonzero]
        np.testing.assert_allclose(sums[r, :4], [of.tau, of.kept, of.error, of.rounding], rtol=1e-12)
        products = tau[r].astype(np.float64) * theta_0[r].astype(np.float64)
        assert sums[r, 7] == pytest.approx(math.fsum(products), rel=1e-12, abs=1e-12 * math.fsum(np.abs(products)))
        assert sums[r, 0] == pytest.approx(math.fsum(float(x) ** 2 for x in tau[r]), rel=1e-12)


def test_the_measures_by_hand():
    """Integers up to 256 are bf16 numbers; 257 and 259 are not, and go to 256 and 260."""
    tau, theta_0 = np.array([[1.0, 3.0, -2.0, 0.0]], np.float32), np.array([[256.0, 256.0, 4.0, 8.0]], np.float32)
    merged = np.array([[2.0, 4.0, 2.0, 1.0]], np.float32)
    packed = np.array([[0b0011]], np.uint8)
    scale = np.array([0.5], np.float32)
    sums = measured(tau, theta_0, merged, packed, scale, NO_MATRIX, kernels.BF16, kernels.MASKED)
    # recovered 1, 2, 0, 0: 257 is stored as 256, 258 as it is, so the errors are -1, -1, 2, 0
    assert sums.tolist() == [[14.0, 10.0, 6.0, 2.0, 2.0, 1.0, 3.0, 256.0 + 768.0 - 8.0]]
    sums = measured(tau, theta_0, merged, NO_MASK, NO_VECTOR, NO_MATRIX, kernels.BF16, kernels.STATIC)
    # θ₀ + τ* is 258, 260, 6, 9 against θ = 257, 259, 2, 8
    assert sums.tolist() == [[14.0, 0.0, 1.0 + 1.0 + 16.0 + 1.0, 2.0, 0.0, 1.0, 3.0, 1016.0]]


@pytest.mark.parametrize("fmt", [kernels.BF16, kernels.FP16])
def test_the_cost_of_rounding_is_that_of_torchs_rounding(fmt):
    """Of every 16-bit number, the midpoints between two of them and their neighbours: one number a row, θ₀ = 0."""
    exact = [widened(np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1), of).view(np.uint32) for of in (0, 1)]
    half = 0x8000 if fmt == kernels.BF16 else 0x1000
    tau = np.concatenate([*exact, *(exact[fmt] + np.uint32(half + near) for near in (-1, 0, 1))]).view(np.float32)
    tau = np.concatenate([tau[np.isfinite(tau)], np.arange(4096, dtype=np.float32) * np.float32(2.0**-25)])[:, None]
    rounded = t(tau).to(DTYPES[fmt]).float().numpy()
    zero = np.zeros_like(tau)
    with np.errstate(over="ignore"):
        expected = np.square((rounded - tau).astype(np.float64))[:, 0]
    sums = measured(tau, zero, zero, NO_MASK, NO_VECTOR, NO_MATRIX, fmt, kernels.STATIC)
    np.testing.assert_array_equal(sums[:, 3], expected)
    np.testing.assert_array_equal(sums[:, 0], np.square(tau.astype(np.float64))[:, 0])


@settings(max_examples=40, deadline=None)
@given(SEEDS, SHAPES, st.integers(1, 8))
def test_conflicts_and_energy_by_the_definition(seed, shape, experts):
    taus = values(np.random.default_rng(seed), experts, *shape)
    sums, energy = np.empty((shape[0], 2), np.int64), np.empty(shape[0])
    kernels.conflicts_block(taus, sums)
    kernels.energy_block(taus[0], energy)
    for r in range(shape[0]):
        columns = taus[:, r].T
        assert sums[r, 0] == sum(bool((column > 0).any() and (column < 0).any()) for column in columns)
        assert sums[r, 1] == sum(int((column != 0).sum()) >= 2 for column in columns)
        assert energy[r] == pytest.approx(math.fsum(float(x) ** 2 for x in taus[0, r]), rel=1e-12)
