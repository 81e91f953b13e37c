"""`add`: a newcomer joins a merged folder; the others stay, bit for bit, and it gets what the formulas give."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from merging_mmer import add
from merging_mmer.verification import verify

from . import tiny_growing as growing
from . import tiny_several as several
from .tiny_merges import run

tiny = several.tiny
SPARSE = {"name": "ties", "density": 0.3}
CASES = {
    "mask": {"decoupling": {"kind": "mask", "rank": 2}, "method": SPARSE},
    "paper": {"decoupling": {"kind": "paper"}, "method": {**SPARSE, "alpha": 0.5}},
    "tied": {"decoupling": {"kind": "mask", "scale": "tensor", "rank": 0, "lambda": 0.8}, "method": SPARSE},
    "exact": {},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, growing.make(folder, words=94)


@pytest.fixture(scope="module", params=CASES)
def case(request, world, tmp_path_factory):
    """Folders of two experts, and of the same two and a third one that joined, loaded."""
    folder, recipe = world
    place = tmp_path_factory.mktemp("grown")
    if request.param == "tied":
        folder, recipe = place, growing.make(place, tie_word_embeddings=True)
    if request.param == "exact":
        folder, recipe = place, growing.make_loras(place, {"one": 3, "two": 2, "three": 5})
    recipe = {**recipe, **CASES[request.param]}
    run(growing.some(recipe, "one", "two"), place / "old")
    report = add(place / "old", {"three": recipe["experts"]["three"]}, out=place / "new", progress=False)
    return SimpleNamespace(
        name=request.param, folder=folder, place=place, recipe=recipe, report=report,
        old=growing.load(place / "old"), new=growing.load(place / "new"),
    )  # fmt: skip


# the others


def test_the_other_routes_do_not_change_by_one_bit(case):
    growing.check_unchanged(case.old, case.new, ["base", "one", "two"])
    assert case.new[0].config.expert_names == ["one", "two", "three"]


def test_the_folder_is_sound_and_tells_the_truth(case):
    result = verify(case.place / "new", originals=True, load=case.name == "tied")
    skipped = {"paper": {"scales"}, "exact": {"masks", "scales", "density"}}.get(case.name, set())
    assert {check.name for check in result.checks if check.status != "passed"} == skipped, result.checks


def test_the_others_numbers_stay_in_the_report(case):
    before = json.loads((case.place / "old" / "merge_report.json").read_text())["experts"]
    for name in ("one", "two"):
        old, new = before[name], case.report.experts[name]
        assert {key for key in old if old[key] != new[key]} <= {"total", "tensors"}
        for key in ("norm", "residual", "kept_energy", "against_merged_sign"):
            assert (new["total"][key] or 0) == pytest.approx(old["total"][key] or 0, rel=1e-12)
        assert new["total"]["entries"] > old["total"]["entries"], "it counts what only the newcomer changed"


def test_everything_beside_the_weights_is_as_if_merged_together(case):
    """But for the rows of a token that both brought: the one that routes share stays as it was."""
    run(case.recipe, case.place / "together")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "merge_recipe.yaml"):
        assert (case.place / "new" / name).read_bytes() == (case.place / "together" / name).read_bytes(), name
    found, wanted = (json.loads((case.place / of / "config.json").read_text()) for of in ("new", "together"))
    shared = [token for token in found["added_tokens"] if len(token["experts"]) > 1]
    assert [token["token"] for token in shared] == ["<both>"] and list(shared[0]["rows"]) == ["three"]
    for values in (found, wanted):
        for token in values["added_tokens"]:
            token.pop("rows", None)
    assert found == wanted
    report = json.loads((case.place / "together" / "merge_report.json").read_text())
    assert case.report.tensors == report["tensors"]
    assert case.report.experts["three"]["sha256"] == report["experts"]["three"]["sha256"]
    if case.name == "exact":
        assert case.report.sign_conflicts == pytest.approx(report["sign_conflicts"], abs=1e-3)
    # towers, θ₀, and what each has for itself
    one, two = (tiny.tensors(case.place / of) for of in ("new", "together"))
    assert set(one) == set(two)
    alike = (".weight", ".expert_weight", ".merged_weight")
    for name in one:
        if name.startswith("model.experts.") or name.endswith(alike) and "added" not in name:
            assert growing.same(one[name], two[name]), name


# the newcomer, from the formulas


def slow_add(old, name, tau, case, new):
    """(τ*, mask, scale) of one matrix by entries, from the old folder's stored parts."""
    kind = case.recipe["decoupling"]["kind"]
    lam, method = case.recipe["decoupling"].get("lambda", 1.0), case.recipe.get("method", {})
    kept = math.ceil(method.get("density", 1.0) * tau.numel())
    order = tau.abs().flatten().sort(descending=True, stable=True).indices[:kept].tolist()
    trimmed = torch.zeros(tau.numel())
    trimmed[order] = tau.flatten()[order] * method.get("alpha", 1.0)
    trimmed = trimmed.view(tau.shape)
    delta, masks = old.get(f"{name}.delta", torch.zeros_like(tau)).clone(), old.get(f"{name}.masks")
    masks = [] if masks is None else masks.tolist()
    values, put, found, mask, free = tau.tolist(), trimmed.tolist(), delta.tolist(), torch.zeros_like(tau).tolist(), 0
    for row, column in itertools.product(range(tau.shape[0]), range(tau.shape[1])):
        x = values[row][column]
        if not any(of[row][column // 8] >> (column % 8) & 1 for of in masks):
            free += x != 0
            if put[row][column] != 0:
                found[row][column] = put[row][column]
        y = found[row][column]
        mask[row][column] = float(x * y > 0 and abs(x) >= lam * abs(y - x))
    delta, mask = torch.tensor(found), torch.tensor(mask)
    own = mask * delta
    scale = None
    if kind == "mask" and case.recipe["decoupling"].get("scale", "row") == "row":
        parts = zip(tau, own, strict=True)
        scale = torch.stack([x @ y / (y @ y) if y.any() else torch.tensor(1.0) for x, y in parts])
    elif kind == "mask" and case.recipe["decoupling"]["scale"] == "tensor":
        scale = ((tau * own).sum() / (own * own).sum() if own.any() else torch.tensor(1.0)).reshape(1)
    return delta, mask, scale, free


def words_alone(name, tau, case):
    if name in ("embed_tokens.weight", "lm_head.weight"):
        tau[96 if case.name == "tied" else 94 :] = 0
    return tau


def test_the_newcomer_gets_what_the_formulas_give(case):
    if case.name == "exact":
        pytest.skip("has no masks: see the tests of exact")
    old, new = tiny.tensors(case.place / "old"), tiny.tensors(case.place / "new")
    theta_0, theta = growing.thetas(case.folder / "base"), growing.thetas(case.folder / "three")
    error = energy = 0.0
    free = changed = 0
    got = {key: tensor.detach() for key, tensor in growing.routes(case.new[0]).items()}
    for name, start in theta_0.items():
        if case.name == "tied" and name == "lm_head.weight":
            continue
        tau = words_alone(name, theta[name][: len(start)] - start, case)
        found = words_alone(name, got["three", name] - start, case)
        error, energy = error + float((found - tau).square().sum()), energy + float(tau.square().sum())
        prefix = name.removesuffix(".weight")
        prefix = prefix if prefix == "lm_head" else f"model.language_model.{prefix}"
        if start.ndim < 2 or f"{prefix}.delta" not in new:
            continue
        delta, mask, scale, open_ = slow_add(old, prefix, tau, case, new)
        free, changed = free + open_, changed + int((tau != 0).sum())
        torch.testing.assert_close(new[f"{prefix}.delta"], delta, rtol=1e-6, atol=0)
        packed = new[f"{prefix}.masks"][2].tolist()
        bits = [[row[c // 8] >> (c % 8) & 1 for c in range(tau.shape[1])] for row in packed]
        assert bits == mask.int().tolist(), name
        own = mask * delta
        if scale is None:
            assert f"{prefix}.scales" not in new
        else:
            torch.testing.assert_close(new[f"{prefix}.scales"][2], scale, rtol=1e-5, atol=0)
            own = own * scale[:, None]
        rank = case.recipe["decoupling"].get("rank", 0)
        assert (f"{prefix}.correction_a" in new) == (rank > 0)
        if rank and (tau - own).any():
            u, s, v = torch.linalg.svd(tau - own)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            made = new[f"{prefix}.correction_b"][2] @ new[f"{prefix}.correction_a"][2]
            assert float((made - best).norm() / best.norm()) < 1e-3
    numbers = case.report.experts["three"]
    assert numbers["total"]["residual"] == pytest.approx(math.sqrt(error / energy), rel=1e-4)
    assert numbers["added"] == {"beside": ["one", "two"], "free_entries": pytest.approx(free / changed)}
    assert 0.01 < free / changed < 0.9
    assert f"its residual is {numbers['total']['residual']:.3f}" in case.report.notes[-1]


def test_the_others_have_nothing_where_only_the_newcomer_changed_something(case):
    if case.name == "exact":
        pytest.skip("has no masks: see the tests of exact")
    new = tiny.tensors(case.place / "new")
    prefix = f"model.language_model.{growing.NEW[0].removesuffix('.weight')}"
    assert f"{prefix}.delta" not in tiny.tensors(case.place / "old")
    assert not new[f"{prefix}.masks"][:2].any() and new[f"{prefix}.masks"][2].any()
    if f"{prefix}.scales" in new:
        assert (new[f"{prefix}.scales"][:2] == 1).all()
    left = f"model.language_model.{growing.LEFT[0].removesuffix('.weight')}"
    assert not new[f"{left}.masks"][2].any() and new[f"{left}.masks"][:2].any()
    norm = new[f"model.language_model.{growing.NEW[1].replace('weight', 'expert_weight')}"]
    start = growing.thetas(case.folder / "base")[growing.NEW[1]]
    assert torch.equal(norm[0], start) and torch.equal(norm[1], start) and not torch.equal(norm[2], start)


# LoRAs, kept exactly


def test_loras_are_kept_exactly_whatever_their_rank(tmp_path):
    recipe = growing.make_loras(tmp_path, {"one": 3, "two": 2, "three": 2})
    run(growing.some(recipe, "one", "two"), tmp_path / "old")
    report = add(tmp_path / "old", {"three": recipe["experts"]["three"]}, out=tmp_path / "new", progress=False)
    assert report.experts["three"]["total"]["residual"] < 1e-4
    assert report.experts["three"]["added"] == {"beside": ["one", "two"], "free_entries": None}
    run(recipe, tmp_path / "together")
    one, two = tiny.tensors(tmp_path / "new"), tiny.tensors(tmp_path / "together")
    for name in one:  # τ* is what a merge of all makes
        if name.endswith((".delta", ".correction_a", ".correction_b")):
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def test_one_that_is_no_lora_cannot_join_loras(tmp_path, world):
    folder, full = world
    recipe = growing.make_loras(tmp_path, {"one": 2})
    run(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="expert 'three' changed .* beyond one: use kind mask"):
        add(tmp_path / "out", {"three": full["experts"]["three"]}, base=str(folder / "base"), progress=False)


def test_a_newcomer_with_a_head_of_its_own_on_a_tied_base(tmp_path):
    recipe = growing.make(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "three" / "model.safetensors"
    tensors = tiny.load_file(path)
    (embedding,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    head = "language_model.lm_head.weight"
    tensors[head] = tensors[embedding] + 0.05 * torch.randn_like(tensors[embedding])
    tiny.save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    (tmp_path / "three" / "config.json").write_text(json.dumps(config))
    recipe["decoupling"] = {"kind": "mask", "rank": 2}
    run(growing.some(recipe, "one", "two"), tmp_path / "old")
    add(tmp_path / "old", {"three": recipe["experts"]["three"]}, out=tmp_path / "new", progress=False)
    before, after = growing.load(tmp_path / "old"), growing.load(tmp_path / "new")
    assert before[0].config.tie_word_embeddings and not after[0].config.tie_word_embeddings
    growing.check_unchanged(before, after, ["base", "one", "two"])
    result = verify(tmp_path / "new", originals=True, load=True)
    assert result.ok, result.checks
