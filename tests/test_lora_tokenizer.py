"""A tokenizer saved beside a LoRA adapter: its new tokens and their trained rows reach the merged folder."""

import json

import peft
import pytest
import torch
from transformers import AutoProcessor

from merging_mmer.experts import Base, open_expert
from merging_mmer.recipe import ExpertRecipe

from . import tiny_several as several
from .tiny_processors import text, user

tiny = several.tiny
IMAGE = tiny.ROWS  # the tower's one added token; a new one comes behind it


@pytest.fixture
def world(tmp_path):
    """A base, and a llava whose LLM is the base's own with one row for <image>."""
    base = several.save_base(tmp_path / "base")
    several.save_expert(tmp_path / "tower", "llava", base, 1, noise=0.0)
    return tmp_path


def train(folder, model, rows: int, **settings):
    """PEFT's own way: rows for new tokens, then a LoRA that saves embedding and head whole. Returns the model."""
    torch.manual_seed(7)
    with torch.no_grad():
        if rows:
            model.resize_token_embeddings(rows)
            for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                weight[tiny.ROWS :] = torch.randn_like(weight[tiny.ROWS :])
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            **{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]} | settings
        ),
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped


def tower(world):
    return several.stock(world / "tower")[0]


def opened(world):
    recipe = ExpertRecipe(lora=str(world / "lora"), tower=str(world / "tower"))
    return open_expert("image", recipe, Base(str(world / "base")))


def test_a_trained_row_reaches_the_merged_folder(world):
    wrapped = train(world / "lora", tower(world), tiny.ROWS + 2)
    several.tokenizer("<image>", "<grid>").save_pretrained(world / "lora")
    recipe = {
        "base": str(world / "base"),
        "experts": {"image": {"lora": str(world / "lora"), "tower": str(world / "tower")}},
    }
    model, processor = several.merge_and_load(recipe, world / "merged")
    tokens = [token["token"] for token in model.config.added_tokens]
    assert tokens == ["<image>", "<grid>"]
    stored, trained = tiny.tensors(world / "merged"), wrapped.merge_and_unload()
    for place, weight in (
        ("model.added_embeddings.weight", trained.get_input_embeddings().weight),
        ("added_head.weight", trained.get_output_embeddings().weight),
    ):
        assert torch.equal(stored[place][1], weight[IMAGE + 1])
    # the prompt is written by the tower's template, and one id stands for the token
    asked = processor.apply_chat_template([user(text("<grid>"))], tokenize=True, return_dict=True)
    assert processor.tokenizer.convert_tokens_to_ids("<grid>") in asked["input_ids"][0].tolist()
    theirs = AutoProcessor.from_pretrained(world / "tower").chat_template
    assert opened(world).load_processor().chat_template == theirs and "<image>" in theirs


def test_the_same_answer_as_the_adapter_gives_alone(world):
    wrapped = train(world / "lora", tower(world), tiny.ROWS + 2).merge_and_unload().eval()
    several.tokenizer("<image>", "<grid>").save_pretrained(world / "lora")
    recipe = {
        "base": str(world / "base"),
        "experts": {"image": {"lora": str(world / "lora"), "tower": str(world / "tower")}},
    }
    model, processor = several.merge_and_load(recipe, world / "merged")
    own = [5, 9, IMAGE + 1, 12]
    ids = torch.tensor([[processor.tokenizer.convert_tokens_to_ids("<grid>") if i > IMAGE else i for i in own]])
    with torch.no_grad():
        got = model(input_ids=ids, text_route="image").logits[0]
        want = wrapped(input_ids=torch.tensor([own])).logits[0]
    several.same_logits(got[:, [*range(tiny.ROWS), ids[0, 2]]], want[:, [*range(tiny.ROWS), IMAGE + 1]])


def test_the_chat_template_stays_the_towers_where_only_its_tokenizer_has_one(world):
    for file in (world / "tower").glob("chat_template*"):
        file.unlink()
    theirs = AutoProcessor.from_pretrained(world / "tower")
    train(world / "lora", tower(world), tiny.ROWS + 2)
    own = several.tokenizer("<image>", "<grid>")
    own.chat_template = "another"
    own.save_pretrained(world / "lora")
    processor = opened(world).load_processor()
    assert "<grid>" in processor.tokenizer.get_vocab()
    assert processor.chat_template == theirs.chat_template
    assert processor.tokenizer.chat_template == theirs.tokenizer.chat_template != "another"


@pytest.mark.parametrize("added", [("<image>",), ()])
def test_a_tokenizer_with_nothing_new_changes_nothing(world, added):
    """The tower's own, or the bare LLM's, which lacks the placeholder."""
    train(world / "lora", tiny.base_model(), 0)
    several.tokenizer(*added).save_pretrained(world / "lora")
    processor = opened(world).load_processor()
    assert processor.tokenizer.get_vocab() == several.tokenizer("<image>").get_vocab()


def test_new_tokens_at_the_towers_ids(world):
    """Trained on the bare LLM: its <grid> has the id of the tower's <image>."""
    train(world / "lora", tiny.base_model(), tiny.ROWS + 1)
    several.tokenizer("<grid>").save_pretrained(world / "lora")
    with pytest.raises(
        ValueError, match=r"new tokens \[\('<grid>', 96\)\], but not the tower's \[\('<image>', 96\)\]"
    ):
        opened(world).load_processor()
    # where no row was trained nothing is lost
    train(world / "lora", tiny.base_model(), 0, modules_to_save=None)
    assert "<grid>" not in opened(world).load_processor().tokenizer.get_vocab()


def test_tokens_without_their_tokenizer(world):
    train(world / "lora", tower(world), tiny.ROWS + 2)
    (world / "lora" / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE, "<grid>": IMAGE + 1}))
    with pytest.raises(ValueError, match="beside its adapter in .* cannot be read"):
        opened(world).load_processor()


def test_a_named_token_that_only_the_tower_names(world):
    processor = AutoProcessor.from_pretrained(world / "tower")
    processor.tokenizer._set_model_specific_special_tokens({"image_token": "<image>"})
    processor.save_pretrained(world / "tower")
    train(world / "lora", tower(world), tiny.ROWS + 2)
    several.tokenizer("<image>", "<grid>").save_pretrained(world / "lora")
    own = opened(world).load_processor().tokenizer
    assert own.image_token == "<image>" and "<grid>" in own.get_vocab()
