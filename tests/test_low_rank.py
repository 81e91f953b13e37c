"""Corrections: against the full SVD in fp64, where they are hardest, at the edges, and the bits from many threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer.low_rank import correct
from merging_mmer.task_vectors import one_thread


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(shape, values, seed=0):
    """A matrix of these singular values, fp32."""
    rows, columns = shape
    left = torch.linalg.qr(gaussian(rows, len(values), seed=seed).double()).Q
    right = torch.linalg.qr(gaussian(columns, len(values), seed=seed + 1).double()).Q
    return (left * values.double() @ right.T).float()


def against_optimum(residual, rank):
    """(‖R - BA‖ / the smallest possible, ‖BA‖² / the largest possible), all in fp64."""
    b, a = (factor.double() for factor in correct(residual, rank))
    squares = torch.linalg.svdvals(residual.double()).square()
    distance = (residual.double() - b @ a).norm() / squares[rank:].sum().sqrt()
    return distance.item(), ((b @ a).square().sum() / squares[:rank].sum()).item()


def check_form(residual, rank):
    """B and A share singular values that fall, their directions are orthogonal, and A's largest entries positive."""
    b, a = correct(residual, rank)
    assert b.shape == (len(residual), min(rank, *residual.shape)) and a.shape == (b.shape[1], residual.shape[1])
    assert b.dtype == a.dtype == torch.float32
    left, right = (b.T @ b).double(), (a @ a.T).double()
    torch.testing.assert_close(left, right, atol=1e-5 * float(right.max()), rtol=1e-5)
    assert bool((right - right.diag().diag()).abs().max() <= 2e-5 * right.max())
    assert bool((right.diag().diff() <= 1e-5 * right.max()).all())
    assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) >= 0).all())
    return b, a


@pytest.mark.parametrize("shape", [(70, 70), (96, 300), (400, 300), (260, 700)])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_noise_is_met_within_a_thousandth_of_the_optimum(shape, rank):
    """The hardest residual: singular values that hardly fall."""
    distance, _ = against_optimum(gaussian(*shape), rank)
    assert 1 - 1e-6 < distance < 1.0006
    check_form(gaussian(*shape), rank)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("decay", [0.3, 0.5, 1.0, 2.0])
def test_falling_singular_values(shape, decay):
    values = torch.arange(1.0, 201.0).pow(-decay)
    distance, captured = against_optimum(with_spectrum(shape, values), 8)
    assert distance < 1.0005 and captured > 0.999
    check_form(with_spectrum(shape, values), 8)


def test_one_direction_does_not_hide_what_lies_far_below_it():
    values = torch.cat([torch.ones(1), 1e-4 * torch.arange(1.0, 200.0).pow(-0.5)])
    distance, _ = against_optimum(with_spectrum((300, 200), values), 8)
    assert distance < 1.0005


@pytest.mark.parametrize("shape", [(30, 50), (66, 66), (300, 260), (260, 700)])
@pytest.mark.parametrize("rank", [1, 4, 12, 40])
def test_a_residual_of_low_rank_is_met_exactly(shape, rank):
    own = min(rank, *shape)
    for true in {1, own}:
        residual = gaussian(shape[0], true) @ gaussian(true, shape[1], seed=1) * 1e-6
        b, a = check_form(residual, rank)
        assert ((b @ a - residual).norm() / residual.norm()).item() < (2e-6 if true == own else 5e-6)


def test_low_rank_with_singular_values_far_apart():
    values = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
    residual = with_spectrum((300, 200), values)
    b, a = correct(residual, 6)
    assert ((b @ a - residual).norm() / residual.norm()).item() < 5e-7
    torch.testing.assert_close(b.norm(dim=0).square(), values, rtol=2e-2, atol=0)


def test_few_rows_or_columns_hold_everything():
    for rows in ([3], [0, 299], list(range(8))):
        residual = torch.zeros(300, 200)
        residual[rows] = gaussian(len(rows), 200)
        for matrix in (residual, residual.T):
            b, a = correct(matrix, 8)
            assert ((b @ a - matrix).norm() / matrix.norm()).item() < 2e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (5, 3), (64, 300), (65, 90)])
def test_all_of_its_rank_is_the_matrix_itself(shape):
    residual = gaussian(*shape)
    b, a = check_form(residual, max(shape))
    assert ((b @ a - residual).norm() / residual.norm()).item() < 2e-6


@pytest.mark.parametrize("shape", [(20, 30), (100, 150)])
@pytest.mark.parametrize("power", [-140, -120, -60, -30, 30, 60, 100, 120])
def test_any_scale_gives_the_same_directions(shape, power):
    """Also where squares of the entries are 0 or infinite in fp32. 2**-140 is below the smallest normal number."""
    residual = gaussian(*shape)
    tiny = residual * 2.0**power
    b, a = (factor.double() for factor in correct(tiny, 4))
    plain_b, plain_a = (factor.double() for factor in correct(residual, 4))
    distance = (b @ a * 2.0**-power - plain_b @ plain_a).norm() / (plain_b @ plain_a).norm()
    assert distance < (5e-5 if power > -126 else 0.05)


@pytest.mark.parametrize("shape", [(5, 3), (300, 200)])
def test_nothing(shape):
    b, a = correct(torch.zeros(shape), 2)
    assert not b.any() and not a.any() and b.shape == (shape[0], 2) and a.shape == (2, shape[1])
    b, a = correct(gaussian(*shape), 0)
    assert b.shape == (shape[0], 0) and a.shape == (0, shape[1])
    b, a = correct(torch.zeros(0, 3), 2)
    assert b.shape == (0, 0) and a.shape == (0, 3)


@pytest.mark.parametrize("shape", [(5, 3), (300, 200)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_are_refused(shape, broken):
    residual = gaussian(*shape)
    residual[2, 1] = broken
    with pytest.raises(ValueError, match="NaN or infinity"):
        correct(residual, 2)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="a matrix and a rank"):
        correct(torch.ones(5), 2)
    with pytest.raises(ValueError, match="rank -1"):
        correct(torch.ones(5, 2), -1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.integers(0, 90), st.integers(0, 2**31))
def test_any_shape_and_any_rank(rows, columns, rank, true, seed):
    """Around the size from which on the SVD is not taken in full, and around the width of a block."""
    residual = gaussian(rows, true, seed=seed) @ gaussian(true, columns, seed=seed + 1)
    b, a = correct(residual, rank)
    squares = torch.linalg.svdvals(residual.double()).square()
    optimum = squares[min(rank, len(squares)) :].sum().item()
    distance = (residual.double() - b.double() @ a.double()).square().sum().item()
    assert distance <= optimum * 1.002 + squares.sum().item() * 1e-11
    assert distance >= optimum * (1 - 1e-5) - squares.sum().item() * 1e-11


def test_the_residual_is_read_alone_and_its_layout_does_not_show():
    residual = gaussian(300, 200)
    kept = residual.clone()
    state = torch.get_rng_state()
    plain = correct(residual, 8)
    assert torch.equal(residual, kept) and torch.equal(torch.get_rng_state(), state)
    shifted = torch.empty(residual.numel() + 3)[3:].view(300, 200).copy_(residual)
    for same in (residual.T.contiguous().T, shifted, residual.double()):
        assert all(torch.equal(x, y) for x, y in zip(correct(same, 8), plain, strict=True))


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_bits_are_those_of_one_thread_whoever_calls(two_threads):
    residuals = [gaussian(280 + 8 * i, 260, seed=i) for i in range(4)]
    with one_thread():
        alone = [correct(residual, 8) for residual in residuals]
    calls = [i for i in range(4) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: (i, correct(residuals[i], 8)), calls))
    found += [(i, correct(residuals[i], 8)) for i in range(4)]
    for i, factors in found:
        assert all(torch.equal(x, y) for x, y in zip(factors, alone[i], strict=True))
    assert torch.get_num_threads() == 2


def test_threads_that_enter_and_leave_at_different_times_are_each_alone_inside(two_threads):
    """A thread that leaves puts its own number back, and no other's; the process is left as it was found."""
    entered, begun, left, seen = threading.Event(), threading.Event(), threading.Event(), {}

    def other():
        seen["before"] = torch.get_num_threads()
        with one_thread():
            entered.set()
            assert left.wait(30)
            seen["inside, after the first has left"] = torch.get_num_threads()
        seen["after"] = torch.get_num_threads()

    def begun_inside():
        with one_thread():
            begun.set()
            assert left.wait(30)
            thread.join()
            seen["begun inside, the last to leave"] = torch.get_num_threads()

    def begun_after():
        seen["begun after"] = torch.get_num_threads()

    thread, late, last = (threading.Thread(target=target) for target in (other, begun_inside, begun_after))
    thread.start()
    assert entered.wait(30)
    with one_thread():
        late.start()
        assert begun.wait(30)
    left.set()
    late.join()
    last.start()
    last.join()
    assert seen == {
        "before": 2,
        "inside, after the first has left": 1,
        "after": 2,
        "begun inside, the last to leave": 1,
        "begun after": 2,
    }
    assert torch.get_num_threads() == 2


def test_what_is_raised_inside_restores_the_number_of_threads(two_threads):
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
