"""Several experts of one modality: each is asked for by name, by block, by default; mixed batches and prompts."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import pipeline

from configuration_mmer import MMERConfig
from modeling_mmer.routed_weights_mmer import RoutedWeight
from modeling_mmer.routing_mmer import RoutedLinear
from processing_mmer import MMERProcessor

from . import tiny_several as several
from .test_routing import definition
from .tiny_processors import clip, noise, picture, text, user

# two experts of one class, a third of another class, a fourth with two modalities, and an ear
KINDS = {"image": "llava", "medical": "llava", "scan": "smolvlm", "film": "video_llava", "ear": "qwen2_audio"}
ROUTES = {"base": 0, "merged": 1, **{name: 2 + place for place, name in enumerate(KINDS)}}
ASK = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
QUESTION = text("what is this ?")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    base = several.save_base(folder / "base")
    for seed, (name, kind) in enumerate(KINDS.items()):
        several.save_expert(folder / name, kind, base, seed=seed + 1, noise=0.1)
    recipe = {
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in KINDS},
        "default_experts": {"image": "medical"},
    }
    model, processor = several.merge_and_load(recipe, folder / "mmer-several")
    return folder, model, processor


def chat(*blocks):
    return [user(*blocks, QUESTION)]


# who encodes a medium, and who answers


def test_the_recipes_default_reaches_config_and_processor(world):
    folder, model, processor = world
    wanted = {"image": "medical", "video": "film", "audio": "ear"}
    assert MMERConfig.from_pretrained(folder / "mmer-several").default_experts == wanted
    assert processor.default_experts == wanted and processor.image_token == "<image:medical>"
    assert model.model._default_expert("image") == "medical"


@pytest.mark.parametrize(
    ("block", "how", "expert", "route"),
    [
        ({}, {}, "medical", "medical"),
        ({"expert": "image"}, {}, "image", "image"),
        ({"expert": "scan"}, {}, "scan", "scan"),
        ({}, {"experts": {"image": "scan"}}, "scan", "scan"),
        ({}, {"processor_kwargs": {"experts": {"image": "scan"}}}, "scan", "scan"),
        ({}, {"text_route": "image"}, "image", "image"),
        ({}, {"text_route": "film"}, "film", "film"),
        ({}, {"text_route": "ear"}, "medical", "ear"),
        ({}, {"text_route": "merged"}, "medical", "merged"),
        ({"expert": "film"}, {"experts": {"image": "scan"}}, "film", "film"),
        ({"expert": "film"}, {"text_route": "image"}, "film", "image"),
        ({}, {"text_route": "image", "experts": {"image": "scan"}}, "scan", "image"),
    ],
    ids=str,
)
def test_an_expert_is_asked_for(world, block, how, expert, route):
    _, _, processor = world
    out = processor.apply_chat_template(chat(picture(0, **block)), **ASK, **how)
    assert {name.split(".")[0] for name in out if "." in name} == {expert}
    kinds, routes = out["mm_token_type_ids"][0], out["route_ids"][0]
    assert set(routes[kinds == 1].tolist()) == {ROUTES[expert]}
    assert out["text_route"].tolist() == [ROUTES[route]] == list(set(routes[kinds == 0].tolist()))


def test_an_expert_is_asked_for_without_a_chat(world):
    _, _, processor = world
    three = [picture(place)["image"] for place in range(3)]
    by_token = processor(text="<image> what <image:medical> is <image:film>", images=three)
    assert {name.split(".")[0] for name in by_token if "." in name} == {"image", "medical", "film"}
    assert by_token["text_route"].tolist() == [1]
    for name in ("image", "scan", "film"):
        handed = processor(text="<image:medical> what", images=picture(0)["image"], experts={"image": name})
        assert handed["text_route"].tolist() == [ROUTES[name]] and any(key.startswith(name) for key in handed)


# what each of them answers


MEDIA = [
    ("image", picture(0, expert="image")),
    ("medical", picture(0, expert="medical")),
    ("scan", picture(0, expert="scan")),
    ("film", picture(0, expert="film")),
    ("film", clip(0)),
    ("ear", noise(0)),
]


@pytest.mark.parametrize(
    ("name", "block"), MEDIA, ids=lambda value: value if isinstance(value, str) else value["type"]
)
def test_each_expert_answers_as_its_own_class_does(world, name, block):
    folder, model, processor = world
    own_model, own_processor = several.stock(folder / name)
    plain = {key: value for key, value in block.items() if key != "expert"}
    theirs = own_processor.apply_chat_template(chat(plain), processor_kwargs={"return_tensors": "pt"}, **ASK)
    ours = processor.apply_chat_template(chat(block), **ASK)
    assert ours["text_route"].tolist() == [ROUTES[name]]
    table = several.columns(model, processor, name, own_processor.tokenizer)
    assert len(table) >= 96 + (len(several.FRAMES.get(KINDS[name], ())))
    with torch.no_grad():
        got, want = model(**ours).logits[0], own_model(**theirs).logits[0]
    own_ids, merged_ids = list(table), list(table.values())
    several.same_logits(got[:, merged_ids], want[:, own_ids])
    others = sorted(set(range(got.shape[1])) - set(merged_ids))
    assert torch.isinf(got[:, others]).all(), "another expert's tokens, and all placeholders, are never written"
    barred = [token for token in range(want.shape[1]) if token not in table]
    answer = own_model.generate(**theirs, **GREEDY, suppress_tokens=barred)[0, theirs["input_ids"].shape[1] :]
    written = model.generate(**ours, **GREEDY)[0, ours["input_ids"].shape[1] :]
    assert written.tolist() == [table[token] for token in answer.tolist()]


def test_experts_of_one_class_answer_differently(world):
    _, model, processor = world
    with torch.no_grad():
        logits = [
            model(**processor.apply_chat_template(chat(picture(0, expert=name)), **ASK)).logits[0, -1, :96]
            for name in ("image", "medical")
        ]
    assert (logits[0] - logits[1]).abs().max() > 0.1


# in one prompt, in one batch

SAMPLES = {
    "nothing": chat(),
    "image": chat(picture(0, expert="image")),
    "medical": chat(picture(1)),
    "both": chat(picture(0, expert="image"), picture(1)),
    "both, the other way": chat(picture(1), picture(0, expert="image")),
    "twice one": chat(picture(2, expert="image"), picture(3, expert="image")),
    "three": chat(picture(0, expert="scan"), picture(1, expert="image"), picture(2)),
    "a clip and a picture of another default": chat(clip(0), picture(1)),
    "a clip and a picture of one expert": chat(clip(1), picture(1, expert="film")),
    "sound": chat(noise(0), picture(0, expert="scan")),
}


def slow_model(model, route_ids):
    """The model where each token of one prompt is multiplied alone, with θ of its route from the definition."""
    routes = route_ids[0].tolist()
    slow = copy.deepcopy(model)
    for module in slow.modules():
        if isinstance(module, RoutedLinear):
            weights = {route: definition(module, route).float() for route in set(routes)}
            module.forward = lambda x, w=weights: torch.stack(
                [nn.functional.linear(x[0, place], w[route]) for place, route in enumerate(routes)]
            )[None]
        elif isinstance(module, RoutedWeight):
            rows = {route: definition(module, route).float() for route in set(routes)}
            module.forward = lambda ids, w=rows: torch.stack(
                [w[route][ids[0, place]] for place, route in enumerate(routes)]
            )[None]
        elif getattr(module, "routed_tensors", None):
            module.forward = slow_norm(module, routes)
    return slow


def slow_norm(module, routes):
    def forward(x):
        parts = []
        for place, route in enumerate(routes):
            plain = copy.copy(module)
            own = [module.weight, module.merged_weight, *module.expert_weight][route]
            plain._parameters = {"weight": own}
            parts.append(type(module).stock_class.forward(plain, x[:, place : place + 1]))
        return torch.cat(parts, 1)

    return forward


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_prompt_equals_the_slow_reference(world, sample):
    _, model, processor = world
    inputs = processor.apply_chat_template(SAMPLES[sample], **ASK)
    with torch.no_grad():
        several.same_logits(model(**inputs).logits, slow_model(model, inputs["route_ids"])(**inputs).logits, 1e-5)


def test_a_batch_of_all_kinds_equals_each_sample_alone(world):
    _, model, processor = world
    batch = processor.apply_chat_template(list(SAMPLES.values()), **ASK)
    merged, film = ROUTES["merged"], ROUTES["film"]
    assert batch["text_route"].tolist() == [0, 2, 3, merged, merged, 2, merged, merged, film, merged]
    with torch.no_grad():
        together = model(**batch).logits
    written = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    assert len({tuple(row) for row in written}) > 5, "all samples answer alike: the test shows nothing"
    for place, sample in enumerate(SAMPLES.values()):
        alone = processor.apply_chat_template(sample, **ASK)
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            want = model(**alone).logits[0]
        several.same_logits(together[place, -length:, : want.shape[-1]], want, 1e-5)
        assert torch.isinf(together[place, -length:, want.shape[-1] :]).all()
        assert model.generate(**alone, **GREEDY)[0, length:].tolist() == written[place]


def test_a_route_for_each_sample_of_one_picture(world):
    """One picture asked about by each expert in one batch: each row is that expert's own answer."""
    _, model, processor = world
    names = ["image", "medical", "scan", "film"]
    batch = processor.apply_chat_template([chat(picture(0))] * 4, **ASK, text_route=names)
    assert batch["text_route"].tolist() == [ROUTES[name] for name in names]
    written = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :].tolist()
    for name, row in zip(names, written, strict=True):
        alone = processor.apply_chat_template(chat(picture(0, expert=name)), **ASK)
        assert model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :].tolist() == row


def test_text_alone_is_the_base_bit_for_bit(world):
    folder, model, processor = world
    base = several.tiny.base_model().eval()
    inputs = processor.apply_chat_template(SAMPLES["nothing"], **ASK)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(inputs["input_ids"]).logits)


# saved again, and through pipelines


def test_a_saved_processor_keeps_the_defaults(world, tmp_path):
    _, _, processor = world
    processor.save_pretrained(tmp_path / "again")
    again = MMERProcessor.from_pretrained(tmp_path / "again")
    for sample in SAMPLES.values():
        one, two = (made.apply_chat_template(sample, **ASK) for made in (processor, again))
        assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    other = MMERProcessor.from_pretrained(tmp_path / "again", default_experts={"image": "scan"})
    assert other.default_experts == {"image": "scan", "video": "film", "audio": "ear"}


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_with_an_expert_of_ones_choice(world, task):
    _, model, processor = world
    pipe = pipeline(task, model=model, processor=processor)
    ways = [
        (chat(picture(0, expert="image")), {}, "image"),
        (chat(picture(0)), {}, "medical"),
        (chat(picture(0)), {"text_route": "scan"}, "scan"),
        (chat(picture(0)), {"experts": {"image": "film"}}, "film"),
    ]
    for conversation, how, name in ways:
        alone = processor.apply_chat_template(chat(picture(0, expert=name)), **ASK)
        answer = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        (found,) = pipe(text=conversation, return_full_text=False, generate_kwargs=GREEDY, **how)
        assert found["generated_text"] == processor.decode(answer, skip_special_tokens=True), name


def test_an_expert_whose_tokenizer_is_another(tmp_path):
    """Refused, unless the recipe accepts it: then each is asked in its own way."""
    base = several.save_base(tmp_path / "base")
    several.save_expert(tmp_path / "image", "llava", base, seed=1, noise=0.1)
    path = tmp_path / "image" / "tokenizer.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "normalizer": {"type": "Lowercase"}}))
    recipe = {"base": str(tmp_path / "base"), "experts": {"image": str(tmp_path / "image")}}
    with pytest.raises(ValueError, match="expert 'image' splits .* experts.image.tokenizer: own"):
        several.merge_and_load(recipe, tmp_path / "out")
    recipe["experts"] = {"image": {"model": str(tmp_path / "image"), "tokenizer": "own"}}
    _, processor = several.merge_and_load(recipe, tmp_path / "out")
    _, own = several.stock(tmp_path / "image")
    asked = [user(picture(0), text("What IS this ?"))]
    theirs = own.apply_chat_template(asked, processor_kwargs={"return_tensors": "pt"}, **ASK)["input_ids"]
    assert torch.equal(processor.apply_chat_template(asked, **ASK)["input_ids"], theirs)
    unknown = processor.tokenizer.unk_token_id
    assert (processor(text="What IS this ?")["input_ids"] == unknown).sum() == 2 and unknown not in theirs
