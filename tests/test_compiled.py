"""torch.compile: one graph for a route whatever the prompt, and the numbers of the eager model."""

import pytest
import torch

from modeling_mmer.route_plan_mmer import RoutePlan
from tests.tiny_models import AUDIO, IMAGE, media, mmer_config, mmer_model, text_config


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def text(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(9, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def mixed(before: int, between: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = text(before + 4 + between + 5 + 2, seed)
    ids[0, before : before + 4] = IMAGE
    ids[0, before + 4 + between : before + 9 + between] = AUDIO
    return {"input_ids": ids, **media(1, 1, seed)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere"])
@pytest.mark.parametrize("route", ["auto", "base", "merged", "image"])
@pytest.mark.parametrize("kept", [False, True])
def test_text_on_one_route(family, route, kept):
    model, graphs = mmer_model(mmer_config(text_config(family))), Graphs()
    if kept:
        model.keep_routes(["image", "merged"])
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (7, 12, 30):
            ids = text(length, length)
            want = model(input_ids=ids, text_route=route).logits
            torch.testing.assert_close(compiled(input_ids=ids, text_route=route).logits, want, rtol=1e-4, atol=1e-4)
    assert graphs.count == 1


@pytest.mark.parametrize("kept", [False, True])
def test_prompts_with_media_are_compiled_once_for_all(kept):
    model, graphs = mmer_model(), Graphs()
    if kept:
        model.keep_routes(["image", "audio", "merged"])
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    with torch.no_grad():
        for before, between in ((3, 2), (5, 4), (9, 7), (2, 11), (6, 3)):
            batch = mixed(before, between, before)
            embeds = model.model.embed_media(batch["input_ids"], model.model.media_inputs(batch))
            batch = {"input_ids": batch["input_ids"], "media_embeds": embeds}
            plan = model.plan_routes(**batch)
            assert plan.routes == [1, 2, 3]
            for keep in (0, 1):
                want = model(**batch, logits_to_keep=keep).logits
                got = compiled(**batch, route_plan=plan, logits_to_keep=keep).logits
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            counts.append(graphs.count)
    assert counts[-1] == counts[1], f"compiled again for another prompt: {counts}"


def test_without_a_plan_the_graph_breaks_and_the_numbers_are_the_same():
    model, batch = mmer_model(), mixed(3, 2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        want = model(**batch).logits
        torch.testing.assert_close(compiled(**batch).logits, want, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(model, backend="eager", fullgraph=True)(**batch)


@pytest.mark.parametrize("route", ["base", "image"])
def test_a_static_cache_is_compiled_once_for_all_steps(route):
    model, graphs = mmer_model(), Graphs()
    ids = text(8)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=3, eos_token_id=None, text_route=route)
    want = model.generate(ids, **settings)
    stock = model.forward
    model.forward = torch.compile(stock, backend=graphs, fullgraph=True, dynamic=True)
    got = model.generate(ids, cache_implementation="static", **settings)
    steps = graphs.count
    again = model.generate(text(11, 4), cache_implementation="static", **settings)
    model.forward = stock
    assert torch.equal(got, want)
    assert torch.equal(again, model.generate(text(11, 4), **settings))
    assert steps <= 3 and graphs.count <= steps + 2


def test_a_plan_for_one_batch_serves_several_forwards():
    model, batch = mmer_model(), mixed(3, 2)
    with torch.no_grad():
        plan = model.plan_routes(**batch)
        assert torch.equal(model(**batch, route_plan=plan).logits, model(**batch).logits)
    assert plan.single is None and plan.keep(slice(-1, None)).single == 1


def test_groups_that_lie_together_are_not_moved():
    plan = RoutePlan(torch.tensor([[2, 2, 2], [3, 3, 0]]))
    assert plan.order is None and plan.routes == [2, 3, 0] and plan.sizes == [3, 2, 1]
    x = torch.arange(6.0).view(2, 3, 1)
    same = []

    def compute(route, tokens):
        same.append(tokens.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
        return tokens + 100 * route

    assert plan.routed(x, compute).squeeze(-1).tolist() == [[200, 201, 202], [303, 304, 5]]
    assert same == [True, True, True]
