"""A model that let routes go: the others' bits, what it takes, and what is refused."""

import pytest
import torch

from modeling_mmer.routed_triton_mmer import RouteParts
from modeling_mmer.routed_weights_mmer import RoutedWeight
from tests.test_generation import PLAIN, alone
from tests.test_routing import KINDS
from tests.tiny_models import mmer_config, mmer_model, text_config

ROUTES = ["base", "merged", "image", "audio"]
TEXT = {"input_ids": torch.tensor([[10, 11, 12, 13, 14]]), "attention_mask": torch.ones((1, 5), dtype=torch.long)}


def outputs(model, route):
    with torch.no_grad():
        logits = model(**TEXT, text_route=route).logits
    learnt = model(**TEXT, text_route=route).logits.detach()  # the other way to make a weight
    return [logits, learnt, model.generate(**TEXT, text_route=route, **PLAIN)]


def linears(model):
    return [m for m in model.modules() if isinstance(m, RoutedWeight) and m.delta is not None]


@pytest.mark.parametrize("left", [["base"], ["audio"], ["merged"], ["image", "merged"], ["audio", "image"]], ids=str)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[str(kind) for kind in KINDS])
def test_the_routes_that_are_left_keep_their_bits(kind, left):
    plain, model = (mmer_model(mmer_config(decoupling=KINDS[kind])) for _ in range(2))
    model.only_routes(left)
    for held in ([], left):
        model.keep_routes(held)
        for route in {"base", *left}:
            assert all(map(torch.equal, outputs(model, route), outputs(plain, route))), route
    for route in set(ROUTES) - {"base", *left}:
        for ask in (model, model.generate):
            with pytest.raises(ValueError, match=f"route '{route}' was let go by only_routes, which left .'base'"):
                ask(**TEXT, text_route=route)
        with pytest.raises(ValueError, match=f"'{route}' was let go"):
            model.keep_routes([route])


@pytest.mark.parametrize("left", [["audio"], ["merged"], ["image", "merged"]], ids=str)
@pytest.mark.parametrize("kind", ["mask", "exact"])
def test_only_what_is_needed_is_there_and_counted(kind, left):
    decoupling = {"kind": kind, "scale": "row", "rank": 2}
    plain, model = (mmer_model(mmer_config(decoupling=decoupling)) for _ in range(2))
    before = plain.memory_footprint_by_route()
    model.only_routes(left)
    sizes = model.memory_footprint_by_route()
    assert sum(sizes.values()) == model.get_memory_footprint() < plain.get_memory_footprint()
    deltas = sum(module.weight.nbytes for module in linears(plain))
    gone = 0 if "merged" in left or kind == "mask" else deltas
    assert sizes["merged"] == before["merged"] - gone and sizes["base"] == before["base"]
    for name in ("image", "audio"):
        assert (sizes[name] == before[name]) == (name in left)
    assert list(model.model.experts) == [name for name in ("image", "audio") if name in left]
    assert all(module.delta is module.weight for module in linears(model)) == bool(gone)


def test_media_of_an_expert_that_was_let_go_are_refused():
    model, plain = mmer_model(), mmer_model()
    model.only_routes(["image"])
    samples = {
        name: alone(index) for index in range(4) for name in ("image", "audio") if f"{name}." in str([*alone(index)])
    }
    with torch.no_grad():
        for ask in (model, model.generate):
            with pytest.raises(ValueError, match="route 'audio' was let go"):
                ask(**samples["audio"])
        shown = next(alone(i) for i in range(4) if {k.split(".")[0] for k in alone(i) if "." in k} == {"image"})
        assert torch.equal(model(**shown).logits, plain(**shown).logits)


def test_routes_go_one_after_another_and_do_not_come_back():
    plain, model = mmer_model(), mmer_model()
    model.only_routes(["merged", "audio", "image"])
    model.only_routes(["audio", "merged"])
    model.only_routes(["audio"])
    assert all(map(torch.equal, outputs(model, "audio"), outputs(plain, "audio")))
    with pytest.raises(ValueError, match="route 'image' was let go.*load the model again"):
        model.only_routes(["image"])
    with pytest.raises(ValueError, match="unknown route 'smell'"):
        model.only_routes(["smell"])


def test_a_tied_head_and_embedding_stay_tied():
    text = text_config(tie_word_embeddings=True)
    names = [name for name in ["embed_tokens", *mmer_config(text).delta_modules] if name != "lm_head"]
    plain, model = (mmer_model(mmer_config(text, delta_modules=names)) for _ in range(2))
    for each in (plain, model):
        each.tie_weights()
    model.only_routes(["audio"])
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert all(head._parameters[name] is table._parameters[name] for name in ("weight", "delta", "masks", "scales"))
    assert all(map(torch.equal, outputs(model, "audio"), outputs(plain, "audio")))


def test_the_kernels_are_told_the_slice_that_is_there():
    model = mmer_model().to(torch.bfloat16)
    model.only_routes(["audio"])
    linear = linears(model)[0]
    assert [linear.stored_route(route) for route in (0, 1, 3)] == [0, 1, 2]
    assert RouteParts.of(linear).experts == 1


def test_a_model_of_fewer_routes_is_not_saved(tmp_path):
    model = mmer_model()
    model.only_routes(["image", "merged"])
    with pytest.raises(ValueError, match="only_routes left .* expected all routes: load the model again"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_elsewhere_are_refused():
    model = mmer_model().to("meta")
    with pytest.raises(ValueError, match="divided over ranks or offloaded, expected all in memory"):
        model.only_routes(["image"])
