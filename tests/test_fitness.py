"""Classes that do not fit as experts are refused, with what was found, why it does not fit and what to do."""

import inspect
import textwrap

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merging_mmer import fitness
from merging_mmer.experts import Base, open_expert
from merging_mmer.fitness import RULES, check_fitness, misfit
from merging_mmer.naming import class_on_meta
from merging_mmer.recipe import ExpertRecipe

from . import tiny_checkpoints as tiny
from .tiny_misfits import REFUSED, refused_config
from .tiny_stock import config


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_that_does_not_fit_is_refused_with_the_reason(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    rule, _ = REFUSED[kind]
    own = refused_config(kind)
    model = class_on_meta(own, multimodal=True)
    found = misfit(model, own)
    assert found is not None and found[0] == rule
    with pytest.raises(ValueError) as error:
        check_fitness("own", model, own)
    message = str(error.value)
    assert message.startswith(f"expert 'own': {type(model).__name__} has ") and found[1] in message
    assert RULES[rule][1] in message and RULES[rule][2] in message


def test_every_rule_refuses_some_class():
    assert {rule for rule, _ in REFUSED.values()} | {"positions", "other arguments"} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("positions", ("position_ids=position_ids", "position_ids=position_ids + 1")),
        ("positions", ("outputs = self.l", "position_ids = position_ids + 1\n    outputs = self.l")),
        ("positions", ("outputs = self.l", "position_ids = torch.arange(9) + 1\n    outputs = self.l")),
        ("attention mask", ("attention_mask=attention_mask", "attention_mask=None")),
        ("attention mask", ("outputs = self.l", "attention_mask = attention_mask * 2\n    outputs = self.l")),
        ("other embeddings", ("inputs_embeds=inputs_embeds", "inputs_embeds=inputs_embeds * 2")),
        ("other embeddings", ("outputs = self.l", "inputs_embeds[0] = 0\n    outputs = self.l")),
        ("other embeddings", ("outputs = self.l", "inputs_embeds *= 2\n    outputs = self.l")),
        (
            "changed features",
            ("masked_scatter(special_image_mask, image", "masked_scatter(special_image_mask, 2 * image"),
        ),
        ("changed features", ("torch.cat(image_features,", "torch.cat(image_features[keep],")),
        ("other arguments", ("position_ids=position_ids", "position_ids=position_ids, depth=pixel_values")),
        ("other arguments", ("self.language_model(", "self.language_model(pixel_values,")),
        ("other arguments", ("self.language_model(", "self.run(")),
    ],
)
def test_a_class_of_one_s_own_is_judged_by_its_forward(rule, change, monkeypatch):
    """LlavaModel with one line of its forward changed, as remote code may have it."""
    model = class_on_meta(config("llava"), multimodal=True)
    assert misfit(model, model.config) is None
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(model.base_model).forward)))
    assert change[0] in source
    monkeypatch.setattr(fitness.inspect, "getsource", lambda function: source.replace(*change))
    found = misfit(model, model.config)
    assert found is not None and found[0] == rule


def test_a_recipe_with_such_an_expert_is_refused_before_its_weights_are_read(tmp_path):
    base = Base(str(tiny.save(tiny.base_model("qwen2"), tmp_path / "base")))
    AutoConfig.for_model("qwen2_vl").save_pretrained(tmp_path / "expert")
    with pytest.raises(ValueError, match=r"Qwen2VLForConditionalGeneration has rotary positions over several axes"):
        open_expert("image", ExpertRecipe(model=str(tmp_path / "expert")), base)


def test_a_class_whose_source_is_not_there(monkeypatch):
    def gone(function):
        raise OSError("could not get source code")

    model = class_on_meta(config("llava"), multimodal=True)
    monkeypatch.setattr(fitness.inspect, "getsource", gone)
    with pytest.raises(ValueError, match="LlavaModel: what its forward does cannot be read"):
        misfit(model, model.config)
