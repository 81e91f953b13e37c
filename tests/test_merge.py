"""The numbers of the merge on tiny experts: every stored tensor against the definition, computed slowly and apart."""

import math

import pytest
import torch

from configuration_mmer import MMERConfig

from . import tiny_checkpoints as tiny
from .test_lora import train
from .tiny_merges import run, thetas, world


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    return folder, world(folder, torch.bfloat16)


def slow_mask(tau, merged, lam):
    bits = torch.zeros(tau.shape, dtype=torch.bool)
    for place, (x, y) in enumerate(zip(tau.flatten().tolist(), merged.flatten().tolist(), strict=True)):
        bits.view(-1)[place] = x * y > 0 and abs(x) >= lam * abs(y - x)
    return bits


def slow_ties(taus, density=1.0):
    kept = []
    for tau in taus:
        order = sorted(range(tau.numel()), key=lambda i: -abs(tau.view(-1)[i].item()))[
            : math.ceil(density * tau.numel())
        ]
        trimmed = torch.zeros(tau.numel())
        trimmed[order] = tau.flatten()[order]
        kept.append(trimmed.view(tau.shape))
    merged = torch.zeros(taus[0].shape)
    for i in range(merged.numel()):
        values = [tau.view(-1)[i].item() for tau in kept]
        total = sum(values)
        agreeing = [x for x in values if x * total > 0]
        merged.view(-1)[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def slow_bits(packed, columns):
    bits = torch.zeros(*packed.shape[:-1], columns, dtype=torch.bool)
    for column in range(columns):
        bits[..., column] = (packed[..., column // 8].int() // 2 ** (column % 8)) % 2 == 1
    return bits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoupling": {"kind": "paper", "lambda": 0.7}, "method": {"density": 0.3}},
        {"decoupling": {"kind": "mask", "scale": "tensor", "rank": 3}},
        {"decoupling": {"kind": "mask", "scale": "none", "rank": 0}},
        {"decoupling": {"kind": "none"}},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_every_tensor_against_the_definition(shared, settings, tmp_path):
    folder, recipe = shared
    report = run({**recipe, **settings}, tmp_path / "out")
    stored, (base, experts) = tiny.tensors(tmp_path / "out"), thetas(folder)
    config = MMERConfig.from_pretrained(tmp_path / "out")
    kind, scale, rank = (config.decoupling[key] for key in ("kind", "scale", "rank"))
    dtype = torch.float32 if settings.get("dtype") else torch.bfloat16
    lam, density = settings.get("decoupling", {}).get("lambda", 1.0), settings.get("method", {}).get("density", 1.0)
    words = tiny.ROWS - 2
    expected = set()
    for name, theta_0 in base.items():
        place = name if name == "lm_head.weight" else f"model.language_model.{name}"
        expected.add(place)
        assert torch.equal(stored[place], theta_0.to(dtype)), name
        vocabulary = name in ("lm_head.weight", "embed_tokens.weight")
        taus = []
        for expert in experts.values():
            tau = expert[name][: len(theta_0)].float() - theta_0.float()
            if vocabulary:
                tau[words:] = 0
            taus.append(tau)
        if theta_0.ndim == 1:
            assert name in config.expert_tensors
            prefix, _, last = place.rpartition(".")
            expected |= {f"{prefix}.expert_{last}", f"{prefix}.merged_{last}"}
            joint = (theta_0.float() + slow_ties(taus, density)).to(dtype)
            torch.testing.assert_close(stored[f"{prefix}.merged_{last}"], joint)
            for i, expert in enumerate(experts.values()):
                own = stored[f"{prefix}.merged_{last}"] if kind == "none" else expert[name].to(dtype)
                assert torch.equal(stored[f"{prefix}.expert_{last}"][i], own)
            continue
        module = place.removesuffix(".weight")
        assert (name.removesuffix(".weight")) in config.delta_modules
        delta = stored[f"{module}.delta"]
        expected.add(f"{module}.delta")
        torch.testing.assert_close(
            delta, slow_ties(taus, density).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-8
        )
        for i, tau in enumerate(taus):
            own = torch.zeros_like(tau)
            if kind in ("mask", "paper"):
                expected.add(f"{module}.masks")
                mask = slow_mask(tau, delta.float(), lam)
                packed = stored[f"{module}.masks"]
                assert packed.dtype == torch.uint8 and packed.shape == (2, tau.shape[0], -(-tau.shape[1] // 8))
                assert torch.equal(slow_bits(packed[i], tau.shape[1]), mask), name
                own = mask * delta.float()
            if kind == "mask" and scale != "none":
                expected.add(f"{module}.scales")
                rows = own if scale == "row" else own.reshape(1, -1)
                wanted = tau if scale == "row" else tau.reshape(1, -1)
                fit = torch.stack(
                    [x @ y / (y @ y) if y.any() else torch.tensor(1.0) for x, y in zip(wanted, rows, strict=True)]
                )
                torch.testing.assert_close(stored[f"{module}.scales"][i].float(), fit, rtol=1e-2, atol=0)
                own = stored[f"{module}.scales"][i].float()[:, None] * own
            if kind == "mask" and rank:
                expected |= {f"{module}.correction_a", f"{module}.correction_b"}
                a, b = stored[f"{module}.correction_a"][i].float(), stored[f"{module}.correction_b"][i].float()
                r = min(rank, *tau.shape)
                assert a.shape == (r, tau.shape[1]) and b.shape == (tau.shape[0], r)
                u, s, v = torch.linalg.svd(tau - own)
                best = (u[:, :r] * s[:r]) @ v[:r]
                assert ((b @ a - best).norm() / (tau - own).norm()).item() < 0.02
    assert {n for n in stored if n.startswith(("model.language_model.", "lm_head."))} == expected
    assert set(report.experts) == {"image", "audio"}


def test_towers_and_added_rows_are_copied(shared, tmp_path):
    folder, recipe = shared
    run(recipe, tmp_path / "out")
    stored = tiny.tensors(tmp_path / "out")
    for expert in ("image", "audio"):
        own = {n: v for n, v in tiny.tensors(folder / expert).items() if not n.startswith("language_model.")}
        prefix = f"model.experts.{expert}."
        found = {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
        assert set(found) == set(own)
        assert all(torch.equal(found[n], own[n]) and found[n].dtype == own[n].dtype for n in own)
    config = MMERConfig.from_pretrained(tmp_path / "out")
    _, experts = thetas(folder)
    tokens = [token["token"] for token in config.added_tokens]
    assert {"<image>", "<|AUDIO|>", "<grid>"} <= set(tokens)
    # <row94>, <row95> and <grid> are tokens of both: the mean in front, each expert's own behind
    own = {token["token"]: token["rows"] for token in config.added_tokens if "rows" in token}
    assert own == {
        "<row94>": {"image": 5, "audio": 6},
        "<row95>": {"image": 7, "audio": 8},
        "<grid>": {"image": 9, "audio": 10},
    }
    for matrix, name in (
        ("model.added_embeddings.weight", "embed_tokens.weight"),
        ("added_head.weight", "lm_head.weight"),
    ):
        assert stored[matrix].shape == (len(tokens) + 6, 32)
        for token, expert, row in (
            ("<image>", "image", tiny.ROWS),
            ("<|AUDIO|>", "audio", tiny.ROWS),
            ("<grid>", "image", tiny.ROWS + 1),
            ("<grid>", "audio", tiny.ROWS + 1),
            ("<row94>", "audio", tiny.ROWS - 2),
        ):
            place = own.get(token, {}).get(expert, tokens.index(token))
            assert torch.equal(stored[matrix][place], experts[expert][name][row])
        mean = sum(expert[name][tiny.ROWS + 1].double() for expert in experts.values()) / 2
        assert torch.equal(stored[matrix][tokens.index("<grid>")], mean.to(torch.bfloat16))


def test_a_placeholder_without_a_row_gets_zeros(tmp_path):
    recipe = world(tmp_path, image={"extra_rows": 0}, audio={"extra_rows": 0})
    run(recipe, tmp_path / "out")
    stored = tiny.tensors(tmp_path / "out")
    tokens = [token["token"] for token in MMERConfig.from_pretrained(tmp_path / "out").added_tokens]
    assert not stored["model.added_embeddings.weight"][tokens.index("<image>")].any()


def test_one_expert_at_density_1_comes_back(tmp_path):
    recipe = world(tmp_path)
    recipe = {**recipe, "experts": {"image": recipe["experts"]["image"]}, "decoupling": {"kind": "paper"}}
    report = run(recipe, tmp_path / "out")
    stored, (base, experts) = tiny.tensors(tmp_path / "out"), thetas(tmp_path)
    for name, theta_0 in base.items():
        module = (name if name == "lm_head.weight" else f"model.language_model.{name}").removesuffix(".weight")
        if f"{module}.delta" in stored:
            words = tiny.ROWS - 2 if len(theta_0) == tiny.ROWS else None
            again = theta_0 + stored[f"{module}.delta"]
            torch.testing.assert_close(
                again[:words], experts["image"][name][: len(theta_0)][:words], rtol=2e-7, atol=1e-9
            )
    assert report.experts["image"]["total"]["residual"] < 1e-4


def test_tensors_equal_to_the_base_are_stored_once(tmp_path):
    recipe = world(tmp_path, image={"noise": 0.0}, audio={"noise": 0.0})
    report = run(recipe, tmp_path / "out")
    config = MMERConfig.from_pretrained(tmp_path / "out")
    assert config.delta_modules == [] and config.expert_tensors == []
    assert not [n for n in tiny.tensors(tmp_path / "out") if n.endswith((".delta", ".masks"))]
    assert report.tensors["changed"] == 0 and report.tensors["equal_to_base"] == 21


def test_tied_embeddings_have_no_head(tmp_path):
    run(world(tmp_path, tie_word_embeddings=True), tmp_path / "out")
    stored = tiny.tensors(tmp_path / "out")
    assert not [n for n in stored if n.startswith(("lm_head", "added_head"))]
    assert "model.language_model.embed_tokens.delta" in stored and "model.added_embeddings.weight" in stored


def lora_world(folder, **changes):
    """Two LoRAs of the bare LLM, with towers whose LLM is the base's."""
    recipe = world(folder, image={"noise": 0.0}, audio={"noise": 0.0})
    for seed, name in enumerate(("image", "audio")):
        train(tiny.base_model(), folder / f"{name}-lora", seed=seed, r=2 + seed, **changes)
        recipe["experts"][name] = {"lora": str(folder / f"{name}-lora"), "tower": str(folder / name)}
    return {**recipe, "decoupling": {"kind": "exact"}}


def test_exact_keeps_the_loras(tmp_path):
    recipe = lora_world(tmp_path)
    report = run(recipe, tmp_path / "out")
    stored = tiny.tensors(tmp_path / "out")
    config = MMERConfig.from_pretrained(tmp_path / "out")
    assert config.decoupling == {"kind": "exact", "scale": "none", "rank": 3}
    assert not [n for n in stored if n.endswith((".masks", ".scales"))]
    for i, name in enumerate(("image", "audio")):
        factors = tiny.tensors(tmp_path / f"{name}-lora")
        for module in config.delta_modules:
            a, b = (factors[f"base_model.model.model.{module}.lora_{side}.weight"] for side in "AB")
            prefix = f"model.language_model.{module}"
            got = stored[f"{prefix}.correction_b"][i] @ stored[f"{prefix}.correction_a"][i]
            torch.testing.assert_close(got, b @ a * 6 / len(a), rtol=1e-5, atol=1e-7)
        assert report.experts[name]["total"]["residual"] < 1e-4


def test_exact_refuses_what_is_no_lora(tmp_path, shared):
    _, recipe = shared
    with pytest.raises(ValueError, match=r"expert 'image' changed .* beyond one"):
        run({**recipe, "decoupling": {"kind": "exact"}}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_threshold_for_the_whole_model(tmp_path, shared):
    folder, recipe = shared
    run({**recipe, "method": {"scope": "model", "density": 0.2, "name": "ties"}}, tmp_path / "out")
    stored, (base, experts) = tiny.tensors(tmp_path / "out"), thetas(folder)
    taus = {e: {n: expert[n][: len(t)].float() - t.float() for n, t in base.items()} for e, expert in experts.items()}
    for of in taus.values():
        for name in ("embed_tokens.weight", "lm_head.weight"):
            of[name][tiny.ROWS - 2 :] = 0
    thresholds = {}
    for e, of in taus.items():
        every = torch.cat([tau.flatten() for tau in of.values()]).abs()
        thresholds[e] = every.sort(descending=True).values[math.ceil(len(every) * 0.2) - 1]
    name = "layers.0.mlp.up_proj.weight"
    # ties at the threshold may fall either way, so only entries away from it are compared
    clear = torch.stack([taus[e][name].abs() != thresholds[e] for e in taus]).all(0)
    trimmed = [torch.where(taus[e][name].abs() > thresholds[e], taus[e][name], 0.0) for e in taus]
    wanted = slow_ties(trimmed)
    got = stored["model.language_model.layers.0.mlp.up_proj.delta"].float()
    torch.testing.assert_close(got[clear], wanted[clear], rtol=1e-2, atol=1e-8)
