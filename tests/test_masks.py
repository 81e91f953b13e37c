"""Masks, scales and corrections: by hand, by property, against slow references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer.masks import correct, decouple, recover, rescale

FLOATS = st.floats(-100, 100, width=32, allow_nan=False, allow_subnormal=False)
PAIRS = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20)


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_decouple_by_hand():
    tau = t(1.0, 1.0, 1.0, -1.0, 0.0, 1.0)
    merged = t(1.5, 2.0, 2.5, 1.0, 1.0, 0.0)
    # 1 >= |1.5-1|; 1 >= |2-1|; 1 < |2.5-1|; signs differ; τ is 0; τ* is 0
    assert decouple(tau, merged).tolist() == [True, True, False, False, False, False]
    # λ = 2: |τ* - τ| may be half of |τ|;  λ = 0.5: twice
    assert decouple(tau, merged, 2.0).tolist() == [True, False, False, False, False, False]
    assert decouple(tau, merged, 0.5).tolist() == [True, True, True, False, False, False]


def test_decouple_sees_signs_of_numbers_whose_product_underflows():
    assert decouple(t(1e-30), t(1e-30)).tolist() == [True]


def test_decouple_refuses_a_negative_lambda():
    with pytest.raises(ValueError, match="lambda is -1"):
        decouple(t(1), t(1), -1)


@settings(deadline=None)
@given(PAIRS)
def test_at_lambda_1_no_other_mask_is_nearer(pairs):
    tau, merged = torch.tensor(pairs, dtype=torch.float32).T
    mask = decouple(tau, merged, 1.0)
    chosen = (mask * merged - tau).abs()
    other = (~mask * merged - tau).abs()
    assert bool((chosen <= other).all())


@settings(deadline=None)
@given(PAIRS, st.floats(0, 3), st.floats(0, 3))
def test_a_larger_lambda_keeps_fewer(pairs, one, two):
    tau, merged = torch.tensor(pairs, dtype=torch.float32).T
    low, high = sorted((one, two))
    assert bool((decouple(tau, merged, high) <= decouple(tau, merged, low)).all())


def test_all_ones_mask_is_the_merged_vector():
    merged = torch.randn(4, 6)
    assert torch.equal(recover(torch.ones(4, 6, dtype=torch.bool), merged), merged)


def test_rescale_by_hand():
    tau = torch.tensor([[2.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    merged = torch.tensor([[1.0, 2.0], [2.0, 5.0], [1.0, 1.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    # row 0: (2·1 + 4·2) / (1 + 4); row 1: (1·2) / 4; row 2 has no entry: 1
    torch.testing.assert_close(rescale(tau, mask, merged, "row"), t(2.0, 0.5, 1.0))
    torch.testing.assert_close(rescale(tau, mask, merged, "tensor"), t(12 / 9))
    assert rescale(tau, mask, merged, "none") is None
    with pytest.raises(ValueError, match="'rows', expected one of"):
        rescale(tau, mask, merged, "rows")


@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_rescale_is_the_least_squares_fit(kind):
    tau, merged = torch.randn(5, 40), torch.randn(5, 40)
    mask = decouple(tau, merged)
    scale = rescale(tau, mask, merged, kind)
    best = (recover(mask, merged, scale) - tau).square().sum()
    for step in (-1e-2, 1e-2):
        assert best < (recover(mask, merged, scale + step) - tau).square().sum()


def test_correct_by_hand():
    residual = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    b, a = correct(residual, 1)
    torch.testing.assert_close(b @ a, torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert b.shape == (3, 1) and a.shape == (1, 2)
    torch.testing.assert_close(b.norm(), a.norm())


@pytest.mark.parametrize("shape", [(30, 50), (300, 260), (260, 700)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_residual_of_low_rank_is_met_exactly(shape, rank):
    residual = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) * 1e-6
    b, a = correct(residual, rank)
    assert ((b @ a - residual).norm() / residual.norm()).item() < 2e-6


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_subspace_iteration_is_as_good_as_the_svd(rank, decay):
    """Also where it is hardest: a matrix of pure noise, whose singular values hardly fall."""
    residual = torch.randn(400, 300)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    s = s * (1 + torch.arange(300.0)).pow(-decay)
    residual = u * s @ v
    b, a = correct(residual, rank)
    captured = 1 - ((residual - b @ a).norm() / residual.norm()).item() ** 2
    optimum = (s[:rank].square().sum() / s.square().sum()).item()
    assert captured == pytest.approx(optimum, rel=0.02)


def test_correct_is_deterministic_and_does_not_touch_the_global_generator():
    residual = torch.randn(300, 300)
    state = torch.get_rng_state()
    first, second = correct(residual, 8), correct(residual, 8)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_correct_of_nothing():
    b, a = correct(torch.zeros(5, 3), 2)
    assert not b.any() and not a.any() and b.shape == (5, 2) and a.shape == (2, 3)
    b, a = correct(torch.randn(5, 3), 0)
    assert b.shape == (5, 0) and a.shape == (0, 3)
    b, a = correct(torch.randn(5, 3), 9)
    assert b.shape == (5, 3) and a.shape == (3, 3)
    with pytest.raises(ValueError, match="a matrix and a rank"):
        correct(torch.randn(5), 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**31))
def test_each_step_brings_the_expert_nearer(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    tau, merged = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    mask = decouple(tau, merged)
    scale = rescale(tau, mask, merged, "row")
    correction = correct(tau - recover(mask, merged, scale), rank)
    errors = [
        (recover(*parts) - tau).norm().item()
        for parts in (
            (torch.zeros_like(mask), merged),
            (mask, merged),
            (mask, merged, scale),
            (mask, merged, scale, correction),
        )
    ]
    assert all(after <= before + 1e-4 for before, after in zip(errors, errors[1:], strict=False))
