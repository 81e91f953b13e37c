"""Routed modules against the definition: each token multiplied with the weight of its own route."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modeling_mmer.route_plan_mmer import RoutePlan, route_scope
from modeling_mmer.routed_weights_mmer import RoutedWeight, pack_bits, unpack_bits
from modeling_mmer.routing_mmer import RoutedLinear, route_weight_of
from tests.tiny_models import END_OF_IMAGE, FAMILIES, media, mmer_config, mmer_model, text_config

BATCH, LENGTH = 2, 11
REFERENCE_ROUTES = [None]


def routed_batch(routes: int = 4):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(9, 60, (BATCH, LENGTH), generator=generator)
    route_ids = torch.randint(0, routes, (BATCH, LENGTH), generator=generator)
    return dict(input_ids=ids, route_ids=route_ids, text_route=torch.zeros(BATCH, dtype=torch.long))


# the slow reference, written from the definition with numpy


def definition(module, route: int) -> torch.Tensor:
    """θ of a route in float64, from the formulas of the design."""
    weight, delta = module.weight.detach().double().numpy(), module.delta.detach().double().numpy()
    if route == 0:
        return torch.from_numpy(weight)
    if route == 1 or module.routed_kind == "none":
        return torch.from_numpy(weight + delta)
    expert, total = route - 2, weight.copy()
    if module.masks is not None:
        bits = np.unpackbits(module.masks[expert].numpy(), axis=-1, bitorder="little")[:, : weight.shape[1]]
        scale = 1.0 if module.scales is None else module.scales[expert].detach().double().numpy()[:, None]
        total = total + scale * bits * delta
    if module.correction_a is not None:
        total = total + (module.correction_b[expert].double() @ module.correction_a[expert].double()).detach().numpy()
    return torch.from_numpy(total)


class ReferenceLinear(RoutedLinear):
    def forward(self, x):
        weights = torch.stack([definition(self, route) for route in range(4)]).to(x.dtype)
        y = torch.einsum("bsi,bsoi->bso", x, weights[REFERENCE_ROUTES[0]])
        if self.bias is None:
            return y
        stack = torch.stack([self.bias, self.merged_bias, *self.expert_bias])
        return y + stack[REFERENCE_ROUTES[0]]


def reference_norm(stock):
    class ReferenceNorm(stock):
        def forward(self, x):
            sequence = [axis for axis in (1, 2) if x.shape[axis] == LENGTH]
            x = x.transpose(1, sequence[0]).contiguous()
            out = torch.empty_like(x)
            for b in range(BATCH):
                for s in range(LENGTH):
                    route = int(REFERENCE_ROUTES[0][b, s])
                    plain = copy.copy(self)
                    plain._parameters = {"weight": [self.weight, self.merged_weight, *self.expert_weight][route]}
                    out[b, s] = stock.forward(plain, x[b : b + 1, s : s + 1])[0, 0]
            return out.transpose(1, sequence[0])

    return ReferenceNorm


def reference_of(model):
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, RoutedLinear):
            module.__class__ = ReferenceLinear
        elif getattr(module, "routed_tensors", None):
            module.__class__ = reference_norm(type(module).stock_class)
    return reference


def largest_error(got, want):
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got))
    return float((got[finite] - want[finite]).abs().max() / want[finite].abs().max().clamp(min=1))


# bits


def test_pack_bits_by_hand():
    bits = torch.tensor([[True, False, True, False, False, False, False, True, False, True]])
    assert pack_bits(bits).tolist() == [[1 + 4 + 128, 2]]
    assert unpack_bits(torch.tensor([[133, 2]], dtype=torch.uint8), 10).equal(bits)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_pack_bits_round_trips_and_agrees_with_numpy(columns, rows, seed):
    bits = torch.rand((rows, columns), generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_bits(bits)
    assert packed.shape == (rows, (columns + 7) // 8)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=-1, bitorder="little"))
    assert unpack_bits(packed, columns).equal(bits)


# the plan


def test_plan_computes_each_token_once_and_puts_it_back():
    route_ids = torch.tensor([[0, 2, 2], [3, 0, 2]])
    seen = []

    def compute(route, tokens):
        seen.append((route, len(tokens)))
        return tokens + 100 * route

    x = torch.arange(6.0).view(2, 3, 1)
    assert RoutePlan(route_ids).routed(x, compute).squeeze(-1).tolist() == [[0, 201, 202], [303, 4, 205]]
    assert seen == [(0, 2), (2, 3), (3, 1)]


def test_plan_of_one_route_does_not_touch_the_tokens():
    plan = RoutePlan(torch.full((2, 3), 2))
    x = torch.randn(2, 3, 4)
    assert plan.single == 2 and plan.routed(x, lambda route, tokens: tokens) is x


def test_plan_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match="6 tokens reached.*routes are for 4"):
        RoutePlan(torch.tensor([[0, 1], [1, 1]])).routed(torch.randn(2, 3, 4), lambda route, tokens: tokens)


# whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_per_token_reference(family):
    model, batch = mmer_model(mmer_config(text_config(family))), routed_batch()
    REFERENCE_ROUTES[0] = batch["route_ids"]
    with torch.no_grad():
        got, want = model(**batch).logits, reference_of(model)(**batch).logits
        one_route = model(**{**batch, "route_ids": torch.zeros_like(batch["route_ids"])}).logits
    assert largest_error(got, want) <= 1e-5
    assert (got[..., :64] - one_route).abs().max() > 0.05, "the routes do not matter: the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_only_is_the_base_bit_for_bit(family, dtype):
    text = text_config(family)
    base = AutoModelForCausalLM.from_config(text).to(dtype).eval()
    model = mmer_model(mmer_config(text)).to(dtype)
    stock = {name.replace("model.", "model.language_model.", 1): v for name, v in base.state_dict().items()}
    missing, unexpected = model.load_state_dict(stock, strict=False)
    assert not unexpected
    mask = torch.ones((BATCH, LENGTH), dtype=torch.long)
    mask[0, :3] = 0
    batch = dict(input_ids=routed_batch()["input_ids"], attention_mask=mask)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    for how in (
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=True, repetition_penalty=1.2, num_return_sequences=2),
    ):
        settings = dict(max_new_tokens=8, pad_token_id=3, eos_token_id=None, **how)
        torch.manual_seed(5)
        want = base.generate(**batch, **settings)
        torch.manual_seed(5)
        assert torch.equal(model.generate(**batch, **settings), want)


def test_scores_of_text_alone_are_those_of_the_base():
    model, ids = mmer_model(), routed_batch()["input_ids"]
    for beams in (1, 2):
        out = model.generate(
            ids, max_new_tokens=4, num_beams=beams, do_sample=False, pad_token_id=3, eos_token_id=None,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        beam_indices = out.beam_indices if beams > 1 else None
        got = model.compute_transition_scores(out.sequences, out.scores, beam_indices, normalize_logits=beams == 1)
        assert got.shape == (2, 4) and torch.isfinite(got).all()


KINDS = [
    {"kind": "mask", "scale": "row", "rank": 3},
    {"kind": "mask", "scale": "tensor", "rank": 0},
    {"kind": "mask", "scale": "none", "rank": 0},
    {"kind": "paper", "scale": "none", "rank": 0},
    {"kind": "exact", "scale": "none", "rank": 4},
    {"kind": "none", "scale": "none", "rank": 0},
]


@pytest.mark.parametrize("decoupling", KINDS, ids=lambda d: f"{d['kind']}-{d['scale']}-{d['rank']}")
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_also_with_routed_embeddings(decoupling, tied):
    text = text_config("llama", tie_word_embeddings=tied)
    names = ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"] + ([] if tied else ["lm_head"])
    model = mmer_model(mmer_config(text, delta_modules=names, expert_tensors=[], decoupling=decoupling))
    for route in range(4):
        plain = AutoModelForCausalLM.from_config(text).eval()
        state = {name.replace("model.language_model.", "model.", 1): v for name, v in model.state_dict().items()}
        for name in names:
            own = "lm_head" if name == "lm_head" else f"model.{name}"
            module = model.lm_head if name == "lm_head" else model.model.language_model.get_submodule(name)
            state[f"{own}.weight"] = definition(module, route).float()
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        plain.load_state_dict({name: v for name, v in state.items() if name in plain.state_dict()})
        ids = routed_batch()["input_ids"]
        whole = torch.full_like(ids, route)
        with torch.no_grad():
            got = model(input_ids=ids, route_ids=whole, text_route=whole[:, 0]).logits[..., :64]
            assert largest_error(got, plain(ids).logits) <= 1e-5


def test_added_tokens_have_rows_of_their_own_and_belong_to_their_expert():
    model = mmer_model(mmer_config(text_config("gemma3_text")))
    ids = torch.tensor([[10, END_OF_IMAGE, 12]])
    with torch.no_grad():
        embeds = model.model.embed(ids, None, RoutePlan(torch.ones_like(ids)))
        row = model.model.added_embeddings.weight[2] * model.model.language_model.embed_tokens.embed_scale
        assert torch.allclose(embeds[0, 1], row)
        by_route = [model(input_ids=ids, text_route=torch.tensor([route])).logits[0, -1, 64:] for route in range(4)]
    finite = [torch.isfinite(logits).tolist() for logits in by_route]
    # (image placeholder, audio placeholder, the image expert's end token) on routes base, merged, image, audio
    assert finite == [[], [False, False, True], [False, False, True], [False] * 3]


# gradients


def gradients(model, batch):
    model.zero_grad()
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    batch = routed_batch()
    other = {**batch, "route_ids": (batch["route_ids"] + 2) % 4}
    model = mmer_model().train()
    want = gradients(model, batch)
    assert any("delta" in name for name in want)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(checkpointed, batch)
    assert want.keys() == got.keys()
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)

    def two_forwards_one_backward(m):
        m.zero_grad()
        loss = sum(m(**b, labels=b["input_ids"], use_cache=False).loss for b in (batch, other))
        loss.backward()
        return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}

    want, got = two_forwards_one_backward(model), two_forwards_one_backward(checkpointed)
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)


def test_gradients_of_a_routed_linear_are_its_slopes():
    linear = route_weight_of(torch.nn.Linear(6, 5, bias=False).double(), 2, KINDS[0])
    linear.masks.data.random_(0, 256)
    for parameter in (linear.delta, linear.scales, linear.correction_a, linear.correction_b):
        parameter.data.normal_()
    plan = RoutePlan(torch.tensor([[0, 3, 1, 2], [2, 2, 0, 3]]))

    def call(x, weight, delta):
        with route_scope(plan):
            return torch.func.functional_call(linear, {"weight": weight, "delta": delta}, (x,))

    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, linear.weight, linear.delta))


# weights at hand


def test_kept_routes_change_no_bit_and_notice_a_change():
    model, batch = mmer_model(), routed_batch()
    with torch.no_grad():
        packed = model(**batch).logits
        model.keep_routes(["merged", "image", "audio"])
        assert torch.equal(model(**batch).logits, packed)
        linear = model.model.language_model.layers[0].mlp.up_proj
        assert linear._kept.keys() == {1, 2, 3}
        linear.delta.mul_(2)
        changed = model(**batch).logits
        model.keep_routes([])
        assert linear._kept == {}
        assert torch.equal(model(**batch).logits, changed) and not torch.equal(changed, packed)
    with pytest.raises(ValueError, match="unknown route 'sound'"):
        model.keep_routes(["sound"])


def test_a_cast_drops_kept_weights():
    model = mmer_model()
    model.keep_routes(["image"])
    model.to(torch.bfloat16)
    assert all(not m._kept for m in model.modules() if isinstance(m, RoutedWeight))
    assert model.model.language_model.layers[0].mlp.up_proj.masks.dtype == torch.uint8


def test_threads_with_different_routes_do_not_disturb_one_another():
    model, batch = mmer_model(), routed_batch()
    batches = [{**batch, "route_ids": (batch["route_ids"] + shift) % 4} for shift in range(4)]
    with torch.no_grad():
        want = [model(**b).logits for b in batches]
    got = {}

    def work(i):
        with torch.no_grad():
            got[i] = [model(**batches[i]).logits for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, want[i]) for i in range(4) for logits in got[i])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_model(copied):
    model, batch = mmer_model(), {**routed_batch(), **media()}
    with torch.no_grad():
        assert torch.equal(copied(model)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(delta_modules=["layers.7.mlp.up_proj"]), "no module 'layers.7.mlp.up_proj'"),
        (dict(delta_modules=["layers.0.input_layernorm"]), "LlamaRMSNorm can not carry a merged vector"),
        (dict(expert_tensors=["layers.0.mlp.up_proj.bias"]), "no tensor 'layers.0.mlp.up_proj.bias'"),
    ],
)
def test_wrong_names_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mmer_model(mmer_config(**changes))
