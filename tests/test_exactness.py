"""The numbers of a whole merge, to the last bit: against formulas worked out apart, and against other ways to do it.

The formulas are those of TIES (trim, elect, disjoint mean), task arithmetic and EMR's unified vector, of the binary
mask and of the least-squares scale, worked out here entry by entry in exact fractions. Where a sum of three or more
nearly cancels, rounding may elect either sign: such entries are left out, and may be few.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from merging_mmer.ties import kept_count

from .tiny_matrices import Merged, Sizes, World, run

ULP = 2.0**-24  # half of it, of fp32
KINDS = ("normal", "grid", "sparse", "minute", "zero")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Matrices and norms of one element among them."""
    return World(tmp_path_factory.mktemp("single"), Sizes(hidden=1, ffn=1))


def drawn(kind: str, shape, generator):
    """(θ₀, a function that draws a θᵢ), fp32."""
    theta_0 = torch.randn(shape, generator=generator)
    if kind == "grid":  # every sum is exact, and many magnitudes are equal
        theta_0 = (theta_0 * 64).round() / 64
        return theta_0, lambda: theta_0 + torch.randint(-2, 3, shape, generator=generator) / 16
    if kind == "sparse":
        some = lambda: torch.rand(shape, generator=generator) < 0.2  # noqa: E731
        return theta_0, lambda: torch.where(some(), theta_0 + 0.1, theta_0)
    if kind == "minute":  # task vectors whose squares vanish in fp32
        theta_0[::2] = 0
        return theta_0, lambda: torch.where(theta_0 == 0, 1e-30 * torch.randn(shape, generator=generator), theta_0)
    if kind == "zero":
        return theta_0, lambda: theta_0.clone()
    return theta_0, lambda: theta_0 + 0.1 * torch.randn(shape, generator=generator)


def fill(world, experts: int, seed: int, kinds=KINDS, dtype=torch.float32):
    """Write random weights; (θ₀, [θᵢ], [τᵢ]) by name, as they are on disk, fp32."""
    generator = torch.Generator().manual_seed(seed)
    theta_0, thetas = {}, [{} for _ in range(experts)]
    for place, (name, shape) in enumerate(world.sizes.shapes().items()):
        start, draw = drawn(kinds[(place + seed) % len(kinds)], shape, generator)
        theta_0[name] = start.to(dtype).float()
        for theta in thetas:
            theta[name] = draw().to(dtype).float()
    world.write(theta_0, thetas, dtype)
    taus = [{name: torch.from_numpy(of[name].numpy() - theta_0[name].numpy()) for name in theta_0} for of in thetas]
    return theta_0, thetas, taus


# the formulas, entry by entry


def largest(values: list[float], kept: int) -> set[int]:
    """The places of the `kept` largest magnitudes; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda place: -abs(values[place]))[:kept])


def trimmed(tau: dict, density: Fraction, scope: str) -> dict[str, list[float]]:
    flat = {name: tensor.flatten().tolist() for name, tensor in tau.items()}
    groups = [list(flat)] if scope == "model" else [[name] for name in flat]
    found = {}
    for names in groups:
        values = [value for name in names for value in flat[name]]
        stay = largest(values, math.ceil(density * len(values)))
        left = iter([value if place in stay else 0.0 for place, value in enumerate(values)])
        found |= {name: list(itertools.islice(left, len(flat[name]))) for name in names}
    return found


def merged_entry(method: str, values: list[float], weights: list[Fraction], alpha: Fraction):
    """(τ*, what rounding may change of it) of one entry, exactly; None where rounding may elect another sign."""
    terms = [weight * Fraction(value) for weight, value in zip(weights, values, strict=True)]
    total, size = sum(terms), sum(map(abs, terms))
    if method == "task_arithmetic":
        return alpha * total, 16 * ULP * float(abs(alpha) * size)
    if total and abs(total) <= 16 * ULP * size:
        return None
    agree = [place for place, term in enumerate(terms) if term * total > 0]
    if not agree:
        return Fraction(0), 0.0
    if method == "ties":
        found = alpha * sum(terms[place] for place in agree) / sum(weights[place] for place in agree)
    else:
        found = alpha * max((Fraction(values[place]) for place in agree), key=abs)
    return found, 16 * ULP * float(abs(found))


def check_merged(found: torch.Tensor, values: list[list[float]], method, weights, alpha, also: float = 0.0) -> int:
    """Compare a tensor's τ* with the formula; how many entries were left out. `also`: rounding that came later."""
    unclear = 0
    for place, entry in enumerate(found.flatten().tolist()):
        exact = merged_entry(method, [of[place] for of in values], weights, alpha)
        if exact is None:
            unclear += 1
            continue
        wanted, rounding = exact
        assert abs(entry - float(wanted)) <= rounding + also + 1e-44, (place, entry, float(wanted))
    return unclear


def slow_mask(tau, merged, lam):
    """m = 1 where τ·τ* > 0 and |τ| >= λ|τ* - τ|, in fp32 as all arithmetic is."""
    lam, bits = np.float32(lam), []
    for x, y in zip(tau.numpy().flatten(), merged.numpy().flatten(), strict=True):
        bits.append(bool(((x > 0) == (y > 0)) and x != 0 and y != 0 and abs(x) >= lam * abs(y - x)))
    return torch.tensor(bits).view(tau.shape)


def slow_scale(tau, own):
    """The s that minimises ‖s·own - τ‖, 1 where own is 0."""
    above = math.fsum(x * y for x, y in zip(tau.double().flatten().tolist(), own.double().flatten().tolist()))
    below = math.fsum(y * y for y in own.double().flatten().tolist())
    return above / below if below else 1.0


def check_decoupled(merged, tau, place: int, name: str, delta, lam, scale):
    """Mask and scale of one expert in one matrix."""
    mask = merged.mask(name, place, tau.shape[1])
    assert torch.equal(mask, slow_mask(tau, delta, lam)), name
    own = mask * delta
    scales = merged.part(name, "scales")
    if scale == "none":
        assert scales is None
        return
    wanted = [slow_scale(*rows) for rows in zip(tau, own)] if scale == "row" else [slow_scale(tau, own)]
    torch.testing.assert_close(scales[place], torch.tensor(wanted), rtol=1e-6, atol=0)


RECIPES = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 8),
        "seed": st.integers(0, 2**16),
        "weights": st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=8, max_size=8),
        "alpha": st.sampled_from([1.0, 0.5, 1.25]),
        "density": st.sampled_from([1.0, 0.5, 0.2, 0.07, 1e-9]),
        "scope": st.sampled_from(["tensor", "model"]),
        "lam": st.sampled_from([1.0, 0.5, 2.0]),
        "scale": st.sampled_from(["row", "tensor", "none"]),
    }
)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "emr"])
def test_whole_merges_against_the_formulas(world, tmp_path_factory, method):
    @settings(
        max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # no shrinking: an example is a whole merge
    )  # fmt: skip
    @given(drawn=RECIPES)
    def check(drawn):
        check_a_merge(world, tmp_path_factory.mktemp("merge"), method, **drawn)

    check()


def test_matrices_of_one_element(single, tmp_path):
    shapes = set(single.sizes.shapes().values())
    assert {(1, 1), (1,)} <= shapes
    for seed, method in enumerate(("ties", "task_arithmetic", "emr")):
        check_a_merge(single, tmp_path / method, method, 3, seed, [1.0, 2.0, 0.5], 1.0, 0.5, "tensor", 1.0, "row")


def test_weights_that_no_binary_fraction_holds(world, tmp_path):
    weights = [0.3, 1.7, 0.9]
    check_a_merge(world, tmp_path, "ties", 3, 4, weights, 0.7, 0.3, "tensor", 0.9, "row", ("normal",))


def check_a_merge(world, folder, method, experts, seed, weights, alpha, density, scope, lam, scale, kinds=KINDS):
    """Merge random weights by a recipe and compare every tensor of the language model with the formulas."""
    density = density if method == "ties" else 1.0
    theta_0, thetas, taus = fill(world, experts, seed, kinds)
    recipe = world.recipe(
        list(range(experts)), method={"name": method, "density": density, "scope": scope, "alpha": alpha},
        decoupling={"kind": "mask", "lambda": lam, "scale": scale, "rank": 0}, dtype="float32",
        of={f"e{place}": {"weight": weights[place]} for place in range(experts)},
    )  # fmt: skip
    merged = run(recipe, folder / "out")
    shares = [Fraction(str(weight)) for weight in weights[:experts]]
    exact_alpha, kept = Fraction(str(alpha)), [trimmed(tau, Fraction(str(density)), scope) for tau in taus]
    unclear = 0
    for name, start in theta_0.items():
        changed = any(bool(tau[name].any()) for tau in taus)
        found = merged.tau(name, start)
        assert (found is not None) == changed, name
        stored = merged.stored[name if name.startswith("lm_head") else f"model.language_model.{name}"]
        assert torch.equal(stored, start)
        if not changed:
            continue
        later = 0.0 if start.ndim == 2 else 4 * ULP * float(start.abs().max() + found.abs().max())
        unclear += check_merged(found, [of[name] for of in kept], method, shares, exact_alpha, later)
        for place in range(experts):
            if start.ndim == 2:
                check_decoupled(merged, taus[place][name], place, name, found, lam, scale)
            else:  # too small to compress: each expert's own
                assert torch.equal(merged.part(name, "expert_weight")[place], thetas[place][name])
    assert unclear <= 0.01 * sum(start.numel() for start in theta_0.values())


# one expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_expert_at_density_1_comes_back_within_one_rounding(world, tmp_path, dtype):
    theta_0, thetas, taus = fill(world, 1, 1, ("normal", "grid"), dtype)
    merged = run(world.recipe([0], decoupling={"kind": "paper"}), tmp_path / "out")
    for name, start in theta_0.items():
        if start.ndim == 2:
            delta, tau = merged.part(name, "delta"), taus[0][name]
            assert delta.dtype == dtype and torch.equal(delta, tau.to(dtype))
            assert torch.equal(merged.mask(name, 0, start.shape[1]), tau != 0)
        else:
            assert torch.equal(merged.part(name, "expert_weight")[0].float(), thetas[0][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("density", [0.2, 1e-9])
def test_exactly_k_entries_stay_and_of_equal_ones_the_first(world, tmp_path, dtype, scope, density):
    """k = ⌈density · n⌉ is never 0: at the smallest density one entry of each tensor (or of the model) stays.

    Differences of 16-bit weights, and of the grid, are equal by the hundred: the threshold lies among them.
    """
    theta_0, _, (tau,) = fill(world, 1, 3, ("grid", "normal", "grid", "grid"), dtype)
    recipe = world.recipe([0], method={"density": density, "scope": scope}, decoupling={"kind": "paper"})
    merged = run(recipe, tmp_path / "out")
    kept = trimmed(tau, Fraction(str(density)), scope)
    total = sum(start.numel() for start in theta_0.values())
    for name, start in theta_0.items():
        if start.ndim == 2:
            stays = torch.tensor(kept[name]).view(start.shape)
            assert torch.equal(merged.part(name, "delta"), stays.to(dtype)), name
            if scope == "tensor":
                assert int((stays != 0).sum()) == math.ceil(Fraction(str(density)) * start.numel()) >= 1
    if scope == "model":
        stayed = sum(value != 0 for values in kept.values() for value in values)
        assert stayed == math.ceil(Fraction(str(density)) * total)


def test_no_density_keeps_nothing():
    assert [kept_count(n, 1e-12) for n in (1, 2, 1000)] == [1, 1, 1]
    with pytest.raises(ValueError, match="0 < density <= 1"):
        kept_count(10, 0.0)


# experts that changed nothing


def test_an_expert_that_is_the_base_takes_no_part(world, tmp_path):
    theta_0, thetas, _ = fill(world, 2, 5, ("normal",))
    world.write(theta_0, [*thetas, theta_0])
    decoupling = {"kind": "mask", "scale": "row", "rank": 2}
    two = run(world.recipe([0, 1], decoupling=decoupling), tmp_path / "two")
    three = run(world.recipe([0, 1, 2], decoupling=decoupling), tmp_path / "three")
    for name, start in theta_0.items():
        if start.ndim == 2:
            assert torch.equal(two.part(name, "delta"), three.part(name, "delta"))
            assert not three.mask(name, 2, start.shape[1]).any()
            assert bool((three.part(name, "scales")[2] == 1).all())
            assert not three.part(name, "correction_b")[2].any() or not three.part(name, "correction_a")[2].any()
        else:
            assert torch.equal(three.part(name, "expert_weight")[2], start)
            assert torch.equal(two.part(name, "merged_weight"), three.part(name, "merged_weight"))
    assert three.report["experts"]["e2"]["total"]["norm"] == 0


def test_what_no_expert_changed_is_stored_once(world, tmp_path):
    theta_0, _, _ = fill(world, 2, 6, ("zero",))
    merged = run(world.recipe([0, 1]), tmp_path / "out")
    language = [name for name in merged.stored if "language_model" in name or name.startswith("lm_head")]
    assert len(language) == len(theta_0)
    assert merged.report["tensors"] == {"changed": 0, "equal_to_base": len(theta_0), "parameters_changed": 0}


# other ways to the same bytes

WAYS = {
    "default": {"decoupling": {"kind": "mask", "scale": "row", "rank": 3}},
    "one threshold": {"method": {"density": 0.3, "scope": "model"}, "decoupling": {"scale": "tensor", "rank": 2}},
    "trimmed": {"method": {"density": 0.3}, "decoupling": {"kind": "paper"}},
    "emr": {"method": {"name": "emr"}, "decoupling": {"scale": "tensor", "rank": 0}},
    "static": {"decoupling": {"kind": "none"}},
}


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a merged folder, but for the time that its merge took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = json.loads(found["merge_report.json"])
    del report["seconds"]
    return found | {"merge_report.json": json.dumps(report).encode()}


def values(folder: Path) -> dict[str, bytes]:
    stored = Merged(folder).stored.items()
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in stored}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three experts in bf16; both sides of some matrices are past what a full SVD is used for."""
    made = World(tmp_path_factory.mktemp("three"), Sizes(hidden=136, ffn=144), experts=3)
    fill(made, 3, 7, ("normal", "grid", "sparse", "normal"), torch.bfloat16)
    return made


@pytest.mark.parametrize("way", WAYS)
def test_threads_and_blocks_change_no_byte(three, tmp_path, way):
    recipe, size = three.recipe([0, 1, 2], **WAYS[way]), "300KB"
    run(recipe, tmp_path / "out", max_shard_size=size, threads=1)
    expected = files(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    for options in ({"threads": 2, "block": 1 << 22}, {"threads": 5, "block": 1000}, {"threads": 3, "block": 1}):
        run(recipe, tmp_path / "out", max_shard_size=size, overwrite=True, **options)
        found = files(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], options


def test_torchs_own_threads_change_no_byte(three, tmp_path):
    recipe, before = three.recipe([0, 1, 2], **WAYS["default"]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            run(recipe, tmp_path / "out", overwrite=True)
            found.append(files(tmp_path / "out"))
    finally:
        torch.set_num_threads(before)
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_the_size_of_a_shard_changes_no_tensor(three, tmp_path):
    recipe, found = three.recipe([0, 1, 2], **WAYS["default"]), []
    for place, size in enumerate(("1KB", "100KB", "2GB")):
        run(recipe, tmp_path / str(place), max_shard_size=size)
        found.append(values(tmp_path / str(place)))
    assert found[0] == found[1] == found[2]
    counts = [len(list((tmp_path / str(place)).glob("*.safetensors"))) for place in range(3)]
    assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "emr"])
def test_the_order_of_experts_changes_nothing_of_theirs(world, tmp_path, method):
    """At equal weights τ* is the same to the bit, and so is all that each expert keeps of it."""
    theta_0, _, _ = fill(world, 5, 8, ("normal", "grid", "sparse", "minute"))
    settings = {"method": {"name": method}, "decoupling": {"kind": "mask", "scale": "row", "rank": 2}}
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]]
    merged = [run(world.recipe(order, **settings), tmp_path / str(place)) for place, order in enumerate(orders)]
    for name, start in theta_0.items():
        alone, own = ("delta",), ("masks", "scales", "correction_a", "correction_b")
        if start.ndim == 1:
            alone, own = ("merged_weight",), ("expert_weight",)
        for part in (*alone, *own):
            first = merged[0].part(name, part)
            for order, other in zip(orders, merged, strict=True):
                found = other.part(name, part)
                wanted = first if part in alone or first is None else first[order]
                assert (found is None) == (wanted is None) and (found is None or torch.equal(found, wanted)), name


# corrections


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_correction_is_the_best_of_its_rank(world, tmp_path, rank):
    theta_0, _, taus = fill(world, 3, 9, ("normal",))
    decoupling = {"kind": "mask", "scale": "row", "rank": rank}
    merged = run(world.recipe([0, 1, 2], decoupling=decoupling, dtype="float32"), tmp_path / "out")
    for name, start in theta_0.items():
        if start.ndim == 1:
            continue
        own = min(rank, *start.shape)
        for place in range(3):
            scale = merged.part(name, "scales")[place].double()
            kept = merged.mask(name, place, start.shape[1]) * merged.part(name, "delta").double()
            residual = taus[place][name].double() - scale[:, None] * kept
            b, a = (merged.part(name, f"correction_{side}")[place].double() for side in "ba")
            assert b.shape == (len(start), own) and a.shape == (own, start.shape[1])
            best = torch.linalg.svdvals(residual)[own:].norm()
            assert float((residual - b @ a).norm()) <= float(best) * (1 + 1e-5) + 1e-5 * float(residual.norm())
