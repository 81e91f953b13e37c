"""Training with the field's own tools: the Trainer, and adapters of PEFT on top of the routes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_mmer.routed_weights_mmer import RoutedWeight
from tests.test_generation import PLAIN, alone
from tests.tiny_models import mmer_model

ROUTES = ["base", "merged", "image", "audio"]
LORA = dict(r=2, lora_alpha=8, lora_dropout=0.0, target_modules=r"model\.language_model\..*\.(q_proj|down_proj)")


def logits(model, route, index=0):
    with torch.no_grad():
        return model(**alone(index), text_route=route).logits


def masks_of(model):
    return {n: v.clone() for n, v in model.state_dict().items() if n.endswith("masks")}


def train(model, route, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.2)
    losses = []
    for _ in range(steps):
        sample = alone(0)
        loss = model(**sample, labels=sample["input_ids"], text_route=route).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_the_trainer_trains_what_is_to_be_trained(tmp_path):
    model, twin = mmer_model(), mmer_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = [{name: tensor[0] for name, tensor in alone(0).items()} | {"labels": alone(0)["input_ids"][0]}] * 2
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        save_strategy="no", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=samples).train()
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    twin.train()
    for _ in range(2):
        sample = alone(0)
        twin(**sample, labels=sample["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, want = [], twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
        if not torch.equal(value, before[name]):
            moved.append(name)
    assert moved and not any(name.endswith(("masks", "scales")) for name in moved)


@pytest.mark.parametrize("route", ROUTES)
def test_an_adapter_on_top_is_learnt_saved_loaded_and_merged(tmp_path, route):
    plain = mmer_model()
    model = get_peft_model(mmer_model(), LoraConfig(**LORA))
    for each in ROUTES:
        assert torch.equal(logits(model, each), logits(plain, each)), "a fresh adapter changes nothing"
    masks = masks_of(plain)
    losses = train(model, route)
    assert losses[-1] < losses[0]
    model.eval()
    assert not torch.equal(logits(model, route), logits(plain, route))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mmer_model(), tmp_path).eval()
    want = {each: logits(model, each) for each in ROUTES}
    assert all(torch.equal(logits(loaded, each), want[each]) for each in ROUTES)
    generated = model.generate(**alone(3), **PLAIN)
    merged = loaded.merge_and_unload()
    for each in ROUTES:
        torch.testing.assert_close(logits(merged, each), want[each], rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**alone(3), **PLAIN), generated)
    assert any(isinstance(module, RoutedWeight) for module in merged.modules())
    after = masks_of(merged)
    assert after.keys() == masks.keys() and all(torch.equal(after[name], masks[name]) for name in masks)


def test_an_adapter_learnt_on_one_route_changes_all_until_it_is_disabled():
    """LoRA adds B·A to each linear whatever its route: the same matrix on every one of them."""
    plain = mmer_model()
    model = get_peft_model(mmer_model(), LoraConfig(**LORA))
    train(model, "image")
    model.eval()
    for route in ROUTES:
        assert not torch.equal(logits(model, route), logits(plain, route))
        with model.disable_adapter():
            assert torch.equal(logits(model, route), logits(plain, route))
    name = "model.language_model.layers.0.self_attn.q_proj"
    wrapped, stock = model.base_model.model.get_submodule(name), plain.get_submodule(name)
    added = wrapped.get_delta_weight("default")
    wrapped.merge()
    with torch.no_grad():
        for route in range(4):
            gained = wrapped.get_base_layer().route_weight(route) - stock.route_weight(route)
            torch.testing.assert_close(gained, added, rtol=1e-4, atol=1e-5)


def test_one_route_alone_is_learnt_by_its_correction():
    """What belongs to one expert in the model itself, is trained without a wrapper and leaves the others' bits."""
    model, plain = mmer_model(), mmer_model()
    model.requires_grad_(False)
    expert, marks = 0, []
    for module in model.modules():
        if isinstance(module, RoutedWeight) and module.delta is not None:
            for name in ("correction_a", "correction_b"):
                parameter = getattr(module, name).requires_grad_()
                only = torch.zeros_like(parameter)
                only[expert] = 1
                marks.append(parameter.register_hook(lambda grad, only=only: grad * only))
    losses = train(model, "image")
    assert marks and losses[-1] < losses[0]
    assert not torch.equal(logits(model, "image"), logits(plain, "image"))
    for route in ("base", "merged", "audio"):
        assert torch.equal(logits(model, route), logits(plain, route))
