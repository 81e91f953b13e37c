"""The merged folder: the same bytes whatever the machine does, whole or absent, and a report that tells the truth."""

import hashlib
import importlib
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from merging_mmer import Recipe, matrices
from merging_mmer.shards import ShardWriter, size_in_bytes
from modeling_mmer import MMERForConditionalGeneration

from . import tiny_checkpoints as tiny
from .tiny_merges import run, thetas, world

merging = importlib.import_module("merging_mmer.merge")  # the package shows the function under this name


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    return folder, world(folder, torch.bfloat16)


def digest(folder):
    return {
        name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tiny.tensors(folder).items()
    }


def test_the_order_of_experts_changes_no_merged_number(tmp_path, shared):
    _, recipe = shared
    run(recipe, tmp_path / "a")
    run({**recipe, "experts": dict(reversed(recipe["experts"].items()))}, tmp_path / "b")
    one, two = tiny.tensors(tmp_path / "a"), tiny.tensors(tmp_path / "b")
    assert set(one) == set(two)
    for name in one:
        per_expert = name.endswith((".masks", ".scales", ".correction_a", ".correction_b")) or ".expert_" in name
        if not name.startswith(("model.added", "added")):
            assert torch.equal(one[name], two[name].flip(0) if per_expert else two[name]), name


def test_shard_size_and_threads_change_nothing(tmp_path, shared):
    _, recipe = shared
    run(recipe, tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(recipe, tmp_path / "many", max_shard_size="30KB")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one" / "model.safetensors").is_file()
    shards = sorted(path.name for path in (tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].endswith(f"-of-{len(shards):05d}.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny.tensors(tmp_path / "one").values())
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def test_the_size_of_a_block_changes_nothing(tmp_path, shared, monkeypatch):
    _, recipe = shared
    run(recipe, tmp_path / "one")
    monkeypatch.setattr(matrices, "_BLOCK", 100)
    run(recipe, tmp_path / "many")
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def killed_at(place, recipe, out, monkeypatch):
    real = ShardWriter.add

    def add(self, name, tensor):
        if name.startswith(place):
            raise KeyboardInterrupt
        real(self, name, tensor)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "add", add)
        run(recipe, out, max_shard_size="20KB")


@pytest.mark.parametrize("settings", [{}, {"method": {"density": 0.3, "scope": "model"}}], ids=str)
def test_a_killed_merge_goes_on_and_gives_the_same_bytes(tmp_path, shared, monkeypatch, settings):
    _, recipe = shared
    recipe = {**recipe, **settings}
    whole = run(recipe, tmp_path / "whole", max_shard_size="20KB")
    places = [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.self_attn.k_proj.masks",
        "model.language_model.layers.1.mlp.up_proj.delta",
        "model.language_model.layers.1.input_layernorm.expert_weight",
        "lm_head.correction_b",
        "added_head",
        "model.experts.audio.",
    ]
    for place in places:
        killed_at(place, recipe, tmp_path / "out", monkeypatch)
        assert (tmp_path / ".out.partial" / "out" / "journal.json").is_file() == (place != places[0])
    (tmp_path / ".out.partial" / "out" / "shard-00099.partial").write_bytes(b"half a sh")
    merged = []
    monkeypatch.setattr(merging._Merge, "merge_tensor", lambda self, name: merged.append(name))
    again = run(recipe, tmp_path / "out", max_shard_size="20KB")
    assert merged == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert digest(tmp_path / "whole") == digest(tmp_path / "out")
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {**vars(again), "seconds": 0} == {**vars(whole), "seconds": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_merge_does_not_go_on_from_there(tmp_path, shared, monkeypatch):
    _, recipe = shared
    killed_at("model.experts.audio.", recipe, tmp_path / "out", monkeypatch)
    other = {**recipe, "method": {"alpha": 0.5}}
    run(other, tmp_path / "out", max_shard_size="20KB")
    run(other, tmp_path / "fresh", max_shard_size="20KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_the_repository_is_whole(tmp_path, shared):
    folder, recipe = shared
    report = run({**recipe, "text_route": "image"}, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "merge_recipe.yaml", "merge_report.json", "modeling_mmer.py",
        "configuration_mmer.py", "processing_mmer.py",
    } <= there  # fmt: skip
    assert not [path.name for path in tmp_path.iterdir() if path.name != "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MMERForConditionalGeneration"] and config["dtype"] == "bfloat16"
    assert config["auto_map"]["AutoModelForMultimodalLM"] == "modeling_mmer.MMERForConditionalGeneration"
    assert config["text_route"] == "image"
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (
        written["experts"]["image"]["sha256"]["model.safetensors"]
        == hashlib.sha256((folder / "image" / "model.safetensors").read_bytes()).hexdigest()
    )
    assert written["experts"]["audio"]["lambda"] == 1.0 and written["decoupling"]["rank"] == 8
    assert report.experts == written["experts"]
    assert Recipe.load(tmp_path / "out" / "merge_recipe.yaml").text_route == "image"


def test_the_repository_loads(tmp_path, shared):
    _, recipe = shared
    run(recipe, tmp_path / "out")
    model, info = MMERForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = tiny.tensors(tmp_path / "out")
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in stored.items()
    )
    assert (
        AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).tokenizer.convert_tokens_to_ids(
            "<grid>"
        )
        > 0
    )


def test_the_report_measures_what_the_model_computes(tmp_path, shared):
    """‖θ̂ᵢ-θᵢ‖/‖τᵢ‖ over all tensors, from the loaded model's own route weights."""
    folder, recipe = shared
    report = run(recipe, tmp_path / "out")
    model = MMERForConditionalGeneration.from_pretrained(tmp_path / "out")
    base, experts = thetas(folder)
    for i, (expert, own) in enumerate(experts.items()):
        error = energy = 0.0
        for name, theta_0 in base.items():
            path = name if name == "lm_head.weight" else f"model.language_model.{name}"
            module, _, last = path.rpartition(".")
            routed = model.get_submodule(module)
            got = routed.route_weight(2 + i) if theta_0.ndim > 1 else getattr(routed, f"expert_{last}")[i]
            theta, rows = own[name][: len(theta_0)].float(), slice(None)
            if name in ("lm_head.weight", "embed_tokens.weight"):
                rows = slice(0, tiny.ROWS - 2)
            error += (got.float() - theta)[rows].square().sum().item()
            energy += (theta - theta_0.float())[rows].square().sum().item()
        total = report.experts[expert]["total"]
        assert total["residual"] == pytest.approx(math.sqrt(error / energy), rel=1e-3)
        assert total["norm"] == pytest.approx(math.sqrt(energy), rel=1e-4)
        assert 0 < total["mask_density"] < 1 and 0 < total["kept_energy"] <= 1
        assert report.experts[expert]["bits_per_parameter"] > 1


def test_a_starved_expert_is_named(tmp_path):
    recipe = world(tmp_path, image={"noise": 0.04}, audio={"noise": 0.002})
    report = run({**recipe, "decoupling": {"kind": "paper"}}, tmp_path / "out")
    assert any("expert 'audio' is starved" in warning for warning in report.warnings)
    assert not any("'image' is starved" in warning for warning in report.warnings)


def test_an_output_that_holds_something_is_left_alone(tmp_path, shared):
    _, recipe = shared
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        run(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    run(recipe, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists() and (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    recipe = world(tmp_path)
    stored = tiny.tensors(tmp_path / "audio")
    stored["audio_tower.conv1.bias"][0] = float("nan")  # the last thing to be read
    save_file(stored, tmp_path / "audio" / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="audio_tower.conv1.bias"):
        run(recipe, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_last_touch_is_part_of_the_whole(tmp_path, shared):
    _, recipe = shared

    def card(folder):
        assert folder.name == "out" and (folder / "config.json").is_file() and not (tmp_path / "out").exists()
        (folder / "README.md").write_text("mine")

    run(recipe, tmp_path / "out", finish=card)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"

    def broken(folder):
        raise ValueError("no card")

    with pytest.raises(ValueError, match="no card"):
        run(recipe, tmp_path / "other", finish=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_modality_that_the_expert_does_not_bring(tmp_path, shared):
    folder, recipe = shared
    experts = {**recipe["experts"], "image": {"model": str(folder / "image"), "modality": "video"}}
    with pytest.raises(ValueError, match=r"expert 'image': asked for \['video'\], but it brings \['image'\]"):
        run({**recipe, "experts": experts}, tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "wanted"), [("2GB", 2 * 10**9), ("1.5MiB", 1572864), ("7", 7), (9, 9), ("1 KB", 1000)]
)
def test_sizes(size, wanted):
    assert size_in_bytes(size) == wanted


@pytest.mark.parametrize("size", ["", "GB", "2 bananas", "0", "-1GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size is"):
        size_in_bytes(size)
