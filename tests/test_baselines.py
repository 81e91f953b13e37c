"""The other ways to merge: by hand, against slow restatements, by property."""

import hashlib
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation_mmer import baselines
from evaluation_mmer.baselines import (
    METHODS,
    Coefficients,
    Merged,
    consensus,
    dare,
    emr_mask,
    emr_scales,
    merge_tensor,
    naive_mc,
    random_bits,
    tall_mask,
    weight_average,
)
from merging_mmer.masks import decouple

WHOLE = st.integers(-9, 9)  # small whole numbers: no sum of them is rounded


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def whole_vectors(most=4):
    return st.integers(1, 10).flatmap(
        lambda n: st.lists(st.lists(WHOLE, min_size=n, max_size=n), min_size=1, max_size=most)
    )


def normal(experts, entries, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(entries, generator=generator) * (1 + i) for i in range(experts)]


# averages


def test_averages_by_hand():
    taus = [t(1, -2, 0), t(3, 4, 0), t(5, 1, 0)]
    assert torch.equal(weight_average(taus[:2]), t(2, 1, 0))
    assert torch.equal(naive_mc(taus, [0.5, 0.25, 1.0]), t(6.25, 1, 0))
    assert torch.allclose(naive_mc(taus), t(3, 1, 0))


def test_the_weight_average_is_the_mean_of_the_weights():
    theta_0, taus = torch.randn(50, generator=torch.Generator().manual_seed(9)), normal(3, 50)
    mean = [sum(float(theta_0[j]) + float(tau[j]) for tau in taus) / 3 for j in range(50)]
    assert torch.allclose(theta_0 + weight_average(taus), torch.tensor(mean), atol=1e-6)
    assert torch.allclose(weight_average(taus), naive_mc(taus), atol=1e-6)


# TALL masks and Consensus


def test_tall_masks_by_hand():
    tau, merged = t(3, 3, 3, -3, 3, 0, 1), t(-1, -9, 6, -6.5, 0, 0, 9)
    #   λ 0.4: 3 ≥ 1.6 | 3 < 4.8 | 3 ≥ 1.2 | 3 ≥ 1.4 | 3 ≥ 1.2 | 0 ≥ 0 | 1 < 3.2
    assert tall_mask(tau, merged, 0.4).tolist() == [True, False, True, True, True, True, False]
    #   λ 1: 3 < 4 | 3 < 12 | 3 ≥ 3 | 3 < 3.5 | 3 ≥ 3 | 0 ≥ 0 | 1 < 8
    assert tall_mask(tau, merged, 1.0).tolist() == [False, False, True, False, True, True, False]
    assert decouple(tau, merged, 0.4).tolist() == [False, False, True, True, False, False, False]


@settings(deadline=None)
@given(whole_vectors(2), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))
def test_tall_masks_are_those_of_the_formula(rows, lam):
    tau, merged = rows[0], rows[-1]
    expected = [abs(a) >= lam * abs(b - a) for a, b in zip(tau, merged, strict=True)]
    assert tall_mask(t(*tau), t(*merged), lam).tolist() == expected


@settings(deadline=None)
@given(whole_vectors(2), st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_from_lambda_1_on_tall_masks_are_the_papers(rows, lam):
    tau, merged = t(*rows[0]), t(*rows[-1])
    used = merged != 0
    assert torch.equal(tall_mask(tau, merged, lam) & used, decouple(tau, merged, lam))


@settings(deadline=None)
@given(whole_vectors(), st.integers(0, 5))
def test_consensus_drops_what_few_masks_claim(rows, least):
    merged = [sum(column) for column in zip(*rows, strict=True)]
    masks = [[abs(a) >= abs(m - a) for a, m in zip(row, merged, strict=True)] for row in rows]
    claims = [sum(column) for column in zip(*masks, strict=True)]
    expected = [m if c >= least else 0 for m, c in zip(merged, claims, strict=True)]
    assert consensus(t(*merged), [torch.tensor(mask) for mask in masks], least).tolist() == expected


def test_consensus_by_hand():
    masks = [torch.tensor([True, True, False]), torch.tensor([True, False, False]), torch.tensor([True, True, False])]
    assert torch.equal(consensus(t(1, 2, 3), masks), t(1, 2, 0))
    assert torch.equal(consensus(t(1, 2, 3), masks, 3), t(1, 0, 0))
    assert torch.equal(consensus(t(1, 2, 3), masks, 0), t(1, 2, 3))


# EMR


def test_emr_by_hand():
    taus = {"a": t(1, -4, 2, 0), "b": t(3, 1, -1, 0)}
    made = merge_tensor("emr", "w", taus, Coefficients(), torch.float32, True)
    assert torch.equal(made.vector, t(3, -4, 2, 0))
    assert made.masks["a"].tolist() == [True, True, True, False]
    assert made.masks["b"].tolist() == [True, False, False, False]
    # mean|τ| is 7/4 and 5/4, mean|m⊙τ*| 9/4 and 3/4
    assert emr_scales([(taus, made)]) == {"a": pytest.approx(7 / 9), "b": pytest.approx(5 / 3)}


def test_emr_scales_are_means_of_means():
    tensors, above, below = [], {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for seed, entries in enumerate((3, 40, 7)):
        taus = dict(zip("ab", normal(2, entries, seed), strict=True))
        made = merge_tensor("emr", "w", taus, Coefficients(), torch.float32, True)
        tensors.append((taus, made))
        for name, tau in taus.items():
            unified = made.vector.tolist()
            kept = [abs(u) for u, x in zip(unified, tau.tolist(), strict=True) if u * x > 0]
            above[name] += sum(abs(x) for x in tau.tolist()) / entries
            below[name] += sum(kept) / entries
    found = emr_scales(iter(tensors))
    assert found == {name: pytest.approx(above[name] / below[name], rel=1e-12) for name in "ab"}


def test_an_expert_of_which_nothing_is_kept_has_scale_1():
    nothing = Merged(t(0, 0), {"a": torch.tensor([False, False])})
    assert emr_scales([({"a": t(0, 0)}, nothing)]) == {"a": 1.0}


def test_emr_masks_do_not_vanish_with_tiny_numbers():
    assert emr_mask(t(1e-30, -1e-30), t(1e-30, 1e-30)).tolist() == [True, False]


# DARE


def philox(key, counter):
    """Four words of Philox 4x64-10 (Salmon et al. 2011), in whole numbers."""
    word, (k0, k1) = 2**64, key
    x = [counter % word, counter >> 64, 0, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k0, b % word, (a >> 64) ^ x[3] ^ k1, a % word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return x


def test_random_bits_are_philox_of_seed_expert_and_tensor():
    named = hashlib.sha256(b"7\0image\0layers.0.w").digest()
    key = int.from_bytes(named[:8], "little"), int.from_bytes(named[8:16], "little")
    expected = [word for counter in range(1, 6) for word in philox(key, counter)]
    assert random_bits(7, "image", "layers.0.w", 0, 20).tolist() == expected
    for first, count in ((0, 1), (3, 4), (5, 9), (8, 0), (19, 1)):
        assert random_bits(7, "image", "layers.0.w", first, count).tolist() == expected[first : first + count]


def test_dare_is_its_formula():
    tau = normal(1, 500)[0]
    drawn = random_bits(3, "a", "w", 0, 500).tolist()
    scale = torch.tensor(1 / (1 - 0.7), dtype=torch.float32)
    for j, (bits, found) in enumerate(zip(drawn, dare(tau, 0.7, 3, "a", "w"), strict=True)):
        expected = tau[j] * scale if bits / 2**64 >= 0.7 else torch.tensor(0.0)
        assert torch.equal(found, expected)


def test_dare_by_hand():
    assert torch.equal(dare(t(1, -2, 3), 0.0, 0, "a"), t(1, -2, 3))
    halves = dare(t(*[1.0] * 64), 0.5, 0, "a")
    assert set(halves.tolist()) == {0.0, 2.0}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 7), st.sampled_from([0.1, 0.5, 0.9]))
def test_dare_does_not_depend_on_blocks(rows, columns, step, drop):
    tau = normal(1, rows * columns)[0].view(rows, columns)
    whole = dare(tau, drop, 5, "a", "w")
    starts = list(range(0, rows, step))
    random.Random(0).shuffle(starts)
    parts = torch.full_like(tau, math.nan)
    for start in starts:
        parts[start : start + step] = dare(tau[start : start + step], drop, 5, "a", "w", first=start * columns)
    assert torch.equal(parts, whole)


def test_dare_draws_in_blocks_of_its_own_too(monkeypatch):
    tau = normal(1, 1000)[0]
    whole = dare(tau, 0.6, 1, "a")
    monkeypatch.setattr(baselines, "_DRAWN", 37)
    assert torch.equal(dare(tau, 0.6, 1, "a"), whole)


@pytest.mark.parametrize("other", [dict(seed=1), dict(expert="b"), dict(tensor="v"), dict(first=1)])
def test_dare_drops_others_for_another_seed_expert_tensor_or_entry(other):
    tau = torch.ones(4000)
    one = dare(tau, 0.5, **{"seed": 0, "expert": "a", "tensor": "w"}) > 0
    two = dare(tau, 0.5, **{"seed": 0, "expert": "a", "tensor": "w", **other}) > 0
    both = float((one & two).float().mean())
    assert abs(both - 0.25) < 0.05  # as of two independent draws: 7 standard deviations


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dares_mean_over_seeds_is_tau(drop):
    tau, seeds = t(1, -2, 0.5, 0), 3000
    mean = sum(dare(tau, drop, seed, "a") for seed in range(seeds)) / seeds
    spread = tau.abs() * math.sqrt(drop / (1 - drop) / seeds)
    assert bool(((mean - tau).abs() <= 4 * spread + 1e-6).all())
    kept = float((dare(torch.ones(100_000), drop, 0, "a") > 0).float().mean())
    assert abs(kept - (1 - drop)) < 5 * math.sqrt(drop * (1 - drop) / 100_000)


# all of them


def slow(method, taus, linear):
    """θ̂ᵢ − θ₀ of each expert but for EMR's scale, by loops over the formulas of the papers (λ 0.4, scaling 0.4)."""
    n, entries = len(taus), range(len(next(iter(taus.values()))))
    total = [sum(tau[j] for tau in taus.values()) for j in entries]
    masks = {e: [abs(tau[j]) >= 0.4 * abs(total[j] - tau[j]) for j in entries] for e, tau in taus.items()}
    if method in ("weight_average", "naive_mc"):
        own = [x / n if linear or method == "weight_average" else 0.0 for x in total]
    elif method == "task_arithmetic":
        own = [0.4 * x for x in total]
    elif method == "consensus":
        own = [0.4 * total[j] if sum(mask[j] for mask in masks.values()) >= 2 else 0.0 for j in entries]
    elif method == "dare":
        drawn = {e: random_bits(0, e, "w", 0, len(total)).tolist() for e in taus}
        own = [0.4 * sum(tau[j] * 10 for e, tau in taus.items() if drawn[e][j] / 2**64 >= 0.9) for j in entries]
    elif method == "tall":
        return {e: [total[j] if masks[e][j] else 0.0 for j in entries] for e in taus}
    else:
        agreeing = [[tau[j] for tau in taus.values() if tau[j] * total[j] > 0] for j in entries]
        unified = [math.copysign(max(map(abs, a)), total[j]) if a else 0.0 for j, a in enumerate(agreeing)]
        return {e: [u if u * tau[j] > 0 else 0.0 for j, u in enumerate(unified)] for e, tau in taus.items()}
    return {e: own for e in taus}


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_formula(method, linear):
    taus = dict(zip(("image", "audio", "video"), normal(3, 200), strict=True))
    made = merge_tensor(method, "w", taus, Coefficients(), torch.float32, linear)
    expected = slow(method, {name: tau.double().tolist() for name, tau in taus.items()}, linear)
    for name in taus:
        own = made.vector if made.masks is None else made.masks[name] * made.vector
        assert torch.allclose(own, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_experts_changes_no_bit(method):
    taus = dict(zip("abcd", normal(4, 300), strict=True))
    one = merge_tensor(method, "w", taus, Coefficients(), torch.bfloat16, True)
    two = merge_tensor(method, "w", dict(reversed(taus.items())), Coefficients(), torch.bfloat16, True)
    assert torch.equal(one.vector, two.vector)
    for name in one.masks or {}:
        assert torch.equal(one.masks[name], two.masks[name])


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_alone_comes_back(method):
    tau = normal(1, 100)[0]
    settings = Coefficients(scaling=1.0, drop=0.0, least=1)
    made = merge_tensor(method, "w", {"a": tau}, settings, torch.float32, True)
    own = made.vector if made.masks is None else made.masks["a"] * made.vector
    assert torch.equal(own, tau)


def test_masks_are_found_from_the_vector_as_it_is_stored():
    # 1 + 2⁻⁹ is 1 in bf16: from there 0.5 is as far as 0 is, and stays
    taus = {"a": t(0.5), "b": t(0.5 + 2**-9)}
    fine, coarse = (
        merge_tensor("tall", "w", taus, Coefficients(lam=1.0), dtype, True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert coarse.vector.tolist() == [1.0] and coarse.masks["a"].tolist() == [True]
    assert fine.vector.tolist() == [1 + 2**-9] and fine.masks["a"].tolist() == [False]


def test_each_expert_may_have_its_own_lambda():
    taus, lam = {"a": t(1), "b": t(4)}, {"a": 0.25, "b": 5.0}
    made = merge_tensor("tall", "w", taus, Coefficients(lam=lam), torch.float32, True)
    assert made.masks["a"].tolist() == [True] and made.masks["b"].tolist() == [False]  # 1 ≥ 0.25·4, 4 < 5·1
    with pytest.raises(ValueError, match="nothing for expert 'c'"):
        merge_tensor("tall", "w", {**taus, "c": t(1)}, Coefficients(lam=lam), torch.float32, True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(scaling=math.nan), "scaling is nan"),
        (dict(drop=1.0), "drop is 1.0, expected 0 <= drop < 1"),
        (dict(drop=-0.1), "drop is -0.1"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=0.5), "seed is 0.5"),
        (dict(lam=-1.0), "lambda is -1.0"),
        (dict(lam={"a": math.inf}), "lambda is inf"),
        (dict(least=-1), "least is -1"),
    ],
)
def test_coefficients_that_are_none(wrong, words):
    with pytest.raises(ValueError, match=words):
        Coefficients(**wrong)


def test_what_can_not_be_merged():
    with pytest.raises(ValueError, match="method is 'ties', expected one of"):
        merge_tensor("ties", "w", {"a": t(1)}, Coefficients(), torch.float32, True)
    for taus in ({"a": t(1), "b": t(1, 2)}, {}):
        with pytest.raises(ValueError, match="w: the task vectors have the shapes"):
            merge_tensor("tall", "w", taus, Coefficients(), torch.float32, True)
    with pytest.raises(ValueError, match="drop is 1"):
        dare(t(1), 1.0, 0, "a")
    with pytest.raises(ValueError, match="lambda is -1"):
        tall_mask(t(1), t(1), -1.0)
