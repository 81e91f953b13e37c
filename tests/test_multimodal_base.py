"""A multimodal checkpoint as base: its language model alone, read as the bare LLM would be, from there to the CLI."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from typer.testing import CliRunner

import mmer
from merging_mmer import Recipe
from merging_mmer.experts import Base, open_expert
from merging_mmer.merge import plan
from merging_mmer.recipe import ExpertRecipe

from . import tiny_checkpoints as tiny
from . import tiny_multimodal_bases as bases
from . import tiny_stock
from .tiny_growing import load
from .tiny_merges import run
from .tiny_processors import picture, text, user
from .tiny_several import WHOLE, same_logits, stock

# around these heads something happens that their language model's own class does not do, or the other way round
OTHER_HEADS = {"aya_vision", "cohere2_vision", "granite_speech", "granite_speech_plus"}
TEXTS = torch.tensor(
    [[0, 0, 5, 6, 7, 30, 31, 32, 33, 34, 35, 36, 37, 38], [4, 5, 9, 40, 41, 42, 43, 44, 45, 46, 8, 7, 6, 5]]
)
ASK = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def cli(*words) -> str:
    done = CliRunner().invoke(mmer.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def edit(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# what is read of it


@pytest.mark.parametrize("kind", sorted(set(tiny_stock.STOCK) - OTHER_HEADS))
@torch.no_grad()
def test_it_is_read_as_its_language_model_alone_is(kind, tmp_path):
    llm = tiny_stock.base_model(kind)
    whole = tiny_stock.expert_model(kind, llm, noise=0.0)
    bare, found = Base(str(tiny.save(llm, tmp_path / "bare"))), Base(str(tiny.save(whole, tmp_path / "whole")))
    assert found.names == bare.names or set(found.names) == set(bare.names)
    for part in ("shapes", "delta_weights", "embedding", "tied", "vocabulary_names"):
        assert getattr(found, part) == getattr(bare, part), part
    assert all(torch.equal(found.tensor(name), bare.tensor(name)) for name in bare.names)
    ignored = ("_name_or_path", "architectures", "transformers_version")
    ours, theirs = ({k: v for k, v in of.config.to_dict().items() if k not in ignored} for of in (found, bare))
    assert ours == theirs
    assert type(whole).__name__ in found.notes[0] and not bare.notes
    same = AutoModelForCausalLM.from_config(found.config).eval()
    same.load_state_dict({full: found.tensor(name) for full, name in _full_names(found).items()}, strict=False)
    assert torch.equal(same(TEXTS).logits, whole(TEXTS).logits)


def _full_names(base: Base) -> dict[str, str]:
    return {name if name.startswith("lm_head.") else f"model.{name}": name for name in base.names}


@pytest.mark.parametrize("kind", sorted(OTHER_HEADS))
def test_a_class_whose_text_is_not_its_language_model_s_is_refused(kind, tmp_path):
    folder = tiny.save(tiny_stock.expert_model(kind, tiny_stock.base_model(kind)), tmp_path / "whole")
    with pytest.raises(ValueError, match="the text of .* differs: .*logit.*take another base, such as a bare LLM of"):
        Base(str(folder))


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("tied", [True, False])
def test_gemma_3_as_on_the_hub(tmp_path, names, tied):
    whole = bases.model("gemma3", tie_word_embeddings=tied)
    folder = bases.save(whole, "gemma3", tmp_path / "base")
    if names == "new":
        tiny.save(whole, folder, "new")
        bases.save_config(folder)
    assert any(key.startswith("language_model.model.") for key in tiny.tensors(folder)) == (names == "old")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("dtype", None)
    if tied:  # which is what both configs have where nothing is said
        config.pop("tie_word_embeddings", None)
        config["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder, lambda tensors: {k: v for k, v in tensors.items() if "vision_tower" not in k})
    assert Base(str(folder)).config.eos_token_id == 2
    (folder / "generation_config.json").unlink()
    base = Base(str(folder))
    assert base.tied == tied and ("lm_head.weight" in base.names) != tied
    own = whole.get_decoder().state_dict()
    assert all(torch.equal(base.tensor(name), own[name]) for name in own)
    assert base.config.model_type == "gemma3_text" and base.config.dtype == torch.float32
    assert base.config.tie_word_embeddings == tied and base.config.eos_token_id == [2, 3]
    assert "multi_modal_projector, vision_tower" in base.notes[0]
    base.untie()
    assert torch.equal(base.tensor("lm_head.weight"), whole.get_output_embeddings().weight)


@pytest.mark.parametrize("head", ["absent", "alike", "apart"])
def test_a_class_that_does_not_declare_that_it_ties(tmp_path, head):
    llm = tiny.base_model("qwen2", tie_word_embeddings=True)
    folder = tiny.save(tiny.expert_model("qwen2_audio", llm), tmp_path / "base")
    name, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

    def change(tensors):
        tensors.pop(name, None)
        more = {"absent": 0, "alike": 1, "apart": 2}[head]
        return {**tensors, **({name: more * tensors[embedding]} if more else {})}

    edit(folder, change)
    base, stored = Base(str(folder)), tiny.tensors(folder)
    assert base.tied == base.config.tie_word_embeddings == (head != "apart")
    base.untie()
    assert torch.equal(base.tensor("lm_head.weight"), stored[embedding] * (2 if head == "apart" else 1))


def test_the_chat_template_of_older_checkpoints(tmp_path):
    folder = bases.save(bases.model("llava"), "llava", tmp_path / "base")
    template = (folder / "chat_template.jinja").read_text()
    assert Base(str(folder)).load_tokenizer().chat_template == template
    (folder / "chat_template.jinja").unlink()
    assert Base(str(folder)).load_tokenizer().chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Base(str(folder)).load_tokenizer().chat_template == template


# what is refused


def test_positions_over_several_axes_are_refused(tmp_path):
    vision = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(text_config={**tiny.SIZES, "rope_parameters": rope}, vision_config=vision)
    tiny.save(Qwen2VLForConditionalGeneration(config), tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"Qwen2VLForConditionalGeneration has .*mrope.*Give a language model that st"
    ):
        Base(str(tmp_path / "base"))


def test_checkpoints_without_their_language_model_are_refused(tmp_path):
    folder = bases.save(bases.model("llava"), "llava", tmp_path / "base")
    edit(folder, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k})
    with pytest.raises(ValueError, match=r"the base lacks model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        Base(str(folder))


def test_a_checkpoint_of_original_llava_is_refused(tmp_path):
    folder = tiny.save(tiny.base_model(), tmp_path / "base")
    edit(folder, lambda tensors: {**tensors, "model.mm_projector.weight": torch.ones(32, 16)})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip",
        "architectures": ["LlavaLlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="layout 'original LLaVA', expected a language model or a multimodal checkpoint"
    ):
        Base(str(folder))


# adapters


@pytest.mark.parametrize("trained_on", ["class", "bare"])
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_adapters_of_the_class_and_of_the_bare_language_model(kind, trained_on, tmp_path):
    whole = bases.model(kind)
    folder = bases.save(whole, kind, tmp_path / "base")
    llm = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    target = whole if trained_on == "class" else llm
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights=False,
        target_modules=r"(.*language_model.*|model\.layers.*)\.(q_proj|down_proj)",
    )
    torch.manual_seed(4)
    peft.get_peft_model(target, settings).save_pretrained(tmp_path / "lora")
    base = Base(str(folder))
    expert = open_expert("own", ExpertRecipe(lora=str(tmp_path / "lora"), tower=str(folder)), base)
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    changed = set()
    for name in base.names:
        tau = expert.task_vector(name, base.tensor(name), bases.WORDS)
        (a, *_), (b, *_) = (
            [t for k, t in lora.items() if k.endswith(f"{name.removesuffix('.weight')}.lora_{x}.weight")] or [None]
            for x in "AB"
        )
        if a is None:
            assert not tau.any()
        else:
            changed.add(name)
            torch.testing.assert_close(tau, 2 * b @ a)
    assert len(changed) == 4


# from the recipe to the answer


@pytest.fixture(scope="module", params=["gemma3", "llava"])
def case(request, tmp_path_factory):
    """(kind, folder of base, experts and `out`, recipe, merged model, its processor)"""
    kind, folder = request.param, tmp_path_factory.mktemp("world")
    changes = {"tie_word_embeddings": True} if kind == "gemma3" else {}
    recipe = {**bases.world(kind, folder, ("one", "two", "three"), **changes), "decoupling": WHOLE}
    run({**recipe, "experts": {name: recipe["experts"][name] for name in ("one", "two")}}, folder / "out")
    return (kind, folder, recipe, *load(folder / "out"))


@torch.no_grad()
def test_text_is_the_multimodal_checkpoint_s_own_bit_for_bit(case):
    _, folder, _, model, _ = case
    base, _ = stock(folder / "base")
    assert model.config.text_config.model_type == base.config.text_config.model_type
    mask = (TEXTS != 0).long()
    assert torch.equal(model(TEXTS).logits, base(TEXTS).logits)
    assert torch.equal(model(TEXTS, attention_mask=mask).logits, base(TEXTS, attention_mask=mask).logits)
    for how in (dict(), dict(num_beams=2), dict(cache_implementation="static")):
        want = base.generate(TEXTS, attention_mask=mask, **GREEDY, **how)
        assert torch.equal(model.generate(TEXTS, attention_mask=mask, **GREEDY, **how), want)


def test_a_conversation_without_media_is_the_base_s_own(case):
    _, folder, _, model, processor = case
    base, own = stock(folder / "base")
    for chat in ([{"role": "user", "content": "what is this ?"}], [user(text("what is this ?"))]):
        ours, theirs = processor.apply_chat_template(chat, **ASK), own.apply_chat_template(chat, **ASK)
        assert torch.equal(ours["input_ids"], torch.as_tensor(theirs["input_ids"]))
        got = model.generate(**ours, **GREEDY)
        assert torch.equal(got, base.generate(torch.as_tensor(theirs["input_ids"]), **GREEDY))


def test_the_first_expert_s_placeholder_is_the_base_s_token_and_the_second_s_a_new_one(case):
    kind, _, _, model, processor = case
    one, two = (model.config.experts[name]["placeholders"]["image"] for name in ("one", "two"))
    token = bases.TOKENS[kind][-1]
    assert one == {"token": token, "id": bases.PLACEHOLDER[kind]}
    assert two["token"] == f"{token[:-1]}:two>" and two["id"] >= bases.WORDS + len(bases.TOKENS[kind])
    assert {token["token"]: token["experts"] for token in model.config.added_tokens} == {
        text: ["two"] for text in dict.fromkeys(["<image:two>", two["token"]])
    }
    ids = processor.tokenizer.get_vocab()
    assert [ids[token] for token in bases.TOKENS[kind]] == list(
        range(bases.WORDS, bases.WORDS + len(bases.TOKENS[kind]))
    )


@pytest.mark.parametrize("name", ["one", "two"])
@torch.no_grad()
def test_an_expert_answers_about_a_picture_as_its_own_class_does(case, name):
    kind, folder, _, model, processor = case
    own_model, own = stock(folder / name)
    chat = lambda **of: [user(picture(3, **of), text("what is this ?"))]  # noqa: E731
    ours = processor.apply_chat_template(chat(expert=name), **ASK)
    theirs = own.apply_chat_template(chat(), **ASK, return_tensors="pt")
    added = {"one": {}, "two": {e["token"]: e["id"] for e in model.config.added_tokens}}[name]
    back = {added[f"<image:{name}>"]: own.tokenizer.get_vocab()[bases.WRITTEN[kind]]} if added else {}
    back |= {model.config.experts[name]["placeholders"]["image"]["id"]: bases.PLACEHOLDER[kind]}
    assert [back.get(token, token) for token in ours["input_ids"][0].tolist()] == theirs["input_ids"][0].tolist()
    got, want = model(**ours).logits, own_model(**theirs).logits
    words = slice(None, bases.WORDS)
    same_logits(got[..., words], want[..., words])
    base, _ = stock(folder / "base")
    assert float((base(**theirs).logits - want).abs().max()) > 0.05  # it is another model than the base
    silent = {"suppress_tokens": list(range(bases.WORDS, 98))}
    got = model.generate(**ours, **GREEDY, **silent)[:, ours["input_ids"].shape[1] :]
    assert torch.equal(got, own_model.generate(**theirs, **GREEDY, **silent)[:, theirs["input_ids"].shape[1] :])


def test_both_experts_in_one_prompt(case):
    _, _, _, model, processor = case
    chat = [user(picture(1, expert="one"), text("and"), picture(2, expert="two"), text("what ?"))]
    inputs = processor.apply_chat_template(chat, **ASK)
    assert {2, 3} <= set(inputs["route_ids"][0].tolist())
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 6


def test_what_a_dry_run_reads_holds_no_tower_of_the_base(case):
    _, _, recipe, *_ = case
    names = {part.name for part in plan(Recipe.from_dict(recipe)).parts}
    assert any(name.startswith("one:vision_tower") for name in names)
    assert not any("vision_tower" in name and ":" not in name for name in names)


def test_inspect_verify_add_and_remove(case, tmp_path):
    kind, folder, _, model, _ = case
    report = json.loads((folder / "out" / "merge_report.json").read_text())
    assert report["warnings"][0].endswith("multi_modal_projector, vision_tower of that checkpoint are left out")
    told = cli("inspect", folder / "three", "--base", folder / "base", "--every")
    assert "fits" in told and "does not fit" not in told and "of that checkpoint are left out" in told
    told = cli("inspect", folder / "out", "--base", folder / "base", "--every")
    assert "distance 0.0000" in told and "changed: 0 of" in told
    result = json.loads(cli("verify", folder / "out", "--originals", "--load", "--json"))
    assert {check["status"] for check in result["checks"]} == {"passed"}, result
    cli("add", folder / "out", "--expert", f"three={folder / 'three'}", "--out", tmp_path / "more")
    more, _ = load(tmp_path / "more")
    assert more.config.expert_names == ["one", "two", "three"]
    assert torch.equal(more(TEXTS).logits, model(TEXTS).logits)
    result = json.loads(cli("verify", tmp_path / "more", "--originals", "--load", "--json"))
    assert {check["status"] for check in result["checks"]} == {"passed"}, result
    cli("remove", tmp_path / "more", "--expert", "one", "--out", tmp_path / "less")
    result = json.loads(cli("verify", tmp_path / "less", "--originals", "--json"))
    assert all(check["status"] in ("passed", "skipped") for check in result["checks"]), result


def test_verify_names_another_base(case, tmp_path):
    kind, folder, *_ = case
    tied = {"tie_word_embeddings": True} if kind == "gemma3" else {}
    other = bases.save(bases.model(kind, seed=9, **tied), kind, tmp_path / "other")
    result = mmer.verify(folder / "out", base=str(other), load=True)
    assert {"base", "load"} <= set(result.failed) and "tensors differ" in result["base"].found
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    assert mmer.verify(folder / "out", base=str(copy), load=True).ok


# which tokens see each other


@pytest.mark.parametrize("name", ["one", "two"])
def test_verify_finds_what_an_entry_lost_or_gained(case, tmp_path, name):
    kind, folder, *_ = case
    out = shutil.copytree(folder / "out", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    entry = config["experts"][name]
    if kind == "gemma3":
        del entry["bidirectional"]
        found, expected = f"experts.{name} has no bidirectional", '"bidirectional": ["image"], since in Gemma3For'
    else:
        entry["bidirectional"] = ["image"]
        found, expected = f"experts.{name} has bidirectional ['image']", "take it out of the entry, or merge again"
    (out / "config.json").write_text(json.dumps(config))
    result = mmer.verify(out)
    assert result.failed == ["attention"]
    assert found in result["attention"].found and expected in result["attention"].expected
    told = mmer.verify(folder / "out")["attention"].found
    assert ("image of one, image of two" in told) == (kind == "gemma3")
