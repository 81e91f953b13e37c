"""A PEFT adapter that is kept to one route: what it computes and learns, saved and loaded, and what is refused."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_mmer.adapters_mmer import kept_route
from modeling_mmer.route_plan_mmer import RoutePlan, route_scope
from tests.test_generation import PLAIN, alone, together
from tests.test_training import LORA, ROUTES, logits, train
from tests.tiny_models import mmer_model

LAYER = "model.language_model.layers.0.self_attn.q_proj"


def learnt(route, **changes):
    model = get_peft_model(mmer_model(), LoraConfig(**{**LORA, **changes}))
    model.keep_adapter_to(route)
    losses = train(model, route)
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize("route", ROUTES)
def test_other_routes_keep_their_bits(route):
    plain, model = mmer_model(), learnt(route)
    for each in ROUTES:
        assert torch.equal(logits(model, each), logits(plain, each)) == (each != route)
    with model.disable_adapter():
        assert torch.equal(logits(model, route), logits(plain, route))
    model.keep_adapter_to(None)
    assert all(not torch.equal(logits(model, each), logits(plain, each)) for each in ROUTES)


def test_a_layer_adds_and_learns_at_its_own_route_s_tokens():
    model = get_peft_model(mmer_model(), LoraConfig(**LORA))
    model.keep_adapter_to("image")
    layer = model.base_model.model.get_submodule(LAYER)
    routes = torch.tensor([[0, 2, 3, 2], [1, 1, 2, 0]])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(2, 4, a.shape[1])
    with route_scope(RoutePlan(routes)):
        stock, got = layer.base_layer(x), layer(x)
    (got * torch.arange(1.0, 9).view(2, 4, 1)).sum().backward()
    want_a, want_b = torch.zeros_like(a), torch.zeros_like(b)
    for sample in range(2):
        for place in range(4):
            token, weight = x[sample, place], 1.0 + 4 * sample + place
            if routes[sample, place] != 2:
                assert torch.equal(got[sample, place], stock[sample, place])
                continue
            added = 4.0 * (b @ (a @ token))  # lora_alpha / r
            torch.testing.assert_close(got[sample, place], stock[sample, place] + added)
            want_b += 4.0 * weight * torch.outer(torch.ones(len(b)), a @ token).detach()
            want_a += 4.0 * weight * torch.outer(b.sum(0), token).detach()
    torch.testing.assert_close(a.grad, want_a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad, want_b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_the_route_is_saved_and_loaded_with_the_adapter(tmp_path, adapter):
    model = learnt("audio")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        by_peft = PeftModel.from_pretrained(mmer_model(), tmp_path, adapter_name=adapter).eval()
    by_transformers = mmer_model()
    report = by_transformers.load_adapter(tmp_path, adapter_name=adapter)
    assert not report.unexpected_keys and not report.missing_keys
    for loaded in (by_peft, by_transformers):
        for each in ROUTES:
            assert torch.equal(logits(loaded, each), logits(model, each)), each
    by_peft.save_pretrained(tmp_path / "again")
    again = (
        tmp_path / "again" / adapter if adapter != "default" else tmp_path / "again"
    ) / "adapter_model.safetensors"
    assert again.read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("held", [[], ["image", "merged"]], ids=["made", "kept"])
def test_a_mixed_batch_generates_what_each_sample_does_alone(held):
    plain, model = mmer_model(), learnt("image")
    model.keep_routes(held)
    batch = together()
    written = model.generate(**batch, **PLAIN)[:, batch["input_ids"].shape[1] :]
    changed = []
    for index in range(len(written)):
        prompt = alone(index)
        lone = model.generate(**prompt, **PLAIN)[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(written[index], lone)
        changed.append(not torch.equal(lone, plain.generate(**prompt, **PLAIN)[0, prompt["input_ids"].shape[1] :]))
    assert any(changed)


def test_gradient_checkpointing_learns_the_same():
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(mmer_model(), LoraConfig(**LORA)).train()
        model.keep_adapter_to("image")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sample = alone(3)
        model(**sample, labels=sample["input_ids"], text_route="merged").loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(bool(grad.any()) for grad in grads[0])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_no_merge_puts_it_into_every_route():
    model = learnt("image")
    want = logits(model, "base")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="'default' is kept to the route 'image'.*keep_adapter_to"):
            merge()
    assert torch.equal(logits(model, "base"), want)
    model.keep_adapter_to(None)
    assert kept_route(model.base_model.model.get_submodule(LAYER).lora_B["default"]) is None
    model.merge_and_unload()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.*without embeddings"),
        ({"use_dora": True}, "q_proj.*without DoRA"),
        ({"modules_to_save": ["norm"]}, "norm.*without modules_to_save"),
        ({"target_modules": r".*(audio|language_model).*\.q_proj"}, "experts.audio.*other experts' encoders"),
    ],
    ids=["rows", "dora", "whole", "tower"],
)
def test_what_would_act_on_other_routes_is_refused(changes, message):
    model = get_peft_model(mmer_model(), LoraConfig(**{**LORA, **changes}))
    with pytest.raises(ValueError, match=message):
        model.keep_adapter_to("image")


def test_unknown_routes_and_adapters_are_named():
    model = get_peft_model(mmer_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="unknown route 'smell'"):
        model.keep_adapter_to("smell")
    with pytest.raises(ValueError, match="no LoRA adapter 'nose'"):
        model.keep_adapter_to("image", "nose")
    with pytest.raises(ValueError, match="no LoRA adapter 'default'"):
        mmer_model().keep_adapter_to("image")
