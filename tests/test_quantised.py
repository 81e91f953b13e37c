"""Weights in 8 and 4 bits, by the field's own tools: what becomes small, what stays, and that every route answers."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import RoutedWeight
from tests.test_generation import PLAIN, alone
from tests.test_loading import mixed_prompt
from tests.tiny_models import mmer_model

ROUTES = ["base", "merged", "image", "audio"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = mmer_model(), tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


def error(got, want) -> float:
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got))
    return float((got[finite].float() - want[finite]).norm() / want[finite].norm())


def check_what_routes_add(model, plain):
    """Deltas, masks, scales and corrections have the bits they were saved with."""
    kept, own = dict(plain.named_parameters()), dict(model.named_parameters())
    names = [name for name in kept if name.endswith(("delta", "masks", "scales", "correction_a", "correction_b"))]
    assert names
    for name in names:
        assert own[name].dtype == kept[name].dtype and torch.equal(own[name].data, kept[name].data)


def test_torchao_makes_the_base_s_weights_small_and_the_towers_(saved, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    plain, folder = saved
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = MMERForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    small = {name for name, p in model.named_parameters() if type(p.data).__name__ == "Int8Tensor"}
    routed = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in name
    }
    assert small == {f"{name}.weight" for name in routed}
    check_what_routes_add(model, plain)
    for route in ROUTES:
        with torch.no_grad():
            made = model(**mixed_prompt(), text_route=route).logits
            assert 0 < error(made, plain(**mixed_prompt(), text_route=route).logits) < 0.2
            model.keep_routes(["merged", "image", "audio"])
            assert torch.equal(model(**mixed_prompt(), text_route=route).logits, made)
            model.keep_routes([])
    # the weight of a route is what the formula makes of the base's rounded weight: rounded once, not twice
    module = model.model.language_model.layers[0].mlp.up_proj
    stock = plain.model.language_model.layers[0].mlp.up_proj
    with torch.no_grad():
        want = stock.route_weight(2) - stock.weight + module.weight.dequantize()
        torch.testing.assert_close(module.route_weight(2), want, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = MMERForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu").eval()
    with torch.no_grad():
        assert torch.equal(again(**mixed_prompt()).logits, model(**mixed_prompt()).logits)
    assert torch.equal(again.generate(**alone(1), **PLAIN), model.generate(**alone(1), **PLAIN))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_makes_the_towers_small_and_nothing_that_is_routed(saved, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain, folder = saved
    config = BitsAndBytesConfig(**{bits: True})
    model = MMERForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    kind = bitsandbytes.nn.Linear8bitLt if bits == "load_in_8bit" else bitsandbytes.nn.Linear4bit
    small = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert small and all(name.startswith("model.experts.") for name in small)
    assert not any(isinstance(module, RoutedWeight) for module in model.modules() if isinstance(module, kind))
    check_what_routes_add(model, plain)
    with torch.no_grad():
        for route in ROUTES:  # text meets no tower
            want = plain(**alone(0), text_route=route).logits
            assert torch.equal(model(**alone(0), text_route=route).logits, want)
        got = model(**mixed_prompt()).logits
        if (
            bits == "load_in_4bit"
        ):  # so small a tower changes much; it must be its rounded weights that it computes with
            plain = copy.deepcopy(plain)
            for name in small:
                weight = model.get_submodule(name).weight
                whole = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                plain.get_submodule(name).weight.copy_(whole)
            assert error(got, plain(**mixed_prompt()).logits) < 1e-3
        else:
            assert 0 < error(got, plain(**mixed_prompt()).logits) < 0.3
