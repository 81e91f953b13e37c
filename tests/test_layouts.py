"""Checkpoints of other code: every tensor lands in the class of today, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from merging_mmer.experts import Base, open_expert
from merging_mmer.layout_parts import SYSTEM_PROMPT, vicuna_template
from merging_mmer.layouts import find_layout
from merging_mmer.recipe import ExpertRecipe
from modeling_mmer.point_bert_mmer import DEFAULTS
from processing_mmer.chat_templates_mmer import render

from . import tiny_checkpoints as tiny
from . import tiny_layouts as layouts
from .layout_checks import (
    PUBLISHED,
    WRITERS,
    check_all,
    check_config,
    encoder_of,
    opened,
    rewrite,
    small_point_berts,
)


@pytest.fixture
def base(tmp_path, monkeypatch):
    small_point_berts(monkeypatch)
    return layouts.base_on_disk(tmp_path / "base")


@pytest.mark.parametrize("kind", WRITERS)
def test_every_tensor_lands(kind, tmp_path, base):
    model, given = WRITERS[kind](tmp_path, base)
    encoder = encoder_of(tmp_path, given)
    expert = opened(tmp_path, encoder=encoder)
    check_all(expert, model)
    check_config(expert.config, model.config)
    left_out = expert.weights.checkpoint.left_out
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in left_out and all(left_out.values())
    names = {path.name for path in expert.files()}
    assert {"config.json", "pytorch_model-00001-of-00002.bin"} <= names
    encoders = list(encoder.values()) if isinstance(encoder, dict) else [encoder] if encoder else []
    assert {path.parent for path in expert.files()} == {tmp_path / "expert", *map(Path, encoders)}


STRATEGIES = [("vision", "same"), ("point", "modal"), ("audio", "same"), ("video", "same"), ("vision", None)]


@pytest.mark.parametrize(("modal", "strategy"), STRATEGIES, ids=str)
def test_every_tensor_of_model_compose_lands(modal, strategy, tmp_path, base):
    model, dense = layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", modal, strategy)
    expert = opened(tmp_path, encoder=str(tmp_path / "model" / layouts.ENCODER_FILES[modal]))
    deltas = next(iter(dense.values()), {})
    check_all(expert, model, deltas)
    check_config(expert.config, model.config)
    for name in expert.base.names:
        tau = expert.task_vector(name, expert.base.tensor(name), tiny.ROWS)
        assert torch.allclose(tau, deltas.get(name, torch.zeros(())), atol=1e-6)
        assert (expert.factors(name) is not None) == (name in deltas)
    assert bool(deltas) == (strategy is not None)
    assert "prefix_tokens.default" in expert.weights.checkpoint.left_out


# kinds of ModelCompose experts


@pytest.mark.parametrize("key", ["vision", "default"])
def test_a_damc_expert_brings_one_of_its_task_vectors(key, tmp_path, base):
    model, dense = layouts.write_model_compose(
        tmp_path / "expert", base, tmp_path / "model", "vision", "modal+language"
    )
    encoder = str(tmp_path / "model" / layouts.ENCODER_FILES["vision"])
    with pytest.raises(ValueError, match=r"experts\.eye\.lora_key: .*DAMC expert.*one LoRA for vision.*Set lora_key"):
        opened(tmp_path, encoder=encoder)
    with pytest.raises(ValueError, match=r"lora_key: found 'audio', expected one of \['default', 'vision'\]"):
        opened(tmp_path, encoder=encoder, lora_key="audio")
    expert = opened(tmp_path, encoder=encoder, lora_key=key)
    check_all(expert, model, dense[key])
    assert f"factors '{key}' alone" in expert.notes[0]


STAGE_1 = "the projector alone", "the projector in its own file"


@pytest.mark.parametrize("kind", STAGE_1)
def test_a_llava_whose_projector_lies_apart(kind, tmp_path, base):
    """mm_projector.bin beside shards without it, or alone, as the first training stage leaves it."""
    model = layouts.write_llava(tmp_path / "expert", base, tmp_path / "clip")
    for shard in (tmp_path / "expert").glob("pytorch_model*"):
        shard.unlink()
    if kind == "the projector alone":
        for file in (tmp_path / "expert").glob("token*"):
            file.unlink()
        tiny.llm_of(model).load_state_dict(tiny.llm_of(base).state_dict())
        model.lm_head.load_state_dict(base.lm_head.state_dict())
    else:
        torch.save(layouts.llm_tensors(model), tmp_path / "expert" / "pytorch_model.bin")
    expert = opened(tmp_path, encoder=str(tmp_path / "clip"))
    check_all(expert, model)
    assert expert.load_processor().tokenizer.convert_tokens_to_ids("<image>") == tiny.ROWS


def test_the_kind_is_told_by_the_config_and_not_by_the_folder(tmp_path, base):
    """As the authors' scripts for point clouds have it: the names of the two kinds are swapped."""
    one, dense = layouts.write_model_compose(
        tmp_path / "point_damc", base, tmp_path / "model", "point", "same", soft=False
    )
    layouts.write_model_compose(tmp_path / "point_naive_mc", base, tmp_path / "again", "point", "modal+language")
    encoder = str(tmp_path / "model" / layouts.ENCODER_FILES["point"])
    check_all(opened(tmp_path, "point_damc", encoder=encoder), one, dense["default"])
    with pytest.raises(ValueError, match="point_naive_mc is a DAMC expert"):
        opened(tmp_path, "point_naive_mc", encoder=encoder)
    rewrite(tmp_path / "point_damc", lora_strategy="modal")
    with pytest.raises(ValueError, match=r"lora_strategy 'modal' in config.json, and factors for \['default'\]"):
        opened(tmp_path, "point_damc", encoder=encoder)


def test_an_expert_with_text_on_the_base_says_so(tmp_path, base):
    layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", "vision", "modal")
    expert = opened(tmp_path, encoder=str(tmp_path / "model" / layouts.ENCODER_FILES["vision"]))
    assert "expert 'eye' was trained with text on the base's parameters" in expert.notes[0]


def test_a_merged_model_compose_folder_is_refused(tmp_path, base):
    folder = tmp_path / "expert"
    layouts.write_model_compose(folder, base, tmp_path / "model", "vision", "same")
    stored = torch.load(folder / "adapter_model.bin")
    for change in (
        {name.replace("lora_A.default", "lora_A.default-vision"): tensor for name, tensor in stored.items()},
        {**stored, "model.modal_projectors.audio.0.weight": torch.zeros(2, 2)},
    ):
        torch.save(change, folder / "adapter_model.bin")
        with pytest.raises(ValueError, match="a merged ModelCompose folder.*give the unimodal experts"):
            opened(tmp_path)
    torch.save(stored, folder / "adapter_model.bin")
    rewrite(folder, vision_lora_r=4)
    with pytest.raises(ValueError, match=r"merged ModelCompose folder, of \['vision'\] \(vision_lora_r\)"):
        opened(tmp_path)


# the prompt, and what no checkpoint says


def test_the_prompt_format_by_hand():
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What"}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Sure?"},
    ]
    turns = "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT:"
    template = vicuna_template({"image": "<image>"})
    for opening, messages in (
        (SYSTEM_PROMPT, chat),
        ("Be brief.", [{"role": "system", "content": "Be brief."}, *chat]),
    ):
        prompt = render([messages], chat_template=template, eos_token="</s>", add_generation_prompt=True)[0][0]
        assert prompt == f"{opening} {turns}"


def test_the_point_bert_of_version_1_2():
    assert PUBLISHED == {key: DEFAULTS[key] for key in ("groups", "group_size", "heads")}


# other forms of the layouts


def test_a_lora_of_original_llava(tmp_path, base):
    """adapter_model of PEFT, and the projector in non_lora_trainables.bin under PEFT's names."""
    model = layouts.write_llava(tmp_path / "whole", base, tmp_path / "clip")
    folder = tmp_path / "expert"
    folder.mkdir()
    shutil.copyfile(tmp_path / "whole" / "config.json", folder / "config.json")
    projector = torch.load(tmp_path / "whole" / "mm_projector.bin")
    torch.save({f"base_model.model.{name}": t for name, t in projector.items()}, folder / "non_lora_trainables.bin")
    a, b = torch.randn(4, 32) * 0.1, torch.randn(32, 4) * 0.1
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    torch.save({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    expert = opened(tmp_path, encoder=str(tmp_path / "clip"))
    for name in expert.base.names:
        tau = expert.task_vector(name, expert.base.tensor(name), tiny.ROWS)
        wanted = 2 * b @ a if name == "layers.1.self_attn.q_proj.weight" else torch.zeros(())
        assert torch.allclose(tau, wanted, atol=1e-6)
    whole = model.base_model.state_dict()
    assert all(torch.equal(expert.tower_tensor(name), whole[name].half()) for name in expert.tower)
    assert {"adapter_config.json", "adapter_model.bin"} <= {path.name for path in expert.files()}


@pytest.mark.parametrize("trained_on", ["whole", "liuhaotian/llava-v1.5-7b"])
def test_a_lora_that_was_trained_on_llava_itself_is_refused(tmp_path, base, trained_on):
    layouts.write_llava(tmp_path / "whole", base, tmp_path / "clip")
    folder = tmp_path / "expert"
    folder.mkdir()
    shutil.copyfile(tmp_path / "whole" / "config.json", folder / "config.json")
    shutil.copyfile(tmp_path / "whole" / "mm_projector.bin", folder / "non_lora_trainables.bin")
    source = str(tmp_path / "whole") if trained_on == "whole" else trained_on
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": source}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="LoRA was trained on .*whole model" if trained_on == "whole" else trained_on):
        opened(tmp_path, encoder=str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="tower: .*non_lora_trainables.bin.*Leave tower: out"):
        open_expert("own", ExpertRecipe(lora=str(folder), tower=str(tmp_path / "whole")), Base(str(tmp_path / "base")))


def test_a_point_encoder_as_ulip_saved_it(tmp_path, base):
    model, dense = layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", "point", "same")
    file = tmp_path / "ulip" / "point_bert.pt"
    layouts.write_point_bert(file, model.model.encoders["point_cloud"], ulip=True)
    expert = opened(tmp_path, encoder={"point_cloud": str(file)})
    check_all(expert, model, dense["default"])
    assert "ULIP" in expert.weights.checkpoint.left_out["module.logit_scale"] and file in expert.files()


def test_beats_whose_layers_do_not_share_their_bias(tmp_path, base):
    layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", "audio", "same")
    file = tmp_path / "model" / layouts.ENCODER_FILES["audio"]
    stored = torch.load(file)
    stored["model"]["encoder.layers.2.self_attn.relative_attention_bias.weight"] = torch.ones(8, 2)
    torch.save(stored, file)
    with pytest.raises(ValueError, match="layers.2.self_attn.relative_attention_bias.weight is not equal to"):
        opened(tmp_path, encoder=str(file))


# what is refused


def test_an_unknown_folder_lists_what_was_seen(tmp_path):
    folder = tmp_path / "llava-lookalike"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "otter", "architectures": ["OtterForAll"]}))
    torch.save({f"eyes.{place}": torch.ones(1) for place in range(10)}, folder / "pytorch_model.bin")
    wanted = (
        r"Seen: files \['config.json', 'pytorch_model.bin'\], model_type 'otter', architectures \['OtterForAll'\], "
        r"tensors eyes.0, eyes.1, .* and 2 more\. Known: transformers.*original LLaVA.*mm_vision_tower.*"
    )
    with pytest.raises(ValueError, match=wanted):
        find_layout(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="model_type None, architectures None"):
        find_layout(folder)


def test_a_tensor_that_no_rule_knows_is_listed(tmp_path, base):
    folder = tmp_path / "expert"
    layouts.write_model_compose(folder, base, tmp_path / "model", "vision", "same")
    stored = torch.load(folder / "adapter_model.bin")
    torch.save({**stored, "model.mystery.weight": torch.ones(1)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"1 tensors are unknown .*model\.mystery\.weight"):
        opened(tmp_path, encoder=str(tmp_path / "model" / layouts.ENCODER_FILES["vision"]))


def test_an_encoder_is_found_or_its_field_is_named(tmp_path, base, monkeypatch):
    layouts.write_llava(tmp_path / "expert", base, tmp_path / "clip")
    asked = []

    def fetch(source):
        asked.append(source)
        return tmp_path / "clip"

    monkeypatch.setattr("merging_mmer.encoder_sources.fetch", fetch)
    for said in ("openai/clip-vit-large-patch14-336", "/authors/cluster/checkpoints/clip-vit-large-patch14-336"):
        rewrite(tmp_path / "expert", mm_vision_tower=said)
        opened(tmp_path)
    assert asked == ["openai/clip-vit-large-patch14-336"] * 2
    monkeypatch.undo()
    rewrite(tmp_path / "expert", mm_vision_tower=str(tmp_path / "clip"))
    opened(tmp_path)
    rewrite(tmp_path / "expert", mm_vision_tower="/authors/cluster/our-own-clip")
    wanted = r"experts\.eye\.encoder: .*mm_vision_tower '/authors/cluster/our-own-clip', .*Set encoder: to its Hub id"
    with pytest.raises(ValueError, match=wanted):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"experts\.eye\.encoder: './nowhere' is no folder here"):
        opened(tmp_path, encoder="./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"experts\.eye\.encoder: .*empty holds no config\.json"):
        opened(tmp_path, encoder=str(tmp_path / "empty"))


def test_a_field_that_a_stock_checkpoint_does_not_need(tmp_path, base):
    tiny.save(tiny.expert_model("llava", base), tmp_path / "expert")
    for field in ({"encoder": "openai/clip-vit-large-patch14"}, {"lora_key": "vision"}):
        with pytest.raises(ValueError, match=rf"experts\.eye\.{next(iter(field))}: .*needs none; leave it out"):
            opened(tmp_path, **field)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "LLaVA-1.6 cuts pictures into tiles"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-1.6 cuts pictures into tiles"),
        ({"architectures": ["LlavaMistralForCausalLM"]}, "only experts around Llama"),
        ({"mm_vision_select_feature": "pooled"}, "mm_vision_select_feature: found 'pooled'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer: found None"),
        ({"mm_use_im_start_end": True}, r"wants the tokens \['<im_start>', '<im_end>'\]"),
        ({"hidden_size": 64}, "widths: found .*the last one 64"),
    ],
)
def test_a_llava_that_the_class_cannot_be(change, message, tmp_path, base):
    layouts.write_llava(tmp_path / "expert", base, tmp_path / "clip")
    rewrite(tmp_path / "expert", **change)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, encoder=str(tmp_path / "clip"))


def test_a_point_llm_of_an_unknown_backbone(tmp_path, base):
    layouts.write_point_llm(tmp_path / "expert", base)
    rewrite(tmp_path / "expert", point_backbone_config_name="PointTransformer_huge")
    with pytest.raises(ValueError, match="'PointTransformer_huge'; expected 'PointBERT' of one of"):
        opened(tmp_path)
