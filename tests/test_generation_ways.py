"""What else users do with `generate` and with a model object: drafts, streams, threads, copies, exports."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from modeling_mmer.routed_weights_mmer import RoutedWeight
from tests.test_generation import PLAIN, alone
from tests.tiny_models import mmer_model

ROUTES = ["base", "merged", "image", "audio"]


@pytest.fixture(scope="module")
def model():
    return mmer_model()


class Digits:
    """A tokenizer for a streamer: every id is a word of its own."""

    def decode(self, ids, **_):
        return "".join(f"{int(token)} " for token in ids)


@pytest.fixture(scope="module")
def draft(model):
    """The base LLM by its own class, with the weights that the model has for its base route."""
    base = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own = {name.replace("model.language_model.", "model.", 1): value for name, value in model.state_dict().items()}
    base.load_state_dict({name: own[name] for name in base.state_dict()})
    return base


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_the_base_as_a_draft_changes_no_token_of_text(model, draft, route):
    sample = alone(0)
    want = model.generate(**sample, **PLAIN, text_route=route)
    assert torch.equal(model.generate(**sample, **PLAIN, text_route=route, assistant_model=draft), want)


def test_a_draft_that_cannot_follow_is_refused(model, draft):
    with pytest.raises(ValueError, match="the prompt has media.*draft for text alone"):
        model.generate(**alone(1), **PLAIN, assistant_model=draft)
    with pytest.raises(ValueError, match="sampling with a draft.*expected do_sample=False"):
        model.generate(**alone(0), **{**PLAIN, "do_sample": True}, text_route="image", assistant_model=draft)


@pytest.mark.parametrize("index", range(4))
def test_a_stream_is_what_is_generated(model, index):
    sample = alone(index)
    want = model.generate(**sample, **PLAIN)[0, sample["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**sample, **PLAIN, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == Digits().decode(want) and len(pieces) > 1


@pytest.mark.parametrize("keep", [False, True], ids=["made", "kept"])
def test_threads_that_generate_on_different_routes(model, keep):
    """`generate` holds its route's weights for as long as it runs; threads must not take them from each other."""
    model = copy.deepcopy(model)
    if keep:
        model.keep_routes(["merged", "image"])
    sample = alone(0)
    want = {route: model.generate(**sample, **PLAIN, text_route=route) for route in ROUTES}
    assert len({tuple(ids[0].tolist()) for ids in want.values()}) > 1
    got, errors = {}, []

    def work(route):
        try:
            got[route] = [model.generate(**sample, **PLAIN, text_route=route) for _ in range(6)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(route,)) for route in ROUTES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(ids, want[route]) for route in ROUTES for ids in got[route])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_with_kept_routes_is_free_of_it(model, copied):
    # a model of its own: the hooks by which transformers gathers hidden states cannot be pickled, and come with the
    # first forward
    model = mmer_model()
    model.keep_routes(["merged", "image", "audio"])
    sample = alone(3)
    with torch.no_grad():
        other = copied(model)
        want = model(**sample).logits
        assert torch.equal(other(**sample).logits, want)
        other.generate(**sample, **PLAIN)
        for module in other.modules():
            if isinstance(module, RoutedWeight) and module.delta is not None:
                module.delta.mul_(2)
        assert not torch.equal(other(**sample).logits, want)
        assert torch.equal(model(**sample).logits, want)


# strict tracing takes most of this file's time, and traces the same code whatever the route
@pytest.mark.parametrize(("route", "strict"), [*((route, False) for route in ROUTES), ("image", True)])
def test_a_route_can_be_exported(model, route, strict):
    """The exported program takes ids of any length and has the route within it."""

    class OneRoute(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            return self.inner(input_ids, text_route=route, use_cache=False).logits

    ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(OneRoute(), (ids,), dynamic_shapes=({1: length},), strict=strict).module()
        for other in (ids, torch.tensor([[20, 21, 22]]), torch.arange(9, 40)[None]):
            want = model(other, text_route=route).logits
            torch.testing.assert_close(program(other), want, rtol=1e-4, atol=1e-4)
