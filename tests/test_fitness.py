"""Classes that do not fit as experts are refused, with what was found, why it does not fit and what to do."""

import inspect
import textwrap
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merging_mmer import forward_source
from merging_mmer.experts import Base, open_expert
from merging_mmer.fitness import RULES, bidirectional, check_fitness, misfit
from merging_mmer.naming import class_on_meta
from merging_mmer.recipe import ExpertRecipe

from . import tiny_checkpoints as tiny
from .tiny_misfits import REFUSED, refused_config
from .tiny_stock import STOCK, config


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


def before(line: str) -> tuple[str, str]:
    """The line before the language model is called."""
    return "outputs = self.l", f"{line}\n    outputs = self.l"


def scattered(features: str) -> tuple[str, str]:
    return "masked_scatter(special_image_mask, image_features)", f"masked_scatter(special_image_mask, {features})"


@cache
def forward_of(kind: str) -> tuple[PreTrainedModel, str]:
    model = class_on_meta(config(kind), multimodal=True)
    assert misfit(model, model.config) is None
    return model, textwrap.dedent(inspect.getsource(inspect.unwrap(type(model.base_model).forward)))


def judged(change: tuple[str, str], monkeypatch, kind: str = "llava") -> tuple[str, str] | None:
    model, source = forward_of(kind)
    assert change[0] in source
    monkeypatch.setattr(forward_source.inspect, "getsource", lambda function: source.replace(*change))
    return misfit(model, model.config)


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
        ("other arguments", ("self.language_model(", "self.language_model(**{'cross_states': pixel_values}, ")),
        ("other arguments", ("self.language_model(", "self.language_model(**self.settings, ")),
        ("other arguments", ("cache=cache", "cache=self.cache")),
        ("other arguments", ("outputs = self.l", "outputs = self.language_model(**kwargs)\n    outputs = self.l")),
        ("attention mask", ("attention_mask=attention_mask,", "")),
        ("attention mask", before("attention_mask.zero_()")),
        ("attention mask", before("cache.crop(3)")),
        ("positions", before("kwargs['position_ids'] = position_ids + 1")),
        ("positions", before("position_ids = torch.arange(1, 9)")),
        ("other arguments", before("kwargs.update(is_causal=False)")),
        ("other arguments", before("kwargs.update({'is_causal': False})")),
        ("other arguments", before("kwargs |= {'is_causal': False}")),
        ("other arguments", before("kwargs = dict(kwargs, is_causal=False)")),
        ("other arguments", before("seen = kwargs.setdefault('is_causal', False)")),
        ("other arguments", before("self.adjust(kwargs)")),
        ("other embeddings", before("inputs_embeds = self.rescale(inputs_embeds)")),
        ("other embeddings", before("inputs_embeds.mul_(2)")),
        ("other embeddings", before("inputs_embeds.data.mul_(2)")),
        ("other embeddings", before("self.rescale(inputs_embeds)")),
        ("other embeddings", before("scaled = torch.mul(inputs_embeds, 2, out=inputs_embeds)")),
        ("other embeddings", before("inputs_embeds, scale = inputs_embeds * 2, 2")),
        ("other embeddings", before("scaled = inputs_embeds * 2\n    inputs_embeds = scaled")),
        ("other embeddings", before("input_ids = input_ids + 1")),
        ("other embeddings", before("inputs_embeds = self.inputs_merger(inputs_embeds=image_features)")),
        ("other embeddings", ("(special_image_mask, image_features)", "(special_image_mask, image_features).mul(2)")),
        ("other embeddings", ("masked_scatter(special_image_mask", "masked_scatter(special_image_mask.roll(1)")),
        ("other embeddings", ("embeddings()(input_ids)", "embeddings()(input_ids + 1)")),
        ("changed features", scattered("self.post_norm(image_features)")),
        ("changed features", scattered("image_features.mul(2)")),
        ("changed features", scattered("image_features.flip(0)")),
        ("changed features", scattered("source=image_features * 2")),
        ("changed features", scattered("pixel_values")),
        ("changed features", ("torch.cat(image_features,", "torch.cat([2 * each for each in image_features],")),
        ("changed features", ("torch.cat(image_features,", "torch.cat([x for x in image_features if x.any()],")),
        ("changed features", ("pixel_values=pixel_values", "pixel_values=pixel_values * 2")),
        ("changed features", before("image_features.reverse()")),
    ],
)
def test_a_class_of_one_s_own_is_judged_by_its_forward(rule, change, monkeypatch):
    """LlavaModel with one line of its forward changed, as remote code may have it."""
    found = judged(change, monkeypatch)
    assert found is not None and found[0] == rule


@pytest.mark.parametrize(
    "change",
    [
        before("inputs_embeds = inputs_embeds.to(self.device)"),
        before("logger.debug('embeddings', inputs_embeds)"),
        before("kwargs.pop('labels', None)"),
        before("kwargs['return_dict'] = True"),
        ("self.get_input_embeddings()(input_ids)", "self.language_model.embed_tokens(input_ids)"),
        (
            "masked_scatter(special_image_mask",
            "masked_scatter((input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)",
        ),
    ],
)
def test_a_class_of_one_s_own_that_changes_nothing_fits(change, monkeypatch):
    assert judged(change, monkeypatch) is None


GEMMA = "outputs = self.language_model("
MASKS = "causal_mask_mapping = create_masks_for_"


def test_tokens_of_a_picture_that_see_each_other():
    assert {kind for kind in STOCK if bidirectional(*_class(kind))} == {"gemma3"}
    assert bidirectional(*_class("gemma3")) == ["image"]


def _class(kind: str):
    return class_on_meta(config(kind), multimodal=True), config(kind)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("attention mask", ("if token_type_ids is not None", "if token_type_ids is None")),
        ("attention mask", ("if token_type_ids is not None", "if token_type_ids is not None and self.training")),
        ("attention mask", ("mask(token_type_ids, device", "mask(token_type_ids + 1, device")),
        ("attention mask", ("mask(token_type_ids, device", "mask(1 - token_type_ids, device")),
        ("attention mask", ("block_sequence_ids=block_sequence_ids", "block_sequence_ids=token_type_ids")),
        ("attention mask", (f"{MASKS}vision_model(", f"{MASKS}all_models(")),
        ("attention mask", (f"{MASKS}generate(**mask_kwargs)", "causal_mask_mapping = attention_mask")),
        ("attention mask", ("not isinstance(causal_mask_mapping := attention_mask, dict)", "self.training")),
        ("attention mask", ('"attention_mask": attention_mask', '"attention_mask": None')),
        ("attention mask", ('"config": self.config.get_text_config()', '"config": self.config.vision_config')),
        ("attention mask", ("attention_mask=causal_mask_mapping", "attention_mask=attention_mask.bool()")),
        ("attention mask", ("attention_mask=causal_mask_mapping", "attention_mask=causal_mask_mapping.bool()")),
        ("attention mask", (GEMMA, f"causal_mask_mapping['full_attention'] = None\n    {GEMMA}")),
        ("attention mask", (GEMMA, f"causal_mask_mapping.update(full_attention=None)\n    {GEMMA}")),
        ("attention mask", (GEMMA, f"causal_mask_mapping = attention_mask\n    {GEMMA}")),
        ("attention mask", (GEMMA, f"causal_mask_mapping, seen = None, 1\n    {GEMMA}")),
        ("attention mask", ("llm_input_ids = input_ids.clone()", "token_type_ids = None")),
        ("attention mask", ("llm_input_ids = input_ids.clone()", "attention_mask = attention_mask * 2")),
        ("positions", ("llm_input_ids = input_ids.clone()", "position_ids = position_ids + 1")),
        ("other embeddings", ("llm_input_ids = input_ids.clone()", "llm_input_ids = input_ids.roll(1)")),
        ("other embeddings", ("llm_input_ids[special_image_mask] = 0", "llm_input_ids[special_image_mask] = 1")),
        ("other embeddings", ("llm_input_ids[special_image_mask] = 0", "llm_input_ids[input_ids > 9] = 0")),
        ("other embeddings", ("llm_input_ids[special_image_mask]", "llm_input_ids[attention_mask]")),
        ("other embeddings", ("special_image_mask = input_ids == self", "special_image_mask = input_ids > self")),
        ("changed features", ("(special_image_mask, image_features)", "(special_image_mask, 2 * image_features)")),
        ("other arguments", ("use_cache=use_cache", "use_cache=use_cache, token_types=token_type_ids")),
    ],
)
def test_gemma_3_with_one_line_of_its_forward_changed(rule, change, monkeypatch):
    found = judged(change, monkeypatch, "gemma3")
    assert found is not None and found[0] == rule


@pytest.mark.parametrize(
    "name", ["create_masks_for_vision_model", "get_block_sequence_ids_for_mask", "create_masks_for_generate"]
)
def test_masks_by_functions_of_one_s_own(name, monkeypatch):
    model, _ = forward_of("gemma3")
    monkeypatch.setattr(inspect.getmodule(type(model)), name, lambda *args, **kwargs: None)
    assert misfit(model, model.config)[0] == "attention mask" and not bidirectional(model, model.config)


def test_masks_of_a_base_whose_text_sees_all():
    wanted = config("gemma3", use_bidirectional_attention=True)
    rule, found = misfit(class_on_meta(wanted, multimodal=True), wanted)
    assert rule == "attention mask" and "use_bidirectional_attention" in found


def test_a_recipe_with_such_an_expert_is_refused_before_its_weights_are_read(tmp_path):
    base = Base(str(tiny.save(tiny.base_model("qwen2"), tmp_path / "base")))
    refused_config("qwen2_vl").save_pretrained(tmp_path / "expert")
    save_file({"none.of.its.tensors": torch.zeros(1)}, tmp_path / "expert" / "model.safetensors")
    with pytest.raises(ValueError, match=r"Qwen2VLForConditionalGeneration has rotary positions over several axes"):
        open_expert("image", ExpertRecipe(model=str(tmp_path / "expert")), base)


def test_a_class_whose_source_is_not_there(monkeypatch):
    def gone(function):
        raise OSError("could not get source code")

    model = class_on_meta(config("llava"), multimodal=True)
    monkeypatch.setattr(forward_source.inspect, "getsource", gone)
    with pytest.raises(ValueError, match="LlavaModel: what its forward does cannot be read"):
        misfit(model, model.config)
