"""Point clouds end to end: an expert of our own class, merged, and asked where our packages cannot be imported."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from configuration_mmer.composed_config_mmer import ComposedConfig
from merging_mmer import Recipe, merge
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.point_clouds_mmer import PointCloudProcessor
from tests import tiny_checkpoints as tiny
from tests import tiny_world
from tests.test_hub_repo import run_consumer
from tests.tiny_models import text_config

TOKEN = "<point_patch>"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    recipe = tiny_world.make(folder / "world")
    base = tiny.base_model()
    expert = tiny.expert_model("points", base, seed=3, extra_rows=1, noise=0.1)
    tiny.save(expert, folder / "world/points")
    ComposedProcessor(
        tiny_world.tokenizer(TOKEN),
        parts={"point_cloud": PointCloudProcessor(points=16, dims=6)},
        features={"point_cloud": {"count": 5}},
        point_cloud_token=TOKEN,
        chat_template=tiny_world.TEMPLATE.replace("PLACEHOLDER", TOKEN),
    ).save_pretrained(folder / "world/points")
    recipe["experts"]["points"] = str(folder / "world/points")
    merge(Recipe.from_dict(recipe), folder / "mmer-points", progress=False)
    return folder / "mmer-points", expert


def test_a_user_asks_about_point_clouds_without_our_packages(merged, tmp_path):
    repo, _ = merged
    done = run_consumer("consume_points.py", repo, tmp_path / "scratch")
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads((tmp_path / "scratch/facts.json").read_text())
    assert not [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if key in facts["loading"]]
    assert facts["shape"] == [1, 16, 6] and facts["placeholders"] == 5
    assert facts["text_route"] == [4]  # base, merged, image, audio, points
    assert facts["change"] > 1e-3 and len({tuple(answer) for answer in facts["answers"]}) > 1


def test_the_expert_alone_refuses_a_prompt_without_its_media(merged):
    _, expert = merged
    ids = torch.tensor([[7, tiny.ROWS, 8]])
    with pytest.raises(ValueError, match="point_cloud tokens stand in the text, but there is no point_clouds"):
        expert(input_ids=ids)
    with pytest.raises(ValueError, match="takes .'point_cloud'., found pixel_values"):
        expert(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_the_expert_alone_scales_its_logits_as_its_language_model_does(family):
    text = text_config(family)
    composed = ComposedForConditionalGeneration(ComposedConfig(text_config=text)).eval()
    plain = AutoModelForCausalLM.from_config(text).eval()
    plain.model.load_state_dict(composed.model.language_model.state_dict())
    plain.lm_head.load_state_dict(composed.lm_head.state_dict())
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(composed(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_its_tower_is_the_experts_own(merged):
    repo, expert = merged
    stored = tiny.tensors(repo)
    own = expert.model.state_dict()
    towers = {name: tensor for name, tensor in own.items() if not name.startswith("language_model.")}
    assert len(towers) > 20
    for name, tensor in towers.items():
        assert torch.equal(stored[f"model.experts.points.{name}"], tensor)
