"""Weights that are held: how many, how large, and that no bit shows it."""

import pytest
import torch

from modeling_mmer import routed_weights_mmer
from modeling_mmer.routed_weights_mmer import RoutedWeight
from tests.test_routing import KINDS, routed_batch
from tests.tiny_models import mmer_config, mmer_model, text_config


def test_no_more_is_held_than_there_is_room_for():
    model, batch = mmer_model(), routed_batch()
    one = sum(m.weight.nbytes for m in model.modules() if isinstance(m, RoutedWeight) and m.delta is not None)
    with torch.no_grad():
        packed = model(**batch).logits
        for room, image, audio in ((one + one // 2, one, one // 2), ("0MB", 0, 0), (f"{2 * one}B", one, one)):
            model.keep_routes(["image", "audio"], max_memory=room)
            sizes = model.memory_footprint_by_route()
            assert sizes.get("kept image", 0) == image and audio * 0.7 <= sizes.get("kept audio", 0) <= audio
            assert torch.equal(model(**batch).logits, packed)
    for size in ("much", "4", -1):
        with pytest.raises(ValueError, match="max_memory is .*expected a number of bytes"):
            model.keep_routes(["image"], max_memory=size)


def test_the_footprint_by_route_is_all_there_is():
    model = mmer_model()
    model.keep_routes(["image"])
    sizes = model.memory_footprint_by_route()
    assert list(sizes) == ["base", "merged", "image", "audio", "kept image"]
    linears = [m for m in model.modules() if isinstance(m, RoutedWeight) and m.delta is not None]
    norms = [m for m in model.modules() if hasattr(m, "routed_tensors")]
    small = sum(m.weight.nbytes for m in norms)
    assert sizes["kept image"] == sum(m.weight.nbytes for m in linears)
    assert sizes["merged"] == sizes["kept image"] + small
    tower = [*model.model.experts["image"].parameters(), *model.model.experts["image"].buffers()]
    own = sum((m.masks.nbytes + m.scales.nbytes + m.correction_a.nbytes + m.correction_b.nbytes) // 2 for m in linears)
    assert sizes["image"] == own + small + sum(p.nbytes for p in tower)
    held = sizes.pop("kept image")
    assert sum(sizes.values()) == model.get_memory_footprint() and held > 0


def test_blocks_of_rows_give_what_the_formula_gives(monkeypatch):
    for kind in KINDS:
        model = mmer_model(mmer_config(decoupling=kind))
        linear = model.model.language_model.layers[0].mlp.up_proj
        with torch.no_grad():
            for route in range(4):
                whole = linear._sum(route, slice(None)) if route else linear.weight
                for block in (1, 200, 1 << 17):
                    monkeypatch.setattr(routed_weights_mmer, "_CPU_BLOCK", block)
                    torch.testing.assert_close(linear.route_weight(route), whole, rtol=0, atol=1e-6)


def test_a_tied_head_and_embedding_hold_one_weight():
    text = text_config(tie_word_embeddings=True)
    routed = ["embed_tokens", *mmer_config(text).delta_modules]
    model = mmer_model(mmer_config(text, delta_modules=[name for name in routed if name != "lm_head"]))
    model.tie_weights()
    with torch.no_grad():
        packed = model(**routed_batch()).logits
        model.keep_routes(["image", "audio"])
        embedding, head = model.get_input_embeddings(), model.lm_head
        assert embedding._kept[2].weight is head._kept[2].weight
        assert torch.equal(model(**routed_batch()).logits, packed)


def test_a_generation_uses_no_weight_of_before_a_change():
    """Held weights are looked at once a generation, and in every plain forward."""
    model, ids = mmer_model(), routed_batch()["input_ids"][:1, -3:]

    def written():
        asked = dict(text_route="image", max_new_tokens=4, do_sample=False, output_logits=True, eos_token_id=None)
        return torch.cat(model.generate(ids, return_dict_in_generate=True, pad_token_id=0, **asked).logits)

    before = written()
    assert torch.equal(before, written())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RoutedWeight) and module.delta is not None:
                module.delta.mul_(3)
        changed = written()
        assert not torch.equal(changed, before)
        fresh = mmer_model()
        fresh.load_state_dict(model.state_dict())
        model = fresh
        assert torch.equal(written(), changed)
