"""`verify`: a sound folder passes, and every kind of damage is found by the check that is there for it."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM
from typer.testing import CliRunner

import mmer
from merging_mmer.verification import verify
from modeling_mmer import MMERForConditionalGeneration
from processing_mmer import MMERProcessor

from . import tiny_checkpoints as tiny
from .tiny_merges import run, world

Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
WITHOUT_REPORT = {"density", "recipe", "sources"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """(the folder of base and experts, the recipe, a merged folder in several shards)"""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    recipe = {**world(folder, torch.bfloat16), "decoupling": {"kind": "mask", "rank": 2}}
    run(recipe, folder / "out", max_shard_size="60KB")
    return folder, recipe, folder / "out"


@pytest.fixture
def merged(origin, tmp_path):
    return Path(shutil.copytree(origin[2], tmp_path / "merged"))


def statuses(verification) -> dict[str, str]:
    return {check.name: check.status for check in verification.checks}


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(folder: Path, name: str, change):
    """Put `change(tensor)` in the place of a stored tensor; None takes it out, of the index too."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensor = change(tensors.pop(name))
    if tensor is not None:
        tensors[name] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    if tensor is None:
        del index["weight_map"][name]
    shards = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    index["metadata"]["total_size"] = sum(t.nbytes for shard in shards for t in shard.values())
    index_path.write_text(json.dumps(index))


def change_json(path: Path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_entry(values: torch.Tensor, place, value) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


# what is sound passes


def test_a_sound_folder_passes_every_check(origin):
    result = verify(origin[2], originals=True, load=True)
    assert set(statuses(result).values()) == {"passed"}, result.checks
    assert result.ok and len(result.checks) == 19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["mask", "paper", "none", "tensor"])
def test_every_kind_of_decoupling_passes(tmp_path, kind, dtype):
    decoupling = {"kind": "mask", "scale": "tensor"} if kind == "tensor" else {"kind": kind}
    recipe = {**world(tmp_path, dtype), "decoupling": decoupling, "method": {"density": 0.5}}
    report = run(recipe, tmp_path / "out")
    result = verify(tmp_path / "out", originals=True)
    skipped = {"none": {"masks", "scales", "density"}, "paper": {"scales"}}.get(kind, set())
    assert {name for name, status in statuses(result).items() if status != "passed"} == skipped, result.checks
    for name, expert in report.experts.items():
        assert f"{name} {expert['total']['residual']:.4f}" in result["residuals"].found


def adapter(folder: Path, tower: Path) -> Path:
    torch.manual_seed(5)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(AutoModelForMultimodalLM.from_pretrained(tower), config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["exact", "mask"])
def test_experts_that_are_adapters_pass(tmp_path, kind):
    recipe = world(tmp_path, torch.bfloat16, image={"noise": 0.0}, audio={"noise": 0.0})
    recipe["experts"] = {
        name: {"lora": str(adapter(tmp_path / f"{name}-lora", tmp_path / name)), "tower": str(tmp_path / name)}
        for name in ("image", "audio")
    }
    run({**recipe, "decoupling": {"kind": kind}}, tmp_path / "out")
    result = verify(tmp_path / "out", originals=True)
    skipped = {"masks", "scales", "density"} if kind == "exact" else set()
    assert {name for name, status in statuses(result).items() if status != "passed"} == skipped, result.checks


def test_a_tied_base_passes(tmp_path):
    recipe = world(tmp_path, torch.float32, tie_word_embeddings=True)
    run(recipe, tmp_path / "out")
    assert set(statuses(verify(tmp_path / "out", originals=True, load=True)).values()) == {"passed"}


def test_what_a_user_saved_passes_and_says_what_could_not_be_told(origin, tmp_path):
    MMERForConditionalGeneration.from_pretrained(origin[2]).save_pretrained(tmp_path / "saved")
    MMERProcessor.from_pretrained(origin[2]).save_pretrained(tmp_path / "saved")
    result = verify(tmp_path / "saved")
    passed = {name for name, status in statuses(result).items() if status == "passed"}
    assert result.ok
    alone = {"config", "attention", "files", "tensors", "finite", "masks", "scales", "processor", "placeholders"}
    assert passed == {*alone, "code"}
    assert all(
        "merge_recipe.yaml" in result[name].found or "merge_report" in result[name].found for name in WITHOUT_REPORT
    )
    told = verify(tmp_path / "saved", originals=origin[2] / "merge_recipe.yaml", load=True)
    assert {name for name, status in statuses(told).items() if status == "skipped"} == WITHOUT_REPORT
    assert told.ok and "no report" in told["residuals"].found


def test_a_base_can_be_named(origin, merged):
    (merged / "merge_recipe.yaml").unlink()
    assert verify(merged)["base"].status == "skipped" and "--base" in verify(merged)["base"].found
    assert verify(merged, base=str(origin[0] / "base"))["base"].status == "passed"
    other = tiny.save(tiny.base_model(seed=7, dtype=torch.bfloat16), merged.parent / "other")
    shutil.copyfile(origin[0] / "base" / "tokenizer.json", other / "tokenizer.json")
    shutil.copyfile(origin[0] / "base" / "tokenizer_config.json", other / "tokenizer_config.json")
    assert "base" in verify(merged, base=str(other)).failed


# every damage is found by its check, and by no other


def flip(place, bit):
    return lambda masks: set_entry(masks, place, int(masks[place]) ^ (1 << bit))


def next_up(weights: torch.Tensor) -> torch.Tensor:
    weights = weights.clone()
    weights.view(torch.int16)[3, 5] += 1
    return weights


DAMAGE = {
    "a tensor is gone": (f"{Q_PROJ}.scales", lambda t: None, {"tensors"}),
    "a tensor of the base is gone": (f"{Q_PROJ}.weight", lambda t: None, {"tensors"}),
    "a wrong shape": (f"{Q_PROJ}.correction_a", lambda t: t[:, :1], {"tensors"}),
    "a wrong dtype": (f"{Q_PROJ}.delta", lambda t: t.float(), {"tensors"}),
    "masks as other integers": (f"{Q_PROJ}.masks", lambda t: t.to(torch.int32), {"tensors"}),
    "NaN in scales": (f"{Q_PROJ}.scales", lambda t: set_entry(t, (0, 1), torch.nan), {"finite"}),
    "inf in a tower": (
        "model.experts.image.multi_modal_projector.linear_1.bias", lambda t: set_entry(t, 0, torch.inf), {"finite"}
    ),
    "a scale below zero": (f"{Q_PROJ}.scales", lambda t: -t, {"scales", "residuals"}),
    "one ulp in the base": (f"{Q_PROJ}.weight", next_up, {"base"}),
    "the tower": ("model.experts.audio.multi_modal_projector.linear.weight", next_up, {"towers"}),
    "a correction": (f"{Q_PROJ}.correction_b", lambda t: t.flip(1), {"residuals"}),
    "a norm of an expert": (
        "model.language_model.norm.expert_weight", lambda t: set_entry(t, (0, 3), t[0, 3] * 1.01),
        {"exact", "residuals"},
    ),
    "the row of an added token": ("added_head.weight", lambda t: t.flip(1), {"exact"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_found_by_its_check(merged, damage):
    name, change, expected = DAMAGE[damage]
    edit(merged, name, change)
    result = verify(merged, originals=True)
    assert set(result.failed) == expected, result.checks
    assert not result.ok
    faulty = result[result.failed[0]]
    assert faulty.found and faulty.expected
    if faulty.name not in ("residuals", "exact"):  # those name an expert, or the whole tensor
        assert name.split(".")[-2] in faulty.found


def test_a_bit_behind_the_last_column_is_found(tmp_path):
    """44 columns leave four padding bits in the last byte of each row."""
    name = "model.language_model.layers.1.mlp.down_proj.masks"
    recipe = world(tmp_path, torch.float32, intermediate_size=44)
    run(recipe, tmp_path / "out")
    masks = load_file(tmp_path / "out" / "model.safetensors")
    assert masks[name].shape[-1] == 6
    masks[name][1, 4, 5] ^= 1 << 7
    save_file(masks, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    result = verify(tmp_path / "out", originals=True)
    assert result.failed == ["masks"]
    assert "layers.1.mlp.down_proj" in result["masks"].found and "'audio'" in result["masks"].found


def test_a_bit_where_the_merged_vector_is_zero_is_found(merged):
    """The embedding's last two rows are padding: no expert changed them."""
    edit(merged, "model.language_model.embed_tokens.masks", flip((0, tiny.ROWS - 1, 1), 2))
    result = verify(merged, originals=True)
    assert {"masks", "density"} <= set(result.failed) <= {"masks", "density", "scales"}


def test_a_flipped_bit_is_found_by_the_density(merged):
    delta = load_file(shard_of(merged, f"{Q_PROJ}.delta"))[f"{Q_PROJ}.delta"]
    assert delta[2, 11] != 0
    edit(merged, f"{Q_PROJ}.masks", flip((1, 2, 1), 3))
    assert "density" in verify(merged).failed
    assert "masks" not in verify(merged).failed


def test_a_stranger_among_the_tensors_is_found(merged):
    path = shard_of(merged, f"{Q_PROJ}.weight")
    save_file({**load_file(path), "model.stranger": torch.ones(2)}, path, metadata={"format": "pt"})
    change_json(
        merged / "model.safetensors.index.json",
        lambda index: (
            index["weight_map"].update({"model.stranger": path.name}),
            index["metadata"].update(total_size=index["metadata"]["total_size"] + 8),
        ),
    )
    result = verify(merged, originals=True)
    assert result.failed == ["tensors"] and "model.stranger" in result["tensors"].found


def truncate(folder: Path):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def corrupt_header(folder: Path):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def drop_from_index(folder: Path):
    change_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(f"{Q_PROJ}.delta"))


FILES = {
    "truncated shard": truncate,
    "header beyond the file": corrupt_header,
    "missing shard": lambda folder: sorted(folder.glob("model-*.safetensors"))[-1].unlink(),
    "unused shard": lambda folder: save_file({"x": torch.ones(1)}, folder / "model-00099-of-00099.safetensors"),
    "both forms": lambda folder: save_file({"x": torch.ones(1)}, folder / "model.safetensors"),
    "index forgets a tensor": drop_from_index,
    "index of another size": lambda folder: change_json(
        folder / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=12)
    ),
    "index outside the folder": lambda folder: change_json(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../x.safetensors")
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_damaged_weight_files_are_found(merged, damage):
    FILES[damage](merged)
    result = verify(merged, originals=True)
    assert result.failed == ["files"], result.checks
    assert "files" in result["tensors"].found and result["tensors"].status == "skipped"


def expert_entry(values):
    return next(entry for entry in values["experts"] if entry["name"] == "image")


JSON = {
    "another placeholder id in the processor": (
        "processor_config.json",
        lambda values: expert_entry(values)["placeholders"]["image"].update(id=95),
        "placeholders",
    ),
    "another placeholder id in the config": (
        "config.json",
        lambda values: values["experts"]["image"]["placeholders"]["image"].update(id=5),
        "placeholders",
    ),
    "experts in another order": ("config.json", lambda values: values["expert_names"].reverse(), "processor"),
    "a config that contradicts itself": (
        "config.json", lambda values: values["decoupling"].update(kind="half"), "config"
    ),
    "a module that is not there": ("config.json", lambda values: values["delta_modules"].append("layers.7"), "config"),
    "a report of another density": (
        "merge_report.json",
        lambda values: values["experts"]["image"]["total"].update(mask_density=0.5),
        "density",
    ),
    "a report of another residual": (
        "merge_report.json", lambda values: values["experts"]["audio"]["total"].update(residual=0.01), "residuals"
    ),
    "a report without experts": ("merge_report.json", lambda values: values.pop("experts"), "recipe"),
}  # fmt: skip


@pytest.mark.parametrize("damage", JSON)
def test_damaged_json_is_found(merged, damage):
    name, change, check = JSON[damage]
    change_json(merged / name, change)
    result = verify(merged, originals=True)
    assert check in result.failed, result.checks
    if check in ("placeholders", "config", "residuals", "density"):
        assert result.failed == [check], result.checks


def test_an_edited_recipe_is_found(merged):
    path = merged / "merge_recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("  alpha: 1.0", "  alpha: 0.7"))
    result = verify(merged, originals=True)
    assert result.failed == ["recipe"]
    assert "alpha" in result["recipe"].found and "merge_report.json" in result["recipe"].expected
    path.write_text(text.replace("rank: 2", "rank: 3"))
    assert verify(merged).failed == ["recipe"]
    path.write_text("base: [")
    assert "recipe" in verify(merged).failed


def test_a_changed_original_is_found(tmp_path):
    recipe = world(tmp_path, torch.bfloat16)
    run(recipe, tmp_path / "out")
    path = tmp_path / "image" / "model.safetensors"
    tensors = load_file(path)
    tensors["multi_modal_projector.linear_1.weight"] = next_up(tensors["multi_modal_projector.linear_1.weight"])
    save_file(tensors, path, metadata={"format": "pt"})
    assert verify(tmp_path / "out").failed == ["sources"]
    assert set(verify(tmp_path / "out", originals=True).failed) == {"sources", "towers"}


def test_another_tokenizer_is_found(merged):
    """Two tokens of the base with their ids exchanged."""
    path = merged / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))
    result = verify(merged, originals=True)
    assert result.failed == ["tokenizer"] and "as in the base" in result["tokenizer"].expected


def test_code_of_another_version_is_a_warning(merged):
    path = merged / "routing_mmer.py"
    path.write_text(path.read_text() + "\n# older\n")
    result = verify(merged)
    assert result.ok and result["code"].status == "warning"
    assert "routing_mmer.py" in result["code"].found and mmer.__version__ in result["code"].found
    (merged / "modeling_mmer.py").unlink()
    assert verify(merged).failed == ["code"]


def test_a_wrong_base_route_is_found_when_the_model_is_loaded(merged):
    edit(merged, "model.language_model.norm.weight", lambda t: t * 1.5)
    assert set(verify(merged, load=True).failed) == {"base", "load"}


# the command


def test_the_command_exits_0_and_prints_every_check(origin):
    done = CliRunner().invoke(mmer.app, ["verify", str(origin[2]), "--originals"])
    assert done.exit_code == 0, done.output
    for name in ("config", "masks", "residuals", "towers"):
        assert name in done.output


def test_the_command_exits_1_on_damage_and_json_parses(merged):
    edit(merged, f"{Q_PROJ}.scales", lambda t: set_entry(t, (0, 1), torch.nan))
    done = CliRunner().invoke(mmer.app, ["verify", str(merged), "--json"])
    assert done.exit_code == 1
    values = json.loads(done.stdout)
    assert not values["ok"]
    assert [check["name"] for check in values["checks"] if check["status"] == "failed"] == ["finite"]
    assert CliRunner().invoke(mmer.app, ["verify", str(merged)]).exit_code == 1


def test_the_command_says_when_there_is_nothing_to_check(tmp_path):
    done = CliRunner().invoke(mmer.app, ["verify", str(tmp_path / "nowhere")])
    assert done.exit_code == 1 and "no folder" in " ".join(done.stderr.split())
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(mmer.app, ["verify", str(tmp_path / "empty")]).exit_code == 1
