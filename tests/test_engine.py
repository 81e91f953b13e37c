"""The parts of the merging engine: rows of task vectors, exact thresholds, matrices in blocks against whole ones."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging_mmer import selection, task_rows, workers
from merging_mmer.experts import Base, open_expert
from merging_mmer.matrices import rows_of_blocks
from merging_mmer.recipe import ExpertRecipe
from merging_mmer.selection import shares_of_ties, threshold_of
from merging_mmer.task_rows import FORMATS, ProductRows, TaskRows
from merging_mmer.tensor_work import TensorWork

from . import tiny_checkpoints as tiny
from .test_merge import lora_world
from .tiny_merges import base_tokenizer, run, world

# rows of task vectors


def whole(rows, shape, size):
    out = np.full(shape, np.nan, np.float32)
    for block in rows_of_blocks(*shape, size):
        rows.into(block, out[block])
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("float32",) * 2, ("float16", "bfloat16")])
@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_rows_are_those_of_the_task_vector(tmp_path, dtypes, size):
    of_base, of_expert = (getattr(torch, name) for name in dtypes)
    model = tiny.base_model(dtype=of_base)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = tiny.expert_model("llava", model, seed=1, extra_rows=2, noise=0.01).to(of_expert)
    expert = open_expert("own", ExpertRecipe(model=str(tiny.save(trained, tmp_path / "expert"))), base)
    tokens, seen = len(base_tokenizer()), 0
    for name in base.delta_weights:
        theta_0 = base.tensor(name)
        rows = TaskRows(expert, name, theta_0, tokens)
        want = expert.task_vector(name, theta_0, tokens)
        assert torch.equal(whole(rows, theta_0.shape, size), want)
        assert rows.changes() == rows.dense_changes() == bool(want.any())
        seen += bool(want.any())
    assert seen > 10 and tokens < tiny.ROWS


def test_rows_of_a_lora(tmp_path):
    recipe = lora_world(tmp_path, target_modules=["q_proj", "up_proj", "embed_tokens"])
    base = Base(recipe["base"])
    expert = open_expert("image", ExpertRecipe.model_validate(recipe["experts"]["image"]), base)
    tokens = len(base_tokenizer())
    changed = []
    for name in base.delta_weights:
        theta_0 = base.tensor(name)
        rows, want = TaskRows(expert, name, theta_0, tokens), expert.task_vector(name, theta_0, tokens)
        got = whole(rows, theta_0.shape, 10**6)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        for size in (1, 33, 500):
            assert torch.equal(whole(rows, theta_0.shape, size), got)
        assert not rows.dense_changes() and rows.changes() == bool(want.any())
        changed += [name] if rows.changes() else []
    assert sorted({name.split(".")[-2] for name in changed}) == ["embed_tokens", "q_proj", "up_proj"]


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 4), st.integers(1, 90))
@settings(deadline=None, max_examples=60)
def test_rows_of_a_product(rows, columns, rank, step):
    generator = torch.Generator().manual_seed(rows * columns)
    b, a = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    product, got = ProductRows(b, a), np.full((rows, columns), np.nan, np.float32)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        product.into(part, got[part])
    np.testing.assert_allclose(got, (b.double() @ a.double()).numpy(), rtol=1e-4, atol=1e-5)


def test_another_shape_is_refused(tmp_path):
    model = tiny.base_model()
    base = Base(str(tiny.save(model, tmp_path / "base")))
    expert = open_expert(
        "own", ExpertRecipe(model=str(tiny.save(tiny.expert_model("llava", model, seed=1), tmp_path / "expert"))), base
    )
    name = "layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"has shape \(32, 32\), the base's \(32, 31\)"):
        TaskRows(expert, name, base.tensor(name)[:, :31], 10)
    with pytest.raises(ValueError, match="expected the same width"):
        TaskRows(expert, "embed_tokens.weight", torch.zeros(tiny.ROWS, 31), 10)


# thresholds


class Given:
    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)
        self.shape, self.rows = self.values.shape, len(values)

    def into(self, rows, out):
        out[:] = self.values[rows].numpy()

    def sample(self):
        return np.empty(0, np.float32)


class Sampled(Given):
    """With a sample that may be of anything."""

    def __init__(self, values, sample):
        super().__init__(values)
        self.drawn, self.passes = np.abs(np.array(sample, np.float32)), []

    def into(self, rows, out):
        self.passes.append("fp32")
        super().into(rows, out)

    def sample(self):
        return self.drawn

    def between(self, rows, low, high, found, counts):
        self.passes.append("raw")
        sizes = [abs(float(value)) for value in self.values[rows].flatten()]
        within = [size for size in sizes if low < size < high]
        found[: len(within)] = within
        counts[:] = sum(s > high for s in sizes), sizes.count(high), sizes.count(low), len(within)


@st.composite
def matrices(draw):
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 0.5, -3.0, 1e-40, 7e30])
    any_ = st.floats(-4, 4, width=32)
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    one = st.lists(draw(st.sampled_from([few, any_])), min_size=columns, max_size=columns)
    return draw(st.lists(one, min_size=rows, max_size=rows))


@given(matrices(), st.floats(0.01, 0.99), st.integers(1, 20))
@settings(deadline=None, max_examples=200)
def test_the_threshold_keeps_what_a_sort_keeps(values, density, size):
    tau = Given(values)
    threshold, ties = threshold_of(tau, rows_of_blocks(*tau.shape, size), density)
    magnitudes = [abs(float(value)) for value in tau.values.flatten()]
    kept = math.ceil(Fraction(str(density)) * len(magnitudes))
    ordered = sorted(magnitudes, reverse=True)
    assert threshold == ordered[kept - 1]
    assert ties == ordered[:kept].count(threshold)


@given(matrices(), st.floats(0.01, 0.99), st.integers(1, 20), st.integers(0, 3), st.sampled_from([0, 1, 5]))
@settings(deadline=None, max_examples=150)
def test_the_threshold_is_right_whatever_the_sample(values, density, size, of, deviations):
    whole = [value for row in values for value in row]
    tau = Sampled(values, (whole, whole[:1], whole[::3], [0.5, 2.0])[of])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_DEVIATIONS", deviations)
        found = threshold_of(tau, rows_of_blocks(*tau.shape, size), density)
    assert found == threshold_of(Given(values), rows_of_blocks(*tau.shape, size), density)


def test_one_pass_is_enough_with_a_good_sample():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (64, 500)).astype(np.float32)
    tau = Sampled(values, rng.permutation(values.ravel())[:4000])
    expected = float(np.sort(np.abs(values).ravel())[-6400]), 1
    assert threshold_of(tau, rows_of_blocks(64, 500, 5000), 0.2) == expected
    assert set(tau.passes) == {"raw"}
    tau = Sampled(values, rng.permutation(values.ravel())[:4000] / 2)  # of another tensor
    assert threshold_of(tau, rows_of_blocks(64, 500, 5000), 0.2) == expected
    assert "fp32" in tau.passes


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("float32",) * 2, ("float16", "bfloat16")])
def test_samples_are_of_the_rows_that_are_the_bases(tmp_path, monkeypatch, dtypes):
    of_base, of_expert = (getattr(torch, name) for name in dtypes)
    monkeypatch.setattr(task_rows, "_LINES", 8)
    model = tiny.base_model(dtype=of_base)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = tiny.expert_model("llava", model, seed=1, extra_rows=2, noise=0.01).to(of_expert)
    expert = open_expert("own", ExpertRecipe(model=str(tiny.save(trained, tmp_path / "expert"))), base)
    tokens = len(base_tokenizer())
    for name in base.delta_weights:
        theta_0 = base.tensor(name)
        rows, tau = TaskRows(expert, name, theta_0, tokens), expert.task_vector(name, theta_0, tokens)
        sample, own = rows.sample(), tau[: rows.rows].abs()
        assert np.array_equal(sample, rows.sample())
        if "float32" in dtypes or of_base != of_expert:
            assert not len(sample) and all(rows.patterns(fmt) is None for fmt in FORMATS.values())
            continue
        assert len(sample) >= min(8 * 32, own.numel() // 32 * 32) and set(sample) <= set(own.flatten().tolist())
        last, counts = slice(len(theta_0) - 7, len(theta_0)), np.empty(4, np.int64)
        rows.between(last, 0.0, math.inf, np.empty(7 * rows.shape[1] + 1, np.float32), counts)
        assert counts.sum() == own[last.start :].numel() and counts[3] == int((own[last.start :] != 0).sum())
        for density in (0.05, 0.5, 0.999):
            found = threshold_of(rows, rows_of_blocks(*rows.shape, 300), density)
            assert found == threshold_of(Given(tau), [slice(0, len(tau))], density)


def test_nothing_is_trimmed_at_density_1():
    assert threshold_of(Given([[1.0]]), [slice(0, 1)], 1) == (-1.0, 0)


@pytest.mark.parametrize(
    ("equal", "ties", "want"), [([3, 0, 2, 4], 4, [3, 0, 1, 0]), ([1, 1], 9, [1, 1]), ([2], 0, [0])]
)
def test_ties_go_to_the_first_tensors(equal, ties, want):
    assert shares_of_ties(equal, ties) == want


# matrices


class Whole:
    """`MatrixWork`, with the functions of ties.py and masks.py on whole tensors."""

    def __init__(self, job, name):
        self.work = TensorWork(job, name)

    def run(self):
        return self.work.matrix()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"density": 0.3}},
        {"method": {"density": 0.3, "scope": "model", "alpha": 0.7}, "decoupling": {"kind": "paper", "lambda": 0.8}},
        {"method": {"name": "task_arithmetic", "alpha": 0.4}, "decoupling": {"scale": "tensor", "rank": 0}},
        {"method": {"name": "emr"}, "decoupling": {"scale": "none", "rank": 3}},
        {"decoupling": {"kind": "none"}},
        {"dtype": "float16", "decoupling": {"rank": 0}},
        {"dtype": "float32"},
    ],
    ids=json.dumps,
)
def test_blocks_give_what_whole_tensors_give(tmp_path, monkeypatch, changes):
    recipe = world(tmp_path, torch.bfloat16)
    recipe["experts"]["audio"] = {"model": recipe["experts"]["audio"], "weight": 0.5}
    blocks = run({**recipe, **changes}, tmp_path / "blocks", block=300)
    monkeypatch.setattr(workers, "MatrixWork", Whole)
    wholes = run({**recipe, **changes}, tmp_path / "whole")
    got, want = tiny.tensors(tmp_path / "blocks"), tiny.tensors(tmp_path / "whole")
    assert set(got) == set(want)
    for name, tensor in want.items():
        if name.endswith((".scales", ".correction_a", ".correction_b")):  # sums and factors, rounded
            torch.testing.assert_close(got[name], tensor, rtol=0.01, atol=2e-4)
        else:
            assert torch.equal(got[name], tensor), name
    for name, numbers in wholes.experts.items():
        for key, value in numbers["total"].items():
            expected = value if value is None else pytest.approx(value, rel=1e-4)
            assert blocks.experts[name]["total"][key] == expected, key
        for key in ("distance_to_base", "cosine_to_base", "bits_per_parameter"):
            assert blocks.experts[name][key] == pytest.approx(numbers[key], rel=1e-6)
    assert blocks.sign_conflicts == wholes.sign_conflicts and blocks.tensors == wholes.tensors


def test_exact_factors_in_blocks(tmp_path, monkeypatch):
    recipe = lora_world(tmp_path)
    blocks = run(recipe, tmp_path / "blocks", block=300)
    monkeypatch.setattr(workers, "MatrixWork", Whole)
    wholes = run(recipe, tmp_path / "whole")
    got, want = tiny.tensors(tmp_path / "blocks"), tiny.tensors(tmp_path / "whole")
    assert set(got) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-8)  # τ is a product here
        if ".delta" not in name:
            assert torch.equal(got[name], tensor), name
    for name, numbers in wholes.experts.items():
        assert blocks.experts[name]["total"]["residual"] == pytest.approx(numbers["total"]["residual"], abs=1e-6)
