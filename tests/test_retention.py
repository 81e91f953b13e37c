"""Retention by value: intervals from the literature, shares by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation_mmer.lab.datasets import LabItem
from evaluation_mmer.retention import Score, batched, evaluate, wilson


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81/263 and 15/148 and 0/20
    assert [round(x, 4) for x in wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(x, 4) for x in wilson(15, 148)] == [0.0624, 0.1605]
    assert [round(x, 4) for x in wilson(0, 20)] == [0.0, 0.1611]


@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_share_and_stays_inside(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert -1e-12 <= low <= right / n + 1e-12 and right / n <= high + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize(("right", "n"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(right, n):
    with pytest.raises(ValueError, match="right answers of"):
        wilson(right, n)


def test_retention_and_agreement_by_hand():
    original = Score(("bag", "coat", "shirt", "dress"), (True, True, False, True))
    merged = Score(("bag", "shirt", "shirt", "dress"), (True, False, False, True))
    assert merged.retention(original) == pytest.approx(2 / 3)
    assert merged.agreement(original) == 0.75
    with pytest.raises(ValueError, match="nothing right"):
        merged.retention(Score(("x",), (False,)))


def test_what_tables_show_of_a_score():
    original = Score(("a", "b", "c", "d"), (True, True, False, True))
    merged = Score(("a", "b", "x", "y"), (True, True, False, False))
    shown = merged.against(original)
    assert shown.pop("interval") == list(wilson(2, 4))
    assert shown == {"n": 4, "accuracy": 0.5, "retention": pytest.approx(2 / 3), "agreement": 0.5}


def test_evaluate_sends_all_tokens_through_the_asked_route():
    class Echo:
        def generate(self, input_ids, **kwargs):
            self.kwargs = kwargs
            return torch.cat([input_ids, kwargs.get("route_ids", input_ids)[:, :1]], 1)

    model, items = Echo(), [LabItem(None, "?", "2"), LabItem(None, "?", "7")]
    batches = [{"input_ids": torch.tensor([[2, 3]])}, {"input_ids": torch.tensor([[5, 6]])}]
    out = evaluate(model, lambda tokens: [str(int(row[0])) for row in tokens], batches, items, route=2)
    assert out.answers == ("2", "2") and out.right == (True, False)
    assert model.kwargs["text_route"].tolist() == [2] and model.kwargs["do_sample"] is False
    out = evaluate(model, lambda tokens: [str(int(row[0])) for row in tokens], batches, items)
    assert out.answers == ("2", "5") and "route_ids" not in model.kwargs


def test_batched():
    assert batched([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
