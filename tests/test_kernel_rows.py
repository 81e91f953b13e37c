"""The kernel on the values as they lie in their files: bit for bit what blocks in fp32 give, and torch's functions."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer import kernels, task_rows
from merging_mmer.masks import decouple, rescale
from merging_mmer.task_vectors import task_vector
from merging_mmer.ties import merge_vectors, relative, trim
from modeling_mmer.routed_weights_mmer import unpack_bits

from . import tiny_checkpoints as tiny
from .kernel_blocks import (
    DTYPES,
    METHODS,
    NO_MATRIX,
    NO_VECTOR,
    SEEDS,
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
from .test_merge import lora_world
from .tiny_merges import run, world

SHORT = st.sampled_from([kernels.BF16, kernels.FP16])
WIDE = st.tuples(st.integers(1, 5), st.sampled_from([8, 16, 136]))
KINDS = st.sampled_from([kernels.NO_SCALES, kernels.ROW_SCALES, kernels.LATE])


def drawn(rng, experts, shape, fmt):
    """(θ₀, θᵢ …) raw, of which many entries are equal and many near one another."""
    start, largest = values(rng, *shape), np.float32(6e4 if fmt == kernels.FP16 else 1e38)
    made = [start]
    for _ in range(experts):
        far = np.where(rng.random(shape) < 0.3, start, values(rng, *shape))
        near = start + np.float32(0.05) * values(rng, *shape)
        made.append(np.where(rng.random(shape) < 0.5, far, near))
    return tuple(raw_of(t(np.clip(of, -largest, largest).astype(np.float32)).to(DTYPES[fmt])) for of in made)


def by_rows(raw, thresholds, quotas, weights, lams, alpha, method, fmt, kind, step):
    """What `merge_rows` gives of (θ₀, θᵢ …) in blocks of `step` rows; what it does not write stays 7."""
    theta_0, *thetas = raw
    count, (rows, columns) = len(thetas), theta_0.shape
    delta, masks = np.empty((rows, columns), np.uint16), np.empty((count, rows, columns // 8), np.uint8)
    found = kernels.Found(
        np.full((count, rows, 2), 7.0), np.full((count, rows, 8), 7.0), np.full((count, rows), 7, np.float32),
        np.full((rows, 2), 7), np.full(rows, 7.0),
    )  # fmt: skip
    shares = np.array(weights if method == "task_arithmetic" else relative(weights, count), np.float32)
    left = np.array(quotas, np.int64)
    for first in range(0, rows, step):
        size = min(step, rows - first)
        packed = np.empty((count, size, columns // 8), np.uint8)
        kernels.merge_rows(
            theta_0, thetas, first, np.array(thresholds, np.float32), left, shares, np.array(lams, np.float32), alpha,
            METHODS[method], fmt, kind, delta[first : first + size], packed, found,
        )  # fmt: skip
        masks[:, first : first + size] = packed
    return delta, masks, found, left


def trimming(raw, fmt, density):
    """(thresholds, quotas) of the experts; the second one is not trimmed."""
    thresholds, quotas = [], []
    for place, theta in enumerate(raw[1:]):
        size = np.sort(np.abs(task_vector(tensor_of(theta, fmt), tensor_of(raw[0], fmt)).numpy()).ravel())[::-1]
        kept = math.ceil(density * len(size))
        trims = density < 1 and place != 1
        thresholds.append(float(size[kept - 1]) if trims else -1.0)
        quotas.append(int((size[:kept] == size[kept - 1]).sum()) if trims else 0)
    return thresholds, quotas


@settings(max_examples=150, deadline=None)
@given(
    SEEDS, WIDE, SHORT, KINDS, st.sampled_from(sorted(METHODS)),
    st.lists(st.sampled_from([1.0, 0.5, 0.3, 2.0]), min_size=1, max_size=kernels.MOST),
    st.sampled_from([1.0, 0.7]), st.sampled_from([1.0, 0.5, 0.2]), st.sampled_from([1.0, 0.6, 0.0]), st.integers(1, 6),
)  # fmt: skip
def test_rows_give_what_blocks_give(seed, shape, fmt, kind, method, weights, alpha, density, lam, step):
    raw = drawn(np.random.default_rng(seed), len(weights), shape, fmt)
    thresholds, quotas = trimming(raw, fmt, density)
    lams = [lam * 0.9**e for e in range(len(weights))]
    delta, packed, found, left = by_rows(raw, thresholds, quotas, weights, lams, alpha, method, fmt, kind, step)
    taus = np.empty((len(weights), *shape), np.float32)
    for theta, tau in zip(raw[1:], taus, strict=True):
        kernels.task_vector(theta, raw[0], fmt, tau)
    stored, merged, expected_left = merged_block(taus, weights, method, alpha, fmt, thresholds, quotas)
    same_bits(delta, stored)
    assert left.tolist() == expected_left.tolist()
    theta_0, conflicts, energy = widened(raw[0], fmt), np.empty((shape[0], 2), np.int64), np.empty(shape[0])
    kernels.conflicts_block(taus, conflicts)
    kernels.energy_block(theta_0, energy)
    same_bits(found.conflicts, conflicts)
    same_bits(found.energy, energy)
    for e, tau in enumerate(taus):
        own, sums = masked(tau, merged, lams[e])
        same_bits(packed[e], own)
        same_bits(found.fits[e], sums)
        with np.errstate(over="ignore"):
            fitted = np.where(sums[:, 1] > 0, sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], 1.0), 1.0)
            scale = t(fitted.astype(np.float32)).to(DTYPES[fmt]).float().numpy()
        if kind == kernels.ROW_SCALES:
            same_bits(found.scales[e], scale)
        else:
            assert (found.scales[e] == 7).all()
        if kind != kernels.LATE:
            used = scale if kind == kernels.ROW_SCALES else NO_VECTOR
            expected = measured(tau, theta_0, merged, own, used, NO_MATRIX, fmt, kernels.MASKED)
            np.testing.assert_array_equal(found.sums[e], expected)  # one NaN is as good as another


@pytest.mark.parametrize("fmt", [kernels.BF16, kernels.FP16])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_rows_give_what_torchs_functions_give(fmt, density):
    rng, weights, dtype = np.random.default_rng(2), [1.0, 0.5, 0.8], DTYPES[fmt]
    start = rng.normal(0, 1, (9, 64)).astype(np.float32)
    thetas = [start + rng.normal(0, 0.1, start.shape).astype(np.float32) for _ in range(3)]
    raw = [raw_of(t(of).to(dtype)) for of in (start, *thetas)]
    thresholds, quotas = trimming(raw, fmt, density)
    delta, packed, found, _ = by_rows(
        raw, thresholds, quotas, weights, [1.0] * 3, 0.9, "ties", fmt, kernels.ROW_SCALES, 4
    )
    taus = [task_vector(tensor_of(of, fmt), tensor_of(raw[0], fmt)) for of in raw[1:]]
    kept = [tau if threshold < 0 else trim(tau, density) for tau, threshold in zip(taus, thresholds, strict=True)]
    merged = merge_vectors("ties", kept, weights, 0.9).to(dtype)
    same_bits(delta, raw_of(merged))
    for e, tau in enumerate(taus):
        mask = decouple(tau, merged)
        assert torch.equal(unpack_bits(t(packed[e]), 64), mask)
        scale = rescale(tau, mask, merged.float()).to(dtype).float()
        torch.testing.assert_close(t(found.scales[e]), scale, rtol=0.01, atol=0)
        recovered = mask * merged.float() * t(found.scales[e])[:, None]
        error = (tensor_of(raw[0], fmt).float() + recovered).to(dtype).float() - tensor_of(raw[e + 1], fmt).float()
        torch.testing.assert_close(t(found.sums[e, :, 2]), error.double().square().sum(1), rtol=1e-5, atol=0)
        assert found.sums[e, :, 4].tolist() == mask.sum(1).tolist()
        up_and_down = [((tau > 0) & (merged < 0)) | ((tau < 0) & (merged > 0)), tau != 0]
        assert found.sums[e, :, 5:7].T.tolist() == [of.sum(1).tolist() for of in up_and_down]


@pytest.mark.parametrize("fmt", [kernels.BF16, kernels.FP16])
def test_rounding_back_to_the_format_of_both_costs_nothing(fmt):
    """θ₀ + (θ - θ₀) in fp32, rounded to the format of the two, is θ₀ + τ: of all exponents beside one another."""
    rng, special = np.random.default_rng(4), 0x7F80 if fmt == kernels.BF16 else 0x7C00
    start, theta = (rng.integers(0, 1 << 16, (400, 4096), dtype=np.uint16) for _ in range(2))
    near = (start.astype(np.int64) + rng.integers(-40, 40, start.shape)).clip(0, 0xFFFF).astype(np.uint16)
    bits = 8 if fmt == kernels.BF16 else 11
    # about as far below θ₀ as an fp32 number has places: some of θ is lost in the difference
    exponent = 1 << (bits - 1)
    below = (start.astype(np.int64) - exponent * rng.integers(24 - bits - 3, 27, start.shape)).clip(0, 0xFFFF)
    for other in (theta, near, below.astype(np.uint16)):
        finite = (start & special != special) & (other & special != special)
        b, x = (tensor_of(np.where(finite, of, 0).astype(np.uint16), fmt).float() for of in (start, other))
        tau = x - b
        lost = ((b + tau).to(DTYPES[fmt]).float() - b) - tau
        assert float(tau.isfinite().float().mean()) > 0.9 and not lost[tau.isfinite()].any()


def test_neither_the_block_nor_the_thread_shows():
    raw = drawn(np.random.default_rng(6), 3, (24, 64), kernels.BF16)
    thresholds, quotas = trimming(raw, kernels.BF16, 0.4)
    call = (raw, thresholds, quotas, [1.0, 0.5, 0.8], [1.0] * 3, 0.9, "ties", kernels.BF16, kernels.ROW_SCALES)
    whole = by_rows(*call, 24)
    with ThreadPoolExecutor(4) as pool:
        for delta, packed, found, left in pool.map(lambda step: by_rows(*call, step), (1, 5, 7, 24)):
            same_bits(delta, whole[0])
            same_bits(packed, whole[1])
            assert left.tolist() == whole[3].tolist()
            for name, expected in vars(whole[2]).items():
                np.testing.assert_array_equal(getattr(found, name), expected)


def test_an_expert_that_is_the_base():
    """An empty mask, the scale 1, and no error."""
    raw = drawn(np.random.default_rng(8), 0, (3, 16), kernels.BF16)
    call = ([-1.0], [0], [1.0], [1.0], 1.0, "ties", kernels.BF16, kernels.ROW_SCALES, 3)
    delta, packed, found, _ = by_rows((raw[0], raw[0]), *call)
    assert not delta.any() and not packed.any() and (found.scales == 1).all() and not found.sums.any()


def test_what_does_not_belong_together_is_refused():
    raw, one = np.zeros((4, 16), np.uint16), np.ones(1, np.float32)
    parts = {
        "fits": np.zeros((1, 4, 2)), "sums": np.zeros((1, 4, 8)), "scales": np.zeros((1, 4), np.float32),
        "conflicts": np.zeros((4, 2), np.int64), "energy": np.zeros(4),
    }  # fmt: skip

    def call(theta=raw, first=0, delta=(2, 16), packed=(1, 2, 2), base=raw, count=1, **other):
        found = kernels.Found(**{**parts, **other})
        kernels.merge_rows(
            base, [theta] * count, first, -one, np.zeros(1, np.int64), one, one, 1.0, kernels.TIES, kernels.BF16,
            kernels.ROW_SCALES, np.empty(delta, np.uint16), np.empty(packed, np.uint8), found,
        )  # fmt: skip

    call(first=2)
    call(theta=np.zeros((5, 16), np.uint16))  # rows of an expert's own behind the base's
    odd = np.zeros((4, 9), np.uint16)
    for wrong in (
        {"first": 3}, {"first": -1}, {"delta": (2, 8)}, {"packed": (1, 2, 1)}, {"packed": (2, 2, 2)},
        {"theta": raw[:1]}, {"theta": np.zeros((4, 8), np.uint16)}, {"theta": odd, "base": odd, "delta": (2, 9)},
        {"fits": np.zeros((1, 3, 2))}, {"sums": np.zeros((1, 4, 7))}, {"scales": np.zeros((1, 2), np.float32)},
        {"conflicts": np.zeros((3, 2), np.int64)}, {"energy": np.zeros(3)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="differ in their rows or columns"):
            call(**wrong)
    with pytest.raises(ValueError, match=f"4 experts with 1 thresholds.*there may be {kernels.MOST}"):
        call(count=4)


# the k-th magnitude


@settings(max_examples=60, deadline=None)
@given(SEEDS, WIDE, SHORT, st.data())
def test_magnitudes_between_two(seed, shape, fmt, data):
    raw = drawn(np.random.default_rng(seed), 1, shape, fmt)
    size = np.abs(task_vector(tensor_of(raw[1], fmt), tensor_of(raw[0], fmt)).numpy()).ravel()
    some = st.sampled_from([0.0, math.inf, *map(float, np.unique(size))])
    low, high = sorted((data.draw(some), data.draw(some)))
    found, counts = np.empty(size.size + 1, np.float32), np.empty(4, np.int64)
    kernels.between(raw[1], raw[0], fmt, low, high, found, counts)
    within = size[(size > low) & (size < high)]
    assert counts.tolist() == [(size > high).sum(), (size == high).sum(), (size == low).sum(), len(within)]
    same_bits(found[: counts[3]], within)


def test_room_for_the_magnitudes_is_asked_for():
    raw, counts = np.zeros((2, 8), np.uint16), np.empty(4, np.int64)
    for theta, room in ((raw, 16), (raw[:, :4].copy(), 17), (raw.reshape(1, 16), 17)):
        with pytest.raises(ValueError, match="differ in their rows or columns"):
            kernels.between(theta, raw, kernels.BF16, 0.0, 1.0, np.empty(room, np.float32), counts)


# whole merges


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("bfloat16", {}),
        ("float16", {"decoupling": {"kind": "paper", "lambda": 0.8}, "method": {"density": 0.3}}),
        ("bfloat16", {"decoupling": {"scale": "row", "rank": 0}, "method": {"density": 0.3, "alpha": 0.7}}),
        ("float16", {"decoupling": {"scale": "tensor", "rank": 2}, "method": {"density": 0.3, "scope": "model"}}),
        ("bfloat16", {"decoupling": {"scale": "row", "rank": 2}, "method": {"name": "emr"}}),
    ],
)
def test_a_merge_is_the_same_without_the_kernel(tmp_path, monkeypatch, dtype, changes):
    """Values and report, the vocabulary's rows behind the base's tokens too."""
    recipe, used = world(tmp_path, getattr(torch, dtype)), []
    recipe["experts"]["audio"] = {"model": recipe["experts"]["audio"], "weight": 0.5}
    merge_rows = kernels.merge_rows
    monkeypatch.setattr(kernels, "merge_rows", lambda *args: used.append(1) or merge_rows(*args))
    with_it = run({**recipe, **changes}, tmp_path / "with", block=2000)
    calls = len(used)
    monkeypatch.setattr(kernels, "MOST", 0)
    monkeypatch.setattr(task_rows.TaskRows, "sample", lambda self: np.empty(0, np.float32))
    without = run({**recipe, **changes}, tmp_path / "without", block=300)
    assert len(used) == calls > 10
    got, want = tiny.tensors(tmp_path / "with"), tiny.tensors(tmp_path / "without")
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert with_it.experts == without.experts and with_it.sign_conflicts == without.sign_conflicts


def test_a_lora_takes_the_way_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "merge_rows", None)
    run(lora_world(tmp_path, target_modules=["q_proj"]), tmp_path / "out")
