"""LoRA adapters: against PEFT's own merge_and_unload, by hand, and what is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging_mmer import lora
from merging_mmer.experts import Base, open_expert
from merging_mmer.lora import LoraAdapter
from merging_mmer.recipe import ExpertRecipe

from . import tiny_checkpoints as tiny

ALL_LINEAR = r".*layers.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def train(model, folder, seed=5, **config):
    """A PEFT adapter with random factors, saved by PEFT; returns the merged model."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
            elif "modules_to_save.default" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
            elif "trainable_tokens_delta" in name:
                parameter.add_(0.1)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.fixture
def base(tmp_path):
    return Base(str(tiny.save(tiny.base_model(), tmp_path / "base")))


@pytest.fixture
def tower(tmp_path):
    """A llava whose LLM is the base's own."""
    return tiny.save(tiny.expert_model("llava", tiny.base_model(), noise=0.0), tmp_path / "tower")


def opened(base, tmp_path, **recipe):
    return open_expert(
        "image", ExpertRecipe(**{"lora": str(tmp_path / "lora"), "tower": str(tmp_path / "tower"), **recipe}), base
    )


def check(expert, base, merged, **tolerance):
    """Every task vector equals what PEFT's merged model differs from the base by."""
    llm = tiny.llm_of(merged).state_dict()
    for name in base.names:
        theta_0 = base.tensor(name)
        theta = llm[name] if name in llm else merged.get_output_embeddings().weight
        rows = min(len(theta), len(theta_0))
        tau = expert.task_vector(name, theta_0, tiny.ROWS)
        torch.testing.assert_close(tau[:rows], theta.detach()[:rows] - theta_0[:rows], rtol=1e-5, atol=1e-6)
    whole = (
        merged.base_model.state_dict() if expert.tower and hasattr(merged.base_model, "multi_modal_projector") else {}
    )
    for name in expert.tower:
        if whole:
            torch.testing.assert_close(expert.tower_tensor(name), whole[name], rtol=1e-5, atol=1e-6)


VARIANTS = {
    "plain": {},
    "all linears": {"target_modules": ALL_LINEAR},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.mlp\.up_proj": 7},
        "alpha_pattern": {"up_proj": 3},
    },
    "patterns with rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "more rank than the matrix has": {"r": 40},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "embedding saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding by LoRA": {"target_modules": ["embed_tokens", "q_proj"]},
    "head by LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "trained tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trained_on", ["llm", "multimodal"])
def test_against_peft(variant, trained_on, base, tower, tmp_path):
    if trained_on == "llm":
        model = tiny.base_model()
    else:
        model = tiny.expert_model("llava", tiny.base_model(), noise=0.0)
    merged = train(model, tmp_path / "lora", **VARIANTS[variant])
    check(opened(base, tmp_path), base, merged)


TIED = {
    "plain": ({}, True),
    "trained tokens": ({"trainable_token_indices": [3, 5]}, True),
    "head saved whole": ({"modules_to_save": ["lm_head"]}, False),
    "embedding saved whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "both saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
}


@pytest.mark.parametrize("variant", TIED)
@pytest.mark.parametrize("bare", [False, True])
def test_on_a_base_whose_head_is_its_embedding(variant, bare, tmp_path):
    """The base stays tied where PEFT's model does. `bare`: the tower's checkpoint is without its language model."""
    settings, tied = TIED[variant]
    model = tiny.base_model(tie_word_embeddings=True)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    folder = tiny.save(tiny.expert_model("llava", model, noise=0.0), tmp_path / "tower")
    if bare:
        rest = {name: t for name, t in tiny.tensors(folder).items() if not name.startswith("language_model.")}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    merged = train(tiny.base_model(tie_word_embeddings=True), tmp_path / "lora", **settings)
    check(opened(base, tmp_path), base, merged)
    same = torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    assert base.tied == same == tied


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_lora_on_one_of_two_tied_matrices(target, bare, tmp_path):
    """Before it is merged (merging writes into the shared matrix), PEFT's LoRA changes the one it is on alone."""
    model = tiny.base_model(tie_word_embeddings=True)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    folder = tiny.save(tiny.expert_model("llava", model, noise=0.0), tmp_path / "tower")
    if bare:
        rest = {name: t for name, t in tiny.tensors(folder).items() if not name.startswith("language_model.")}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    train(tiny.base_model(tie_word_embeddings=True), tmp_path / "lora", target_modules=[target, "q_proj"])
    expert = opened(base, tmp_path)
    changed = {name for name in base.names if expert.task_vector(name, base.tensor(name), tiny.ROWS).any()}
    assert {name for name in changed if "q_proj" not in name} == {f"{target}.weight"}


def test_a_lora_that_reaches_the_tower(base, tower, tmp_path):
    model = tiny.expert_model("llava", tiny.base_model(), noise=0.0)
    merged = train(
        model, tmp_path / "lora", target_modules=["q_proj", "linear_1"], modules_to_save=["linear_2", "post_layernorm"]
    )
    expert = opened(base, tmp_path)
    changed = [
        n for n in expert.tower if not torch.equal(expert.tower_tensor(n), expert.weights.tensor(expert.tower[n]))
    ]
    assert {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"} <= set(changed)
    check(expert, base, merged)


def test_bias_trained_along(base, tower, tmp_path):
    model = tiny.expert_model("llava", tiny.base_model(), noise=0.0)
    merged = train(model, tmp_path / "lora", target_modules=["linear_1"], bias="all")
    check(opened(base, tmp_path), base, merged)


def test_an_expert_tuned_in_full_and_then_by_lora(base, tmp_path):
    model = tiny.expert_model("llava", tiny.base_model(), noise=0.02)
    tiny.save(model, tmp_path / "tower")
    merged = train(model, tmp_path / "lora")
    check(opened(base, tmp_path), base, merged)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "model.", "", "model.language_model.model."]
)
def test_names_of_all_times(prefix, base, tower, tmp_path):
    """language_model.model.… (before transformers 4.52), model.language_model.… (after), model.… (bare LLM)."""
    merged = train(tiny.base_model(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {
        k.replace("base_model.model.model.", f"base_model.model.{prefix}"): v for k, v in load_file(path).items()
    }
    save_file(renamed, path)
    check(opened(base, tmp_path), base, merged)


def test_an_adapter_folder_leads_to_its_tower(base, tower, tmp_path):
    merged = train(tiny.expert_model("llava", tiny.base_model(), noise=0.0), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for source, recipe in ((str(tower), {}), ("org/elsewhere", {"tower": str(tower)})):
        config["base_model_name_or_path"] = source
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
        check(open_expert("image", ExpertRecipe(model=str(tmp_path / "lora"), **recipe), base), base, merged)
    config["base_model_name_or_path"] = None
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give the checkpoint as tower"):
        open_expert("image", ExpertRecipe(model=str(tmp_path / "lora")), base)


# several adapters, and adapters beside weights


def two_adapters(folder):
    """PEFT saves the adapter named `default` at the top of the folder and any other in a sub-folder of its name."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(tiny.base_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]), "pictures")
    wrapped.add_adapter("sounds", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"pictures", "sounds"}
    return wrapped


def changed_by(expert, base):
    changed = {n for n in base.names if expert.task_vector(n, base.tensor(n), tiny.ROWS).any()}
    return {name.split(".")[-2] for name in changed}


def test_one_of_several_adapters_in_a_folder(base, tower, tmp_path):
    wrapped = two_adapters(tmp_path / "lora")
    for name, module in (("pictures", "q_proj"), ("sounds", "v_proj")):
        expert = opened(base, tmp_path, lora=str(tmp_path / "lora" / name))
        assert changed_by(expert, base) == {module}
        layer = wrapped.base_model.model.model.layers[0].self_attn.get_submodule(module)
        tau = expert.task_vector(
            f"layers.0.self_attn.{module}.weight", base.tensor(f"layers.0.self_attn.{module}.weight"), tiny.ROWS
        )
        torch.testing.assert_close(tau, layer.get_delta_weight(name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", ["lora", "model"])
def test_several_adapters_and_none_named(field, base, tower, tmp_path):
    two_adapters(tmp_path / "lora")
    recipe = ExpertRecipe(**{field: str(tmp_path / "lora"), "tower": str(tower)})
    with pytest.raises(ValueError, match=r"several adapters, \['pictures', 'sounds'\]: name one, as lora: "):
        open_expert("image", recipe, base)


def test_an_adapter_in_a_sub_folder_of_a_hub_repository(base, tower, tmp_path, monkeypatch):
    two_adapters(tmp_path / "repo")
    asked = []

    def fetched(source):
        asked.append(source)
        return Path(source) if Path(source).is_dir() else tmp_path / "repo"

    monkeypatch.setattr(lora, "fetch", fetched)
    for source, repo in (("org/name/sounds", "org/name"), ("org/name/sounds@v1", "org/name@v1")):
        assert changed_by(opened(base, tmp_path, lora=source), base) == {"v_proj"}
        assert asked.pop() == repo
    with pytest.raises(ValueError, match=r"holds no adapter there; found adapters in \['pictures', 'sounds'\]"):
        opened(base, tmp_path, lora="org/name/images")
    with pytest.raises(ValueError, match="no Hub id with a sub-folder"):
        opened(base, tmp_path, lora="org/name/../sounds")


def test_a_sub_folder_that_cannot_be_fetched(base, tower, tmp_path):
    with pytest.raises(ValueError, match="'runs/one/last' is no folder here, and .* cannot be fetched"):
        opened(base, tmp_path, lora="runs/one/last")


def test_an_adapter_beside_the_weights_of_its_own_model(base, tmp_path):
    """transformers loads both, whatever base_model_name_or_path says; so do `model:` and `lora:`."""
    model = tiny.expert_model("llava", tiny.base_model(), noise=0.02)
    folder = tiny.save(model, tmp_path / "lora")
    merged = train(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/elsewhere"}))
    for field in ("model", "lora"):
        check(open_expert("image", ExpertRecipe(**{field: str(folder)}), base), base, merged)


def test_embeddings_that_were_resized(base, tower, tmp_path):
    """PEFT saves a resized embedding and head whole beside the factors."""
    model = tiny.base_model()
    with torch.no_grad():
        model.resize_token_embeddings(tiny.ROWS + 3)
        model.get_input_embeddings().weight[-3:] = 0.5
        model.get_output_embeddings().weight[-3:] = 0.25
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    expert = opened(base, tmp_path)
    merged = wrapped.merge_and_unload()
    check(expert, base, merged)
    assert torch.equal(expert.exact_tensor("embed_tokens.weight"), merged.get_input_embeddings().weight)
    assert torch.equal(expert.exact_tensor("lm_head.weight"), merged.get_output_embeddings().weight)


def test_a_lora_of_the_bare_llm_asks_for_a_tower(base, tmp_path):
    train(tiny.base_model(), tmp_path / "lora")
    with pytest.raises(ValueError, match="as tower:"):
        opened(base, tmp_path, tower=str(tmp_path / "base"))


def test_pickled_adapters(base, tower, tmp_path):
    merged = train(tiny.base_model(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_name("adapter_model.bin"))
    path.unlink()
    check(opened(base, tmp_path), base, merged)


def test_factors_by_hand(tmp_path):
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [3.0]])
    save_file(
        {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapter = LoraAdapter(tmp_path, {"x.weight": "y"}.get)
    assert adapter.changed == {"y"} and adapter.ranks == {"y": 1}
    assert torch.equal(adapter.delta("y"), torch.tensor([[2.0, 4.0], [0.0, 0.0], [6.0, 12.0]]))
    left, right = adapter.factors("y")
    assert torch.equal(left, 2 * b) and torch.equal(right, a)
    assert adapter.delta("z") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"peft_type": "NEWEST"}, "peft_type is 'NEWEST'"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"use_newest": True}, r"sets \['use_newest'\], which are not known here"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 3}, "gives its module rank 3"),
    ],
)
def test_what_is_refused_by_name(change, message, base, tower, tmp_path):
    train(tiny.base_model(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        opened(base, tmp_path)


def test_every_tensor_of_an_adapter_is_accounted_for(base, tower, tmp_path):
    train(tiny.base_model(), tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    stored = load_file(path)
    save_file({**stored, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, path)
    with pytest.raises(ValueError, match=r"1 tensors of the adapter fit nothing.*layers\.7"):
        opened(base, tmp_path)
    save_file(
        {**stored, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(4)}, path
    )
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        opened(base, tmp_path)
    stored.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(stored, path)
    with pytest.raises(ValueError, match="only one of lora_A and lora_B"):
        opened(base, tmp_path)


def test_fields_that_contradict_the_folder(base, tower, tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        opened(base, tmp_path, lora=str(tower))
    with pytest.raises(ValueError, match="brings its own tower"):
        open_expert("image", ExpertRecipe(model=str(tower), tower=str(tower)), base)
