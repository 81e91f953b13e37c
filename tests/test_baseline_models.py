"""Models filled by other methods: against the merge where that has them too, against slow restatements, on disk."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_mmer.baseline_models import HOST, TaskVectors, put
from evaluation_mmer.baselines import METHODS, Coefficients, dare
from evaluation_mmer.lab.datasets import LabItem
from evaluation_mmer.retention import Score
from merging_mmer import Recipe
from merging_mmer.naming import stored_name
from mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import unpack_bits

from .tiny_merges import run, thetas, world
from .tiny_world import make

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import baselines  # noqa: E402

EXPERTS = ("image", "audio")


def load(out):
    return MMERForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, recipe, host model, its task vectors); the experts are in bf16, the picture expert changed norms."""
    folder = tmp_path_factory.mktemp("baselines")
    recipe = world(folder, dtype=torch.bfloat16, image={"noise": 0.05}, audio={"noise": 0.05})
    run({**recipe, "decoupling": HOST}, folder / "host")
    return folder, recipe, load(folder / "host"), TaskVectors(Recipe.from_dict(recipe))


def parts(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." not in name}


def weights(model, route):
    """The base's name -> the tensor that a route uses."""
    found, modules = {}, dict(model.named_modules())
    for name in [f"{module}.weight" for module in model.config.delta_modules]:
        found[name] = modules[stored_name(name).removesuffix(".weight")].route_weight(route).detach().clone()
    for name in model.config.expert_tensors:
        module, _, leaf = stored_name(name).rpartition(".")
        own = modules[module]._parameters
        found[name] = own[f"merged_{leaf}"] if route == 1 else own[f"expert_{leaf}"][route - 2]
    return found


@pytest.mark.parametrize(
    ("method", "settings", "recipe"),
    [
        ("task_arithmetic", dict(scaling=1.0), dict(method={"name": "task_arithmetic"})),
        ("task_arithmetic", dict(scaling=0.3), dict(method={"name": "task_arithmetic", "alpha": 0.3})),
        ("weight_average", {}, dict(method={"name": "task_arithmetic", "alpha": 0.5})),
    ],
)
def test_a_static_merge_is_that_of_the_engine(tiny, tmp_path, method, settings, recipe):
    _, sources, host, vectors = tiny
    bits = put(host, vectors, method, Coefficients(**settings))
    run({**sources, **recipe, "decoupling": {"kind": "none"}}, tmp_path / "out")
    engine = load(tmp_path / "out")
    for route in (1, 2, 3):
        ours, theirs = weights(host, route), weights(engine, route)
        assert ours.keys() == theirs.keys() and "norm.weight" in ours and "embed_tokens.weight" in ours
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (route, name)
    assert bits == {"image": 0.0, "audio": 0.0}


@pytest.mark.parametrize(
    ("method", "name", "lam"), [("emr", "emr", 0.0), ("tall", "task_arithmetic", 1.0)], ids=["emr", "tall"]
)
def test_masks_are_those_of_the_engine(tiny, tmp_path, method, name, lam):
    _, sources, host, vectors = tiny
    put(host, vectors, method, Coefficients(lam=1.0))
    mask = {"kind": "mask", "scale": "none", "rank": 0, "lambda": lam}
    run({**sources, "method": {"name": name}, "decoupling": mask}, tmp_path / "out")
    ours, theirs = parts(host), parts(load(tmp_path / "out"))
    compared = 0
    for key, delta in theirs.items():
        if not key.endswith(".delta"):
            continue
        assert torch.equal(ours[key], delta)
        wide, used = delta.shape[1], delta != 0
        first, second = (unpack_bits(s[key.replace(".delta", ".masks")], wide) & used for s in (ours, theirs))
        # opposite signs and a τ* below the rounding of τ: TALL alone keeps those
        assert int((first & ~second).sum()) <= 2 and not (second & ~first).any()
        compared += 1
    assert compared == len(host.config.delta_modules)


def recovered(folder, method):
    """expert -> name -> θ̂ᵢ, from what is on disk by the formulas written out: λ 0.4, scaling 0.4, drop 0.9."""
    base, own = thetas(folder)
    names = [name for name in base if any(not torch.equal(base[name], own[e][name][: len(base[name])]) for e in own)]
    tokens = 94  # two of the 96 rows are padding
    taus, made, sums = {}, {e: {} for e in own}, {e: [0.0, 0.0] for e in own}
    for name in names:
        theta_0 = base[name].double()
        taus = {e: own[e][name][: len(theta_0)].double() - theta_0 for e in own}
        linear = theta_0.ndim > 1 and "embed" not in name and "head" not in name
        if theta_0.ndim > 1 and not linear:
            for tau in taus.values():
                tau[tokens:] = 0
        total = sum(taus.values())
        if method == "weight_average":
            left = dict.fromkeys(own, total / 2)
        elif method == "naive_mc":
            left = dict.fromkeys(own, total / 2 if linear else 0 * total)
        elif method == "task_arithmetic":
            left = dict.fromkeys(own, 0.4 * total)
        elif method == "dare":
            left = dict.fromkeys(own, 0.4 * sum(dare(tau.float(), 0.9, 0, e, name) for e, tau in taus.items()))
        elif method == "emr":
            agrees = {e: (tau * total > 0) for e, tau in taus.items()}
            unified = total.sign() * torch.stack([tau.abs() * agrees[e] for e, tau in taus.items()]).amax(0)
            left = {e: agrees[e] * unified for e in own}
            for e, tau in taus.items():
                sums[e][0] += float(tau.abs().mean())
                sums[e][1] += float(left[e].abs().mean())
        else:
            stored = total.bfloat16().double() if theta_0.ndim > 1 else total
            masks = {e: tau.abs() >= 0.4 * (stored - tau).abs() for e, tau in taus.items()}
            both = masks["image"] & masks["audio"]
            left = {e: stored * masks[e] if method == "tall" else 0.4 * stored * both for e in own}
        for e in own:
            made[e][name] = theta_0, left[e], linear
    scales = {e: over / under if under else 1.0 for e, (over, under) in sums.items()}
    return {e: {n: t0 + scales[e] * tau for n, (t0, tau, _) in of.items()} for e, of in made.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_route_is_what_the_formulas_say(tiny, method):
    folder, _, host, vectors = tiny
    put(host, vectors, method)
    expected = recovered(folder, method)
    for place, expert in enumerate(EXPERTS):
        found = weights(host, 2 + place)
        assert set(found) == set(expected[expert])
        for name, tensor in found.items():
            theta_0 = vectors.base.tensor(name).double()
            tau, wanted = tensor.double() - theta_0, expected[expert][name] - theta_0
            # rounded to bf16 are, of matrices, Σ τᵢ and τ*; of small tensors, the sum with θ₀, once
            spare = 2**-7 * wanted.abs() if tensor.ndim > 1 else 2**-8 * expected[expert][name].abs()
            assert bool(((tau - wanted).abs() <= spare + 2e-6).all()), name


def test_bits_are_counted_a_merged_parameter(tiny):
    _, _, host, vectors = tiny
    shapes = [vectors.base.shapes[f"{m}.weight"] for m in host.config.delta_modules]
    small = [vectors.base.shapes[name] for name in host.config.expert_tensors]
    masks = sum(rows * -(-columns // 8) * 8 for rows, columns in shapes) + sum(-(-n // 8) * 8 for (n,) in small)
    parameters = sum(rows * columns for rows, columns in shapes) + sum(n for (n,) in small)
    assert put(host, vectors, "tall") == dict.fromkeys(EXPERTS, masks / parameters)
    assert put(host, vectors, "emr") == dict.fromkeys(EXPERTS, (masks + 32) / parameters)


def test_nothing_of_the_method_before_is_left(tiny):
    _, _, host, vectors = tiny
    put(host, vectors, "weight_average")
    clean = parts(host)
    put(host, vectors, "emr")
    dirty = parts(host)
    assert any(not torch.equal(clean[name], dirty[name]) for name in clean if name.endswith(".scales"))
    put(host, vectors, "weight_average")
    again = parts(host)
    assert all(torch.equal(clean[name], again[name]) for name in clean)


def test_a_route_that_is_held_follows(tiny):
    _, _, host, vectors = tiny
    put(host, vectors, "weight_average")
    host.keep_routes(["merged"])
    before = weights(host, 1)
    put(host, vectors, "tall")
    after = weights(host, 1)
    host.keep_routes([])
    assert not torch.equal(before["layers.0.self_attn.q_proj.weight"], after["layers.0.self_attn.q_proj.weight"])
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(host, 1).items())


def test_a_filled_model_is_saved_as_a_folder(tiny, tmp_path):
    _, _, host, vectors = tiny
    put(host, vectors, "tall")
    host.save_pretrained(tmp_path / "tall")
    saved = parts(load(tmp_path / "tall"))
    ours = parts(host)
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], saved[name]) for name in ours)


def test_what_can_not_be_filled(tiny, tmp_path):
    _, sources, host, vectors = tiny
    with pytest.raises(ValueError, match="method is 'ties', expected one of"):
        put(host, vectors, "ties")
    run({**sources, "decoupling": {"kind": "paper"}}, tmp_path / "paper")
    with pytest.raises(ValueError, match="merged with decoupling .*paper.*merge it so"):
        put(load(tmp_path / "paper"), vectors, "tall")
    turned = {**sources, "experts": dict(reversed(sources["experts"].items()))}
    with pytest.raises(ValueError, match=r"has the experts \['image', 'audio'\], the recipe \['audio', 'image'\]"):
        put(host, TaskVectors(Recipe.from_dict(turned)), "tall")


# the benchmark


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(recipe, two questions an expert) of a tiny world with working processors."""
    recipe = make(tmp_path_factory.mktemp("asked"))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    sounds = np.random.default_rng(1).normal(size=(2, 16000)).astype(np.float32)
    items = {
        "image": [LabItem(Image.fromarray(one), "what is shown ?", "dog") for one in pixels],
        "audio": [LabItem(one, "word spoken ?", "cat") for one in sounds],
    }
    return recipe, items


def test_every_method_is_asked_by_one_switch(asked):
    sources, items = asked
    originals = {name: Score(("dog", "cat"), (True, False)) for name in items}
    methods = [method for method in baselines.EVERY if method not in ("exact", "damc", "alone")]  # those need LoRAs
    rows = list(
        baselines.compare(
            lambda own: {**sources, **own}, baselines.Questions(items), originals, methods, Coefficients(least=1)
        )
    )
    assert sorted((r["method"], r["expert"]) for r in rows) == sorted((m, e) for m in methods for e in items)
    for entry in rows:
        assert entry["n"] == 2 and 0 <= entry["accuracy"] <= 1
        assert entry["retention"] == entry["accuracy"] / 0.5
        bits = entry["bits_per_parameter"]
        if entry["method"] == "base":
            assert bits is None
        elif entry["method"] in baselines.STATIC:
            assert bits == 0
        else:
            assert 1 <= bits < 20  # the norms of so small a model count for much
        assert set(entry["coefficients"]) == set(METHODS.get(entry["method"], ()))


def test_a_method_that_is_not_known_is_refused(asked):
    with pytest.raises(ValueError, match=r"found \['magic'\]"):
        list(baselines.compare(lambda own: own, baselines.Questions(asked[1]), {}, ["magic"], Coefficients()))


def test_text_goes_to_the_merged_route_and_media_stay():
    batch = {
        "route_ids": torch.tensor([[2, 2, 3, 3, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 0]]),
        "text_route": torch.tensor([2]),
        "input_ids": torch.tensor([[5, 6, 7, 7, 8]]),
    }
    moved = baselines.text_on_merged(batch)
    assert moved["route_ids"].tolist() == [[1, 1, 3, 3, 1]] and moved["text_route"].tolist() == [1]
    assert batch["text_route"].tolist() == [2] and moved["input_ids"] is batch["input_ids"]


class Judge:
    """Stands for a loaded model: what `put` was last given decides how many items are right."""

    model = None

    def __init__(self, right):
        self.right, self.now = right, None

    def ask(self, questions, name, method):
        right = self.right[name](self.now)
        return Score(("x",) * 10, (True,) * right + (False,) * (10 - right))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("task_arithmetic", Coefficients(scaling=0.6)),
        ("tall", Coefficients(lam={"image": 0.2, "audio": 0.5})),
        ("emr", Coefficients()),
    ],
)
def test_coefficients_are_chosen_by_validation_items(monkeypatch, method, expected):
    def mean_peaks_at(settings):
        return {0.6: 9, 0.2: 8}.get(settings.scaling, 1) if method != "tall" else {0.2: 5, 0.4: 5}.get(settings.lam, 1)

    def other(settings):
        return {0.6: 5, 0.2: 5}.get(settings.scaling, 5) if method != "tall" else {0.5: 9}.get(settings.lam, 2)

    judge = Judge({"image": mean_peaks_at, "audio": other})
    monkeypatch.setattr(baselines, "put", lambda model, vectors, method, settings: setattr(judge, "now", settings))
    questions = baselines.Questions({"image": [], "audio": []})
    assert baselines.best(method, judge, None, questions, Coefficients()) == expected


def test_each_experts_parameters_are_asked_of_every_other_task(monkeypatch):
    calls = []

    class Model(Judge):
        def ask(self, questions, name, method, of=None):
            calls.append((name, of))
            return Score(("x",), (True,))

    one = Score(("x",), (True,))
    names = ("image", "digits", "audio")
    questions = baselines.Questions({name: [] for name in names})
    rows = list(baselines._alone(Model({}), questions, dict.fromkeys(names, one)))
    assert calls == [(a, b) for a in names for b in names if a != b]
    assert baselines.same_media(names) == [("image", "digits"), ("digits", "image")]
    rows += [baselines.row(name, "original", "original expert", one, one) for name in names[:2]]
    table = baselines.cross_table(rows, list(names))
    assert table[0] == "| task | image | digits | audio |"
    assert table[2] == "| image | 100.0% | 100.0% | 100.0% |" and table[4] == "| audio | 100.0% | 100.0% | – |"
