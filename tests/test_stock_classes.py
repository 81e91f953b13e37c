"""Every multimodal class of transformers that fits as an expert: its tensors, its features, its own logits."""

import json

import peft
import pytest
import torch

from configuration_mmer import MMERConfig
from merging_mmer.experts import Base, Expert, open_expert
from merging_mmer.fitness import bidirectional
from merging_mmer.recipe import ExpertRecipe
from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.towers_mmer import build_tower, language_model_name, tower_features

from . import tiny_checkpoints as tiny
from .tiny_stock import PLACEHOLDERS, STOCK, base_model, expert_model, media, token_types

CASES = [(kind, modality) for kind in STOCK for modality in media(kind)]
NAMES = [f"{kind}-{modality}" for kind, modality in CASES]


def prompt(modality: str, features: int) -> torch.Tensor:
    return torch.tensor([[10, 11, *[PLACEHOLDERS[modality]] * features, 12, 13, 14]])


def tower_of(model):
    tower = build_tower(model.config).eval()
    child = language_model_name(model.base_model)
    own = {n: t for n, t in model.base_model.state_dict().items() if not n.startswith(f"{child}.")}
    tower.load_state_dict(own, strict=True)
    return tower.to(model.dtype)


def save_in_shards(model, folder):
    """Two pickles with their index, under the names that the class has today."""
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for place in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == place}, folder / place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def features_of(tower, modality, inputs):
    torch.manual_seed(7)  # one class samples its latents
    with torch.no_grad():
        return tower_features(tower, modality, inputs)


def whole(base: Base, expert: Expert, modalities) -> MMERForConditionalGeneration:
    """A model with the one expert, whose route has exactly its weights: τ* = τ and a mask of ones."""
    taus = {name: expert.task_vector(name, base.tensor(name), tiny.ROWS) for name in base.names}
    changed = [name for name, tau in taus.items() if bool(tau.any())]
    matrices = [name for name in changed if name in base.delta_weights]
    made = MMERConfig(
        text_config=base.config,
        experts={
            "own": {
                "config": expert.config.to_dict(),
                "placeholders": {m: {"token": f"<{m}>", "id": PLACEHOLDERS[m]} for m in modalities},
                "bidirectional": bidirectional(expert.weights.model, expert.config),
            }
        },
        delta_modules=[name.removesuffix(".weight") for name in matrices],
        expert_tensors=[name for name in changed if name not in matrices],
        decoupling={"kind": "mask", "scale": "none", "rank": 0},
    )
    model = MMERForConditionalGeneration(made).eval()
    state = {}
    for name in base.names:
        place = name if name.startswith("lm_head.") else f"model.language_model.{name}"
        prefix, _, leaf = place.rpartition(".")
        state[place] = base.tensor(name)
        if name in matrices:
            state[f"{prefix}.delta"] = taus[name]
            state[f"{prefix}.masks"] = torch.full_like(model.state_dict()[f"{prefix}.masks"], 255)
        elif name in changed:
            state[f"{prefix}.expert_{leaf}"] = expert.exact_tensor(name)[None]
            state[f"{prefix}.merged_{leaf}"] = expert.exact_tensor(name)
    state.update({f"model.experts.own.{name}": expert.tower_tensor(name) for name in expert.tower})
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {
        n.replace("model.language_model.embed_tokens", "lm_head") for n in state
    }
    return model


@pytest.mark.parametrize("kind", STOCK)
def test_every_tensor_finds_its_place_and_the_logits_are_the_class_s_own(kind, tmp_path):
    model = base_model(kind)
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = expert_model(kind, model)
    folder = tiny.save(trained, tmp_path / "expert")
    expert = open_expert("own", ExpertRecipe(model=str(folder)), base)
    sharded = open_expert("own", ExpertRecipe(model=str(save_in_shards(trained, tmp_path / "shards"))), base)
    # names and values
    llm = dict(trained.get_decoder().state_dict())
    if not base.tied:
        llm["lm_head.weight"] = trained.get_output_embeddings().weight
    assert set(base.names) == set(llm)
    inside = trained.base_model.state_dict()
    tower = build_tower(trained.config)
    child = language_model_name(trained.base_model)
    assert set(tower.state_dict()) == {name for name in inside if not name.startswith(f"{child}.")}
    for opened in (expert, sharded):
        assert all(torch.equal(opened.exact_tensor(name), llm[name]) for name in llm)
        assert set(opened.tower) == set(tower.state_dict())
        assert all(torch.equal(opened.tower_tensor(name), inside[name]) for name in opened.tower)
    # logits
    merged = whole(base, expert, media(kind))
    for modality, inputs in media(kind).items():
        ids = prompt(modality, len(features_of(tower_of(trained), modality, inputs)))
        with torch.no_grad():
            torch.manual_seed(7)
            own = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **token_types(trained, ids), **inputs)
            want = trained(**own).logits * STOCK[kind].head
            torch.manual_seed(7)
            got = merged(
                input_ids=ids, attention_mask=torch.ones_like(ids), text_route="own",
                **{f"own.{name}": value for name, value in inputs.items()},
            ).logits  # fmt: skip
            without = merged(input_ids=ids * (ids < 90), text_route="own").logits
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert float((got - without)[:, -1].abs().max()) > 1e-3  # the media count


@pytest.mark.parametrize(("kind", "modality"), CASES, ids=NAMES)
def test_features_are_what_the_original_language_model_receives(kind, modality):
    model = expert_model(kind, base_model(kind))
    received = {}
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: received.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in media(kind)[modality].items()}
        got = features_of(tower_of(model), modality, inputs)
        ids = prompt(modality, len(got))
        torch.manual_seed(7)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **token_types(model, ids), **inputs)
        assert torch.equal(got, received["embeds"][ids == PLACEHOLDERS[modality]])
        assert got.std() > 1e-3


# an adapter beside the weights


def test_granite_speech_s_adapter_is_part_of_its_language_model(tmp_path):
    """Its class switches the LoRA on for audio and off without, which are the routes of the expert and of the base."""
    model = base_model("granite_speech")
    base = Base(str(tiny.save(model, tmp_path / "base")))
    trained = expert_model("granite_speech", model, noise=0.0)
    folder = tiny.save(trained, tmp_path / "expert")
    bare = open_expert("own", ExpertRecipe(model=str(folder)), base)
    assert not any(bare.task_vector(name, base.tensor(name), tiny.ROWS).any() for name in base.names)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|v_proj)")
    wrapped = peft.get_peft_model(trained, settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    expert = open_expert("own", ExpertRecipe(model=str(folder)), base)
    assert folder / "adapter_model.safetensors" in expert.files()
    merged = whole(base, expert, ["audio"])
    inputs = media("granite_speech")["audio"]
    ids = prompt("audio", int(inputs["input_features_mask"].sum()))
    with torch.no_grad():
        want = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits * 0.25
        with wrapped.disable_adapter():
            off = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits * 0.25
        got = merged(input_ids=ids, **{f"own.{name}": value for name, value in inputs.items()}).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((off - want).abs().max()) > 1e-3
