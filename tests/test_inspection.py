"""`inspect`: what a source is, from headers alone; and every reason why it does not fit a base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM
from typer.testing import CliRunner

import mmer
from merging_mmer.checkpoints import Checkpoint
from merging_mmer.inspection import inspect

from . import tiny_checkpoints as tiny
from .tiny_merges import run, tokenizer, world


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    recipe = world(folder, torch.bfloat16)
    return folder, recipe


@pytest.fixture
def copy(origin, tmp_path):
    """A copy of one of the folders, to damage."""
    return lambda name: Path(shutil.copytree(origin[0] / name, tmp_path / name))


@pytest.fixture
def no_values(monkeypatch):
    """Reading a value fails: headers must do."""

    def refuse(self, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)


def edit(folder: Path, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def numbers(found) -> dict[str, tuple[int, int, int]]:
    return {group.name: (group.tensors, group.parameters, group.bytes) for group in found.groups}


# what it is


def test_a_language_model_by_its_headers(origin, no_values):
    found = inspect(origin[0] / "base")
    assert (found.kind, found.architecture, found.model_type) == ("language model", "LlamaForCausalLM", "llama")
    assert found.ok and found.fit is None
    vocabulary = 2 * 96 * 32
    # per layer: q, o 32×32; k, v 16×32; gate, up, down 48×32; two norms of 32; behind the layers one more norm
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32
    assert numbers(found) == {
        "language model": (19, layers, 2 * layers),
        "vocabulary": (2, vocabulary, 2 * vocabulary),
    }
    assert found.group("vocabulary").dtypes == {"bfloat16": 2}
    assert (found.words.rows, found.words.tokens, found.words.padding) == (96, 94, 2)
    assert not found.words.placeholders


def test_an_expert_by_its_headers(origin, no_values):
    found = inspect(origin[0] / "image")
    assert (found.kind, found.architecture) == ("multimodal checkpoint", "LlavaForConditionalGeneration")
    assert [group.name for group in found.groups[:2]] == ["language model", "vocabulary"]
    assert {group.name for group in found.groups[2:]} == {"tower: vision_tower", "tower: multi_modal_projector"}
    stored = tiny.tensors(origin[0] / "image")
    assert sum(group.tensors for group in found.groups) == len(stored)
    assert sum(group.bytes for group in found.groups) == sum(tensor.nbytes for tensor in stored.values())
    assert found.words.placeholders == {"image": {"token": "<image>", "id": 96}}
    assert "<image>" in found.words.added and "<grid>" in found.words.added
    assert inspect(origin[0] / "audio").words.placeholders == {"audio": {"token": "<|AUDIO|>", "id": 96}}


def test_old_pickles_are_read_by_their_headers_too(origin, copy, no_values):
    folder = copy("image")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert numbers(inspect(folder)) == numbers(inspect(origin[0] / "image"))


def test_unknown_and_missing_tensors_are_listed(copy, no_values):
    folder = copy("image")

    def change(tensors):
        tensors["stranger.weight"] = torch.ones(3)
        del tensors["multi_modal_projector.linear_1.bias"]

    edit(folder, change)
    found = inspect(folder)
    assert not found.ok
    assert found.unknown == ["stranger.weight"]
    assert found.missing == ["model.multi_modal_projector.linear_1.bias"]
    assert numbers(found)["unknown"] == (1, 3, 12)


def test_a_checkpoint_of_a_wrong_shape_is_shown_by_its_saved_names(copy):
    folder = copy("image")
    edit(folder, lambda tensors: tensors.update({"multi_modal_projector.linear_1.bias": torch.ones(5)}))
    found = inspect(folder)
    assert not found.ok and "(5,)" in found.problems[0]
    assert "unknown: multi_modal_projector" in numbers(found)


def test_a_tower_without_a_language_model(origin, copy):
    folder = copy("image")

    def change(tensors):
        for name in [name for name in tensors if name.startswith("language_model")]:
            del tensors[name]

    edit(folder, change)
    found = inspect(folder, base=str(origin[0] / "base"))
    assert found.ok, found
    assert "no language model of its own" in found.notes[0]
    assert found.fit.distance == 0.0 and not found.fit.changed


def test_an_architecture_that_nobody_knows(copy, no_values):
    folder = copy("image")
    change_json(folder / "config.json", lambda values: values.update(model_type="made_up"))
    found = inspect(folder)
    assert found.kind == "unknown" and not found.ok
    assert "made_up" in found.problems[0]
    assert "unknown: language_model" in numbers(found)


# adapters


@pytest.fixture(scope="module")
def lora(origin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    config = LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, init_lora_weights=False, rank_pattern={"layers.1.self_attn.q_proj": 5},
        target_modules=r".*language_model.*(q_proj|down_proj)", modules_to_save=["linear_1"],
    )  # fmt: skip
    tower = str(origin[0] / "image")
    model = get_peft_model(AutoModelForMultimodalLM.from_pretrained(tower), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.05)
    model.save_pretrained(folder / "lora")
    return folder / "lora"


def test_an_adapter(lora, origin, no_values):
    found = inspect(lora)
    assert found.kind == "adapter" and found.ok
    facts = found.adapter
    assert facts["ranks"] == {"3": 3, "5": 1}
    assert (facts["rank"], facts["alpha"], facts["rslora"]) == (3, 6, True)
    assert facts["targets"] == r".*language_model.*(q_proj|down_proj)"
    assert facts["modules_to_save"] == ["linear_1"] and len(facts["replaced"]) == 2
    assert facts["trained_on"] == str(origin[0] / "image")
    assert found.words.placeholders == {"image": {"token": "<image>", "id": 96}}
    assert "LlavaForConditionalGeneration" in found.notes[0]
    assert numbers(found)["adapter"][0] == 4 * 2 + 2


def test_an_adapter_against_the_base(lora, origin, tmp_path):
    fit = inspect(lora, base=str(origin[0] / "base"), every=True).fit
    assert fit.fits and 0 < fit.distance < 0.7
    assert fit.tensors == 21
    moved = Path(shutil.copytree(lora, tmp_path / "moved"))
    change_json(moved / "adapter_config.json", lambda values: values.update(base_model_name_or_path=None))
    base, tower = str(origin[0] / "base"), str(origin[0] / "image")
    assert "give the checkpoint as tower" in inspect(moved, base=base).fit.reasons[0]
    assert inspect(moved, base=base, tower=tower).fit.fits


@pytest.mark.parametrize(
    "feature, name", [("use_dora", "DoRA"), ("lora_bias", "lora_bias"), ("fan_in_fan_out", "transposed")]
)
def test_what_an_adapter_may_not_use_is_named(lora, tmp_path, feature, name):
    folder = Path(shutil.copytree(lora, tmp_path / "lora"))
    change_json(folder / "adapter_config.json", lambda values: values.update({feature: True}))
    found = inspect(folder)
    assert not found.ok and name in found.problems[0]
    assert found.adapter["alpha"] == 6


# merged folders


@pytest.mark.parametrize("kind", ["mask", "paper", "none"])
def test_a_merged_folder(origin, tmp_path, kind):
    report = run({**origin[1], "decoupling": {"kind": kind}}, tmp_path / "out", max_shard_size="60KB")
    found = inspect(tmp_path / "out", base=str(origin[0] / "base"), every=True)
    assert found.kind == "merged" and found.ok, found.problems
    assert found.fit.distance == 0.0 and found.fit.equal == 1.0 and not found.fit.changed
    stored = tiny.tensors(tmp_path / "out")
    sizes = numbers(found)
    assert sum(size for _, _, size in sizes.values()) == sum(tensor.nbytes for tensor in stored.values())
    assert ("masks" in sizes, "corrections" in sizes) == (kind != "none", kind == "mask")
    assert sizes["base"][0] == 21 and "tower of image: vision_tower" in sizes
    image = found.merged["experts"]["image"]
    assert image["modalities"] == ["image"] and image["model_type"] == "llava"
    assert image["residual"] == report.experts["image"]["total"]["residual"]
    assert image["mask_density"] == report.experts["image"]["total"]["mask_density"]
    assert found.words.placeholders["image (image)"]["token"] == "<image>"
    (tmp_path / "out" / "merge_report.json").unlink()
    without = inspect(tmp_path / "out")
    assert without.ok and "residual" not in without.merged["experts"]["image"]


def test_a_merged_folder_of_another_base(origin, tmp_path):
    run(origin[1], tmp_path / "out")
    other = tiny.save(tiny.base_model(seed=7, dtype=torch.bfloat16), tmp_path / "other")
    tokenizer().save_pretrained(other)
    fit = inspect(tmp_path / "out", base=str(other)).fit
    assert not fit.fits and any("bit for bit" in reason for reason in fit.reasons)
    assert fit.distance > 1


# does it fit


def test_distances_are_those_of_the_definition(origin):
    fit = inspect(origin[0] / "image", base=str(origin[0] / "base"), every=True).fit
    base = tiny.tensors(origin[0] / "base")
    stored = tiny.tensors(origin[0] / "image")
    theta, theta_0 = [], []
    for name, tensor in base.items():
        if tensor.ndim < 2:
            continue
        own = stored["language_model." + name]
        rows = 94 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        own = torch.cat([own[:rows], tensor[rows:]])  # rows behind the tokens are padding
        theta.append(own.double().flatten())
        theta_0.append(tensor.double().flatten())
    theta, theta_0 = torch.cat(theta), torch.cat(theta_0)
    assert fit.fits and fit.tensors == 21 and len(fit.compared) == 16
    assert fit.distance == pytest.approx(float((theta - theta_0).norm() / theta_0.norm()), rel=1e-6)
    assert fit.cosine == pytest.approx(float(theta @ theta_0 / theta.norm() / theta_0.norm()), rel=1e-6)
    assert fit.equal == pytest.approx(float((theta == theta_0).double().mean()), rel=1e-6)


def test_what_changed_is_named(origin, tmp_path):
    base = origin[0] / "base"
    expert = Path(shutil.copytree(base, tmp_path / "expert"))
    edit(expert, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    edit(expert, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    fit = inspect(expert, base=str(base), every=True).fit
    assert fit.fits and set(fit.changed) == {"layers.1.mlp.up_proj.weight", "norm.weight"}


def test_every_reason_is_listed_and_not_the_first_alone(origin, tmp_path):
    folder = tmp_path / "other"
    model = tiny.base_model("qwen2", seed=7, dtype=torch.bfloat16, intermediate_size=56, rms_norm_eps=1e-5)
    tiny.save(model, folder)
    words = tokenizer()
    words.save_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocab = vocabulary["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    fit = inspect(origin[0] / "image", base=str(folder)).fit
    text = "\n".join(fit.reasons)
    for wanted in ("model_type", "intermediate_size", "rms_norm_eps", "q_proj.bias", "another shape", "tokenizer"):
        assert wanted in text
    assert "norm away" in text and fit.distance > 1
    assert "inspected" not in text


def test_the_first_token_that_differs_is_named(origin, copy):
    folder = copy("base")
    values = json.loads((folder / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["c"], vocab["d"] = vocab["d"], vocab["c"]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    for source in ("base", "image"):
        fit = inspect(origin[0] / source, base=str(folder)).fit
        assert len(fit.reasons) == 1
        assert "tokenizer" in fit.reasons[0] and ("'c'" in fit.reasons[0] or "'d'" in fit.reasons[0])


def test_an_unrelated_model_of_one_shape_does_not_fit(origin, tmp_path):
    other = tiny.save(tiny.base_model(seed=9, dtype=torch.bfloat16), tmp_path / "other")
    tokenizer().save_pretrained(other)
    for source in ("base", "image"):
        fit = inspect(origin[0] / source, base=str(other)).fit
        assert len(fit.reasons) == 1 and "norm away" in fit.reasons[0], fit.reasons
        assert fit.distance == pytest.approx(2**0.5, abs=0.1)


# the command


def test_the_command(origin, tmp_path):
    base, image = str(origin[0] / "base"), str(origin[0] / "image")
    done = CliRunner().invoke(mmer.app, ["inspect", image, "--base", base])
    assert done.exit_code == 0, done.output
    for words in ("tower: vision_tower", "language model", "<image>", "fits"):
        assert words in done.output
    other = tiny.save(tiny.base_model(seed=9, dtype=torch.bfloat16, intermediate_size=40), tmp_path / "other")
    tokenizer().save_pretrained(other)
    done = CliRunner().invoke(mmer.app, ["inspect", image, "--base", str(other)])
    assert done.exit_code == 1 and "does not fit" in done.output and "intermediate_size" in done.output


def test_the_command_prints_json(origin, lora, tmp_path):
    run(origin[1], tmp_path / "out")
    for source in (origin[0] / "base", origin[0] / "image", lora, tmp_path / "out"):
        done = CliRunner().invoke(mmer.app, ["inspect", str(source), "--base", str(origin[0] / "base"), "--json"])
        values = json.loads(done.stdout)
        assert done.exit_code == 0 and values["ok"] and values["fit"]["reasons"] == [], done.stdout
        assert CliRunner().invoke(mmer.app, ["inspect", str(source)]).exit_code == 0


def test_the_command_refuses_what_is_unreadable(copy, tmp_path):
    assert CliRunner().invoke(mmer.app, ["inspect", str(tmp_path / "nowhere")]).exit_code == 1
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(mmer.app, ["inspect", str(tmp_path / "empty")])
    assert done.exit_code == 1 and "config.json" in done.stderr
    folder = copy("image")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    done = CliRunner().invoke(mmer.app, ["inspect", str(folder)])
    assert done.exit_code == 1 and "truncated" in done.output
