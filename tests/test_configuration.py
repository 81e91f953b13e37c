"""MMERConfig: cross-checked when it is built, unchanged by JSON; routes by hand."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import AUTO_MAP
from configuration_mmer.routes_mmer import named_route, route_tokens
from tests.tiny_models import AUDIO, IMAGE, mmer_config

EXPERTS = ["image", "audio"]


def test_it_survives_json(tmp_path):
    config = mmer_config()
    config.save_pretrained(tmp_path)
    again = MMERConfig.from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    assert again.expert_names == EXPERTS
    assert again.expert_config("audio").to_dict() == config.expert_config("audio").to_dict()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_what_the_rooms_ask_of_it():
    config = mmer_config()
    assert config.vocab_size == 67 and config.text_config.vocab_size == 64
    assert config.get_text_config().vocab_size == 67
    assert config.num_routes == 4
    assert config.placeholder_experts() == {IMAGE: 0, AUDIO: 1}
    assert config.default_experts == {"image": "image", "audio": "audio"}
    assert config.modalities("image") == ["image"]


def changed(path: str, value):
    """The tiny config's arguments with one field replaced; `path` is dotted."""
    config = mmer_config()
    fields = ("experts", "default_experts", "delta_modules", "decoupling", "added_tokens", "text_route")
    values = {name: getattr(config, name) for name in fields}
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("experts.merged", {"config": {}, "placeholders": {}}, "'merged' cannot name an expert"),
        ("experts.a.b", {}, ""),
        ("experts.image.placeholders", {"smell": {"token": "<smell>", "id": 64}}, "found .'smell'., expected some of"),
        ("experts.image.placeholders", {"image": {"token": "<image>", "id": AUDIO}}, "not distinct"),
        ("experts.image.placeholders", {"image": {"token": "<image>", "id": 99}}, "behind the vocabulary"),
        ("experts.image.config", {}, "no model_type"),
        ("experts.image", {"config": {"model_type": "llava"}}, "'placeholders'. missing"),
        ("default_experts.image", "audio", "'audio' is not an expert with that modality"),
        ("decoupling.kind", "sparse", "decoupling.kind: found 'sparse'"),
        ("decoupling.scale", "column", "decoupling.scale: found 'column'"),
        ("decoupling.rank", -1, "decoupling.rank: found -1"),
        ("decoupling.rank", True, "decoupling.rank: found True"),
        ("decoupling.lambda", 1.0, "unknown .'lambda'."),
        ("decoupling.kind", "paper", "'paper' is the mask alone"),
        ("delta_modules", ["layers.0.mlp.up_proj"] * 2, "named more than once"),
        ("added_tokens", [{"token": "<image>", "id": 64, "experts": ["touch"]}], "which are no experts"),
        (
            "added_tokens",
            [{"token": "<x>", "id": 64, "experts": ["audio"], "rows": {"image": 1}}],
            "rows for .'image'.",
        ),
        ("added_tokens", [{"token": "<x>", "id": 64, "experts": ["audio"], "rows": {"audio": 2}}], "without a gap"),
        ("expert_names", ["image"], "expert_names: found .'image'., but experts are .'audio', 'image'."),
        ("text_route", "sound", "text_route: found 'sound'"),
    ],
)
def test_what_contradicts_itself_is_refused(path, value, message):
    if path == "experts.a.b":
        path, value = "experts", {"a.b": mmer_config().experts["image"]}
        message = "'a.b' cannot name an expert"
    with pytest.raises(ValueError, match=message):
        MMERConfig(text_config=mmer_config().text_config, **changed(path, value))


# routes


def routes(ids, wanted="auto"):
    route_ids, text_route = route_tokens(torch.tensor(ids), {IMAGE: 0, AUDIO: 1}, EXPERTS, wanted)
    return route_ids.tolist(), text_route.tolist()


def test_auto_routes_by_hand():
    ids = [[1, 2, 3, 4], [1, IMAGE, IMAGE, 2], [AUDIO, 1, 2, 3], [AUDIO, 1, IMAGE, 2]]
    assert routes(ids) == ([[0, 0, 0, 0], [2, 2, 2, 2], [3, 3, 3, 3], [3, 1, 2, 1]], [0, 2, 3, 1])


def test_routes_that_are_asked_for():
    ids = [[1, IMAGE, 2], [1, 2, 3]]
    assert routes(ids, "base") == ([[0, 2, 0], [0, 0, 0]], [0, 0])
    assert routes(ids, ["audio", "auto"]) == ([[3, 2, 3], [0, 0, 0]], [3, 0])
    assert route_tokens(torch.tensor(ids), {IMAGE: 0}, EXPERTS, torch.tensor([1, 3]))[0].tolist() == [
        [1, 2, 1],
        [3] * 3,
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("sound", "unknown route 'sound'"),
        (["base"], "1 routes for a batch of 2"),
        (torch.zeros(3), "shape .3,., expected .2,."),
    ],
)
def test_routes_that_cannot_be_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        routes([[1, IMAGE], [2, 3]], wanted)


def test_route_names():
    assert [named_route(name, EXPERTS) for name in ("base", "merged", "image", "audio")] == [0, 1, 2, 3]


def test_the_class_is_known_by_name():
    """transformers' server and its any-to-any pipeline ask this table, and no other."""
    assert MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["mmer"] == AUTO_MAP["AutoModelForMultimodalLM"].split(".")[1]
