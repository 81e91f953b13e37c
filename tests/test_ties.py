"""Trim, elect, disjoint mean: by hand, by property, against slow references."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer.selection import model_threshold
from merging_mmer.task_vectors import task_vector, vocabulary_task_vector
from merging_mmer.ties import (
    METHODS,
    disjoint_mean,
    elect,
    emr,
    kept_count,
    merge_vectors,
    task_arithmetic,
    trim,
    trim_at,
)

FLOATS = st.floats(-100, 100, width=32, allow_nan=False)


def vectors(experts, entries=st.integers(1, 12)):
    return entries.flatmap(
        lambda n: st.lists(st.lists(FLOATS, min_size=n, max_size=n), min_size=experts[0], max_size=experts[1])
    ).map(lambda rows: [torch.tensor(row, dtype=torch.float32) for row in rows])


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


# trim


def test_trim_by_hand():
    tau = t(0.5, -3.0, 1.0, -0.1, 2.0)
    assert torch.equal(trim(tau, 0.4), t(0, -3, 0, 0, 2))
    assert torch.equal(trim(tau, 0.41), t(0, -3, 1, 0, 2))
    assert torch.equal(trim(tau, 1.0), tau)


def test_trim_breaks_ties_in_memory_order():
    assert torch.equal(trim(torch.tensor([[1.0, -1.0], [1.0, 2.0]]), 0.5), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


@pytest.mark.parametrize(
    ("entries", "density", "kept"), [(100, 0.07, 7), (1000, 0.2, 200), (3, 0.1, 1), (5, 1.0, 5), (7, 0.5, 4)]
)
def test_kept_count_is_of_the_decimal_number(entries, density, kept):
    assert kept_count(entries, density) == kept


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_trim_refuses_a_density_outside_0_1(density):
    with pytest.raises(ValueError, match="density is"):
        trim(t(1, 2), density)


@settings(deadline=None)
@given(vectors((1, 1), st.integers(1, 40)), st.sampled_from([0.05, 0.2, 0.33, 0.5, 0.9, 1.0]))
def test_trim_keeps_exactly_k_and_the_largest(taus, density):
    tau = taus[0]
    kept = kept_count(len(tau), density)
    order = sorted(range(len(tau)), key=lambda i: (-abs(tau[i].item()), i))[:kept]
    reference = torch.zeros_like(tau)
    reference[order] = tau[order]
    assert torch.equal(trim(tau, density), reference)


@given(vectors((1, 4), st.integers(1, 30)), st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]))
@settings(deadline=None, max_examples=50)
def test_one_threshold_for_a_whole_model_is_exact(taus, density):
    threshold, ties = model_threshold(lambda: iter(taus), density)
    trimmed = []
    for tau in taus:
        kept, used = trim_at(tau, threshold, ties)
        ties -= used
        trimmed.append(kept)
    assert ties == 0
    assert torch.equal(torch.cat(trimmed), trim(torch.cat(taus), density))


# elect and mean


def test_elect_by_hand():
    taus = [t(1, -1, 2, 0, 1), t(-2, -1, 1, 0, -1)]
    assert torch.equal(elect(taus), t(-1, -1, 1, 0, 0))
    assert torch.equal(elect(taus, [3.0, 1.0]), t(1, -1, 1, 0, 1))


def test_disjoint_mean_by_hand():
    taus = [t(1, -1, 2, 0, 1), t(-2, -3, 0, 0, -1)]
    sign = elect(taus)
    assert torch.equal(disjoint_mean(taus, sign), t(-2, -2, 2, 0, 0))
    assert torch.equal(disjoint_mean(taus, sign, alpha=0.5), t(-1, -1, 1, 0, 0))
    # weights 3 and 1: (3·-1 + 1·-3) / 4
    assert disjoint_mean(taus, elect(taus, [3.0, 1.0]), [3.0, 1.0])[1].item() == pytest.approx(-1.5)


def test_task_arithmetic_and_emr_by_hand():
    taus = [t(1, -1, 2), t(-2, -3, 1)]
    assert torch.equal(task_arithmetic(taus), t(-1, -4, 3))
    assert torch.equal(task_arithmetic(taus, [0.5, 2.0], alpha=2), t(-7, -13, 6))
    assert torch.equal(emr(taus), t(-2, -3, 2))


def slow_ties(taus, weights, alpha):
    merged = torch.zeros_like(taus[0], dtype=torch.float64)
    for i in range(merged.numel()):
        entries = [(w, tau.view(-1)[i].double().item()) for w, tau in zip(weights, taus, strict=True)]
        total = sum(w * x for w, x in entries)
        agreeing = [(w, x) for w, x in entries if x * total > 0]
        if agreeing:
            merged.view(-1)[i] = alpha * sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return merged


@settings(deadline=None)
@given(vectors((1, 5)), st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=5, max_size=5))
def test_ties_against_a_slow_reference(taus, weights):
    taus = [tau.round() for tau in taus]  # whole numbers: no sign hangs on the rounding of a sum
    weights = weights[: len(taus)]
    got = merge_vectors("ties", taus, weights, alpha=0.7)
    torch.testing.assert_close(got.double(), slow_ties(taus, weights, 0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@given(taus=vectors((1, 4)))
@settings(deadline=None)
def test_the_order_of_experts_does_not_matter(method, taus):
    wanted = merge_vectors(method, taus, [0.7] * len(taus))
    for order in itertools.permutations(range(len(taus))):
        assert torch.equal(merge_vectors(method, [taus[i] for i in order], [0.7] * len(taus)), wanted)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(taus=vectors((1, 1)))
def test_one_expert_comes_back_unchanged(method, taus):
    assert torch.equal(merge_vectors(method, [trim(taus[0], 1.0)]), taus[0])


def test_equal_weights_of_any_size_cost_no_rounding():
    tau = torch.randn(1000)
    assert torch.equal(merge_vectors("ties", [tau], [0.3]), tau)


def test_shapes_names_and_weights_are_checked():
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(3,\)\]"):
        merge_vectors("ties", [t(1, 2), t(1, 2, 3)])
    with pytest.raises(ValueError, match="'tys', expected one of"):
        merge_vectors("tys", [t(1)])
    with pytest.raises(ValueError, match="one above 0 for each"):
        merge_vectors("ties", [t(1), t(2)], [1.0, 0.0])


# task vectors


def test_task_vector_is_fp32_and_forgives_rounding():
    theta_0 = torch.tensor([1.0, 1 + 2**-10, 3.0], dtype=torch.float16)
    theta = theta_0.to(torch.bfloat16)
    assert torch.equal(task_vector(theta, theta_0), t(0, 0, 0))
    theta[2] = 3.5
    assert torch.equal(task_vector(theta, theta_0), t(0, 0, 0.5))
    with pytest.raises(ValueError, match=r"shape \(2,\), the base's \(3,\)"):
        task_vector(theta[:2], theta_0)


def test_padding_rows_of_a_vocabulary_are_no_change():
    theta_0, theta = torch.zeros(4, 2), torch.ones(6, 2)
    expected = torch.tensor([[1.0, 1], [1, 1], [1, 1], [0, 0]])
    assert torch.equal(vocabulary_task_vector(theta, theta_0, 3), expected)
    assert torch.equal(vocabulary_task_vector(theta[:3], theta_0, 3), expected)
    with pytest.raises(ValueError, match="3 tokens"):
        vocabulary_task_vector(theta[:2], theta_0, 3)
