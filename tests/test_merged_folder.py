"""The merged folder: the same bytes whatever the machine does, whole or absent, and a report that tells the truth."""

import hashlib
import importlib
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoProcessor
from typer.testing import CliRunner

import mmer
from merging_mmer import Recipe, opened_merge
from merging_mmer.placement import PlacedFiles
from merging_mmer.shards import size_in_bytes
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


@pytest.mark.parametrize("settings", [{}, {"decoupling": {"kind": "mask", "scale": "tensor", "rank": 3}}], ids=str)
def test_workers_and_the_size_of_a_block_change_nothing(tmp_path, shared, settings):
    _, recipe = shared
    recipe = {**recipe, "method": {"density": 0.3}, **settings}
    one = run(recipe, tmp_path / "one", threads=1)
    for threads, block in ((3, 100), (2, 1000)):
        many = run(recipe, tmp_path / "many", threads=threads, block=block, overwrite=True)
        assert digest(tmp_path / "one") == digest(tmp_path / "many")
        assert {**vars(one), "seconds": 0} == {**vars(many), "seconds": 0}


def broken_off(place, recipe, out, monkeypatch, **options):
    real = PlacedFiles.write

    def write(self, name, values, start=0):
        if name.startswith(place):
            raise KeyboardInterrupt
        real(self, name, values, start)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PlacedFiles, "write", write)
        run(recipe, out, max_shard_size="20KB", threads=1, **options)


@pytest.mark.parametrize("settings", [{}, {"method": {"density": 0.3, "scope": "model"}}], ids=str)
def test_a_broken_off_merge_goes_on_and_gives_the_same_bytes(tmp_path, shared, monkeypatch, settings):
    _, recipe = shared
    recipe = {**recipe, **settings}
    whole = run(recipe, tmp_path / "whole", max_shard_size="20KB")
    places = [  # the largest parts are done first
        "model.language_model.embed_tokens.weight",
        "lm_head.correction_b",
        "model.language_model.layers.1.mlp.up_proj.delta",
        "model.language_model.layers.0.self_attn.k_proj.masks",
        "model.language_model.layers.1.input_layernorm.expert_weight",
        "added_head",
    ]
    done = 0
    for place in places:
        broken_off(place, recipe, tmp_path / "out", monkeypatch)
        lines = (tmp_path / ".out.partial" / "journal.jsonl").read_text().splitlines()
        assert len(lines) >= done and not (tmp_path / "out").exists()
        done = len(lines)
    assert done > 20
    (tmp_path / ".out.partial" / "out" / "model-00099-of-00099.safetensors").write_bytes(b"half a sh")
    with (tmp_path / ".out.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"part": "lm_head.weight", "numb')  # cut off in the middle of a line
    again = run(recipe, tmp_path / "out", max_shard_size="20KB")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for path in (tmp_path / "whole").iterdir():
        if path.is_file() and path.name != "merge_report.json":  # which holds the seconds
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert {**vars(again), "seconds": 0} == {**vars(whole), "seconds": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_done_is_not_done_again(tmp_path, shared, monkeypatch):
    _, recipe = shared
    broken_off("added_head", recipe, tmp_path / "out", monkeypatch)
    lines = (tmp_path / ".out.partial" / "journal.jsonl").read_text().splitlines()
    known = {json.loads(line)["part"] for line in lines[1:]}
    done, real = [], opened_merge.do_part

    def seen(job, part, device):
        done.append(part.name)
        return real(job, part, device)

    monkeypatch.setattr(opened_merge, "do_part", seen)
    run(recipe, tmp_path / "out", max_shard_size="20KB")
    assert done and not known & set(done) and "lm_head.weight" in known


def test_an_input_that_changed_in_between_is_noticed_by_its_values(tmp_path, monkeypatch):
    recipe = world(tmp_path)
    broken_off("added_head", recipe, tmp_path / "out", monkeypatch)
    file = tmp_path / "image" / "model.safetensors"
    stat, values = file.stat(), bytearray(file.read_bytes())
    values[-2] ^= 1
    file.write_bytes(values)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as long and as old as before
    run(recipe, tmp_path / "out", max_shard_size="20KB")
    run(recipe, tmp_path / "fresh", max_shard_size="20KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_an_input_that_changes_meanwhile(tmp_path, monkeypatch):
    recipe = world(tmp_path)
    real = opened_merge.do_part

    def touched(job, part, device):
        os.utime(tmp_path / "image" / "model.safetensors")
        return real(job, part, device)

    monkeypatch.setattr(opened_merge, "do_part", touched)
    with pytest.raises(ValueError, match=r"image/model.safetensors was changed while it was being merged"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_two_merges_into_one_folder(tmp_path, shared):
    _, recipe = shared
    with merging._alone(tmp_path / ".out.partial"):
        with pytest.raises(ValueError, match="another process is merging into this folder"):
            run(recipe, tmp_path / "out")
        assert (tmp_path / ".out.partial").is_dir()
    run(recipe, tmp_path / "out")


def test_the_plan_is_what_is_done(tmp_path, shared):
    _, recipe = shared
    recipe = Recipe.from_dict({**recipe, "decoupling": {"kind": "mask", "rank": 2}})
    before = sorted(tmp_path.iterdir())
    plan = merging.plan(recipe, max_shard_size="20KB")
    assert sorted(tmp_path.iterdir()) == before
    merging.merge(recipe, tmp_path / "out", progress=False, max_shard_size="20KB")
    stored = tiny.tensors(tmp_path / "out")
    planned = {tensor.name: tensor for part in plan.parts for tensor in part.stored}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in planned.items()
    }
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert sizes == plan.placement.sizes


def test_another_merge_does_not_go_on_from_there(tmp_path, shared, monkeypatch):
    _, recipe = shared
    broken_off("added_head", recipe, tmp_path / "out", monkeypatch)
    other = {**recipe, "method": {"alpha": 0.5}}
    run(other, tmp_path / "out", max_shard_size="20KB")
    run(other, tmp_path / "fresh", max_shard_size="20KB")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_dry_run_tells_and_writes_nothing(tmp_path, shared):
    _, recipe = shared
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.from_dict(recipe).to_yaml())
    done = CliRunner().invoke(mmer.app, ["merge", str(file), str(tmp_path / "out"), "--dry-run", "--threads", "3"])
    said = " ".join(done.output.split())
    assert done.exit_code == 0 and "16 │" in said and "3 workers" in said and "1 file" in said
    assert "rows of added tokens │ 1 │" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    done = CliRunner().invoke(mmer.app, ["merge", str(file), str(tmp_path / "out"), "--threads", "3"])
    assert done.exit_code == 0 and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("option", [{"threads": 0}, {"block": 0}, {"device": "nowhere"}], ids=str)
def test_settings_that_are_none(tmp_path, shared, option):
    _, recipe = shared
    with pytest.raises(ValueError, match="expected 1 or more|device is 'nowhere'"):
        run(recipe, tmp_path / "out", **option)
    assert not list(tmp_path.iterdir())


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


def test_an_overwritten_folder_whose_successor_did_not_get_its_name(tmp_path, shared):
    """Killed between the two renamings: the old folder comes back first, whatever becomes of the merge."""
    _, recipe = shared
    (tmp_path / ".out.partial" / "out.replaced").mkdir(parents=True)
    (tmp_path / ".out.partial" / "out.replaced" / "precious").write_text("x")
    with pytest.raises(ValueError, match="expected 1 or more"):
        run(recipe, tmp_path / "out", overwrite=True, threads=0)
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
