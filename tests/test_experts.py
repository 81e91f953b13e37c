"""Opening checkpoints: old and new names, shards and pickles, what is refused and how."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from merging_mmer.checkpoints import Checkpoint, fetch
from merging_mmer.experts import Base, open_expert
from merging_mmer.recipe import ExpertRecipe
from modeling_mmer.towers_mmer import build_tower

from . import tiny_checkpoints as tiny

KINDS = {
    "llava": "llama",
    "llava_onevision": "qwen2",
    "video_llava": "llama",
    "qwen2_audio": "qwen2",
    "smolvlm": "llama",
}


def opened(folder, base, name="image", **recipe):
    return open_expert(name, ExpertRecipe(**{"model": str(folder), **recipe}), base)


@pytest.fixture
def llama(tmp_path):
    model = tiny.base_model()
    return model, Base(str(tiny.save(model, tmp_path / "base")))


# names


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_finds_its_place(kind, names, tmp_path):
    model = tiny.base_model(KINDS[kind])
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = tiny.expert_model(kind, model)
    expert = opened(tiny.save(trained, tmp_path / "expert", names), base)
    llm = {**tiny.llm_of(trained).state_dict(), "lm_head.weight": trained.get_output_embeddings().weight}
    assert set(base.names) == set(llm)
    for name, theta in llm.items():
        assert torch.equal(expert.exact_tensor(name), theta)
        theta_0 = base.tensor(name)
        assert torch.equal(expert.task_vector(name, theta_0, tiny.ROWS), theta[: len(theta_0)] - theta_0)
    tower = build_tower(trained.config)
    assert set(expert.tower) == set(tower.state_dict())
    whole = trained.base_model.state_dict()
    for name in expert.tower:
        assert torch.equal(expert.tower_tensor(name), whole[name])


def test_the_names_on_the_hub_of_llava_1_5(tmp_path, llama):
    """llava-hf checkpoints hold CLIP's old inner prefix, and Video-LLaVA ones position_ids as well."""
    model, base = llama
    trained = tiny.expert_model("llava", model)
    folder = tiny.save(trained, tmp_path / "expert")
    stored = tiny.tensors(folder)
    old = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in stored.items()}
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    assert set(old) != set(stored)
    save_file(old, folder / "model.safetensors")
    expert = opened(folder, base)
    for name, tensor in trained.base_model.vision_tower.state_dict().items():
        assert torch.equal(expert.tower_tensor(f"vision_tower.{name}"), tensor)


def test_tensors_that_transformers_fuses_on_loading(tmp_path):
    """Mixtral's experts lie one by one on disk, and as one tensor of three dimensions in the class."""
    sizes = {key: value for key, value in tiny.SIZES.items() if key != "vocab_size"}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=99, num_local_experts=4, num_experts_per_tok=2, **sizes))
    folder = tiny.save(model, tmp_path / "base")
    assert any("experts.3.w1" in name for name in tiny.tensors(folder))
    base = Base(str(folder))
    state = model.model.state_dict()
    assert set(base.names) == {*state, "lm_head.weight"}
    assert all(torch.equal(base.tensor(name), state[name]) for name in state)
    fused = [name for name in base.names if len(base.shapes[name]) == 3]
    assert fused and not base.delta_weights & set(fused)


@pytest.mark.parametrize("names", ["old", "new"])
def test_tied_embeddings(tmp_path, names):
    model = tiny.base_model(tie_word_embeddings=True)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    assert base.tied and "lm_head.weight" not in base.names
    trained = tiny.expert_model("llava", model)
    expert = opened(tiny.save(trained, tmp_path / "expert", names), base)
    assert torch.equal(expert.exact_tensor("embed_tokens.weight"), trained.get_input_embeddings().weight)


def test_a_tied_head_that_neither_class_nor_checkpoint_knows(tmp_path):
    model = tiny.base_model("qwen2", tie_word_embeddings=True)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = tiny.expert_model("qwen2_audio", model)
    folder = tiny.save(trained, tmp_path / "expert")
    stored = tiny.tensors(folder)
    stored.pop("language_model.lm_head.weight", None)
    save_file(stored, folder / "model.safetensors")
    assert torch.equal(opened(folder, base).exact_tensor("lm_head.weight"), trained.get_input_embeddings().weight)


def test_a_head_of_its_own_over_a_tied_base_unties_the_base(tmp_path):
    model = tiny.base_model(tie_word_embeddings=True)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    opened(tiny.save(tiny.expert_model("llava", model), tmp_path / "tied"), base)
    assert base.vocabulary_names == ("embed_tokens.weight",) and "lm_head.weight" not in base.names
    trained = tiny.expert_model("llava", model, tie_word_embeddings=False)
    expert = opened(tiny.save(trained, tmp_path / "expert"), base)
    assert base.vocabulary_names == ("embed_tokens.weight", "lm_head.weight") and "lm_head.weight" in base.names
    theta_0 = base.tensor("lm_head.weight")
    assert torch.equal(theta_0, base.tensor("embed_tokens.weight")) and not base.config.tie_word_embeddings
    tau = expert.task_vector("lm_head.weight", theta_0, tiny.ROWS)
    assert torch.equal(tau, trained.get_output_embeddings().weight.detach()[: tiny.ROWS] - theta_0)


def test_an_unknown_tensor_is_listed(tmp_path, llama):
    model, base = llama
    folder = tiny.save(tiny.expert_model("llava", model), tmp_path / "expert")
    save_file({**tiny.tensors(folder), "vision_tower.extra.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are unknown to LlavaForConditionalGeneration: .*extra\.weight"):
        opened(folder, base)


@pytest.mark.parametrize("lost", ["language_model.model.norm.weight", "multi_modal_projector.linear_1.bias"])
def test_a_missing_tensor_is_listed(tmp_path, llama, lost):
    model, base = llama
    folder = tiny.save(tiny.expert_model("llava", model), tmp_path / "expert")
    stored = tiny.tensors(folder)
    del stored[lost]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing: .*(norm\.weight|linear_1\.bias)"):
        opened(folder, base)


def test_a_base_with_a_missing_tensor(tmp_path, llama):
    stored = tiny.tensors(tmp_path / "base")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the base lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        Base(str(tmp_path / "base"))


def test_a_tensor_of_another_shape(tmp_path, llama):
    model, base = llama
    folder = tiny.save(tiny.expert_model("llava", model), tmp_path / "expert")
    save_file(
        {**tiny.tensors(folder), "multi_modal_projector.linear_1.bias": torch.ones(3)}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"linear_1\.bias' has shape \(3,\).*expects \(32,\)"):
        opened(folder, base)


def test_a_tower_without_a_language_model_stands_on_the_base(tmp_path, llama):
    model, base = llama
    folder = tiny.save(tiny.expert_model("llava", model), tmp_path / "expert")
    save_file(
        {k: v for k, v in tiny.tensors(folder).items() if "language_model" not in k}, folder / "model.safetensors"
    )
    expert = opened(folder, base)
    assert not any(expert.task_vector(n, base.tensor(n), tiny.ROWS).any() for n in base.names)


# files


def test_shards_and_pickles(tmp_path, llama):
    model, base = llama
    trained = tiny.expert_model("llava", model)
    whole = opened(tiny.save(trained, tmp_path / "one"), base)
    sharded = tiny.save(trained, tmp_path / "many", max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    pickled = tiny.save(trained, tmp_path / "pickle")
    torch.save(tiny.tensors(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    old_pickle = tiny.save(trained, tmp_path / "old_pickle")
    torch.save(tiny.tensors(old_pickle), old_pickle / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (old_pickle / "model.safetensors").unlink()
    for folder in (sharded, pickled, old_pickle):
        other = opened(folder, base)
        for name in base.names:
            assert torch.equal(whole.exact_tensor(name), other.exact_tensor(name))


def test_a_missing_shard_is_named(tmp_path, llama):
    folder = tiny.save(tiny.base_model(), tmp_path / "many", max_shard_size="20KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"names .*{gone.name}"):
        Checkpoint(folder)


def test_an_index_that_promises_too_much(tmp_path):
    folder = tiny.save(tiny.base_model(), tmp_path / "many", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="promises 1 tensors .*ghost"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b.safetensors"]
)
def test_an_index_never_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="shards must lie beside their index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="not an index of shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_truncated_file_is_named(tmp_path, name, keep):
    state = {f"t{i}": torch.randn(64, 64) for i in range(4)}
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        Checkpoint(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no plain state dict"):
        Checkpoint(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other things at"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_names_file_and_tensor(tmp_path, llama, value):
    _, base = llama
    folder = tmp_path / "base"
    stored = tiny.tensors(folder)
    stored["model.norm.weight"][3] = value
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'model\.norm\.weight' holds 1 values"):
        Base(str(folder)).tensor("norm.weight")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="no weights. Expected one of"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_source_that_is_nothing(source):
    with pytest.raises(ValueError, match="no folder here, and no Hub id"):
        fetch(source)


# does it belong to the base


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 64}, "hidden_size 64, the base 32"),
        ({"intermediate_size": 40}, "intermediate_size 40"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps 0.5"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters .*5.0"),
    ],
)
def test_another_shape_names_the_field(tmp_path, llama, change, field):
    _, base = llama
    other = tiny.base_model(**change)
    with pytest.raises(ValueError, match=f"not tuned from this base: its language model has {field}"):
        opened(tiny.save(tiny.expert_model("llava", other), tmp_path / "expert"), base)


def test_another_architecture_names_the_field(tmp_path, llama):
    _, base = llama
    other = tiny.base_model("qwen2")
    with pytest.raises(ValueError, match="model_type 'qwen2', the base 'llama'"):
        opened(tiny.save(tiny.expert_model("llava", other), tmp_path / "expert"), base)


def test_an_unrelated_model_of_the_same_shape_is_refused_with_its_distance(tmp_path, llama):
    _, base = llama
    other = tiny.base_model(seed=9)
    with pytest.raises(
        ValueError, match=r"'image' was not tuned from .*: its language model is 1\.[34]\d of the base's norm"
    ):
        opened(tiny.save(tiny.expert_model("llava", other), tmp_path / "expert"), base)


def test_a_plain_language_model_is_no_expert(tmp_path, llama):
    _, base = llama
    with pytest.raises(ValueError, match="no multimodal language model of this kind"):
        opened(tmp_path / "base", base)


def test_a_hub_id_with_a_revision(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, "*.bin" in allow_patterns))
        assert {"non_lora_trainables.bin", "mm_projector.bin"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("merging_mmer.checkpoints.snapshot_download", download)
    assert fetch("org/name@v1") == tmp_path
    assert asked == [("org/name", "v1", False), ("org/name", "v1", True)]  # no safetensors there: the pickles too
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    fetch("org/name")
    assert asked == [("org/name", None, False)]
