"""`mmer export`: every route as a stock checkpoint, read by a process that has none of our packages."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from configuration_mmer.composed_config_mmer import ComposedConfig
from merging_mmer import exporting
from merging_mmer.exporting import export_route

from . import tiny_several as several
from .tiny_processors import noise, picture, text, user

KINDS = {"image": "llava", "medical": "llava", "scan": "smolvlm", "film": "video_llava", "ear": "qwen2_audio"}
ROUTES = ["base", "merged", *KINDS]
ASK = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ROOT = Path(__file__).resolve().parent.parent
READER = """
import sys, torch
from tests.blocked_rooms import block, still_blocked
block()
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
jobs, answers = torch.load(sys.argv[1], weights_only=True), {}
for name, (folder, inputs, greedy) in jobs.items():
    auto = AutoModelForCausalLM if name in ("base", "merged") else AutoModelForMultimodalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    written = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1]:]
    answers[name] = (type(model).__name__, logits, written)
assert still_blocked()
torch.save(answers, sys.argv[2])
"""


def chat(name):
    media = {"base": [], "merged": []}.get(
        name, [{**noise(0), "expert": name} if name == "ear" else picture(0, expert=name)]
    )
    return [user(*media, text("what is this ?"))]


def renumbered(name, model, processor, out):
    """Merged id -> exported id, found by the texts in both tokenizers."""
    vocabulary = {**json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]}
    vocabulary |= {t["content"]: t["id"] for t in json.loads((out / "tokenizer.json").read_text())["added_tokens"]}
    merged = processor.tokenizer.get_vocab()
    called = {token: token for token in vocabulary}
    for entry in model.config.added_tokens:
        if entry["experts"] == [name] and entry["token"].endswith(f":{name}>"):
            called[entry["token"].replace(f":{name}", "").replace("<audio>", "<|AUDIO|>")] = entry["token"]
    return {merged[called[token]]: place for token, place in vocabulary.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tied = request.param
    base = several.save_base(folder / "base", tie_word_embeddings=tied)
    kinds = {k: v for k, v in KINDS.items() if not tied or v in ("llava", "smolvlm")}
    for seed, (name, kind) in enumerate(kinds.items()):
        several.save_expert(folder / name, kind, base, seed=seed + 1, more=(f"<own-{name}>",), noise=0.1)
    recipe = {"base": str(folder / "base"), "experts": {name: str(folder / name) for name in kinds}}
    model, processor = several.merge_and_load(recipe, folder / "mmer")
    jobs = {}
    for name in ["base", "merged", *kinds]:
        out = export_route(folder / "mmer", name, folder / f"plain-{name}", max_shard_size="30KB", progress=False)
        inputs = processor.apply_chat_template(chat(name), **ASK)
        table = renumbered(name, model, processor, out)
        ids = inputs["input_ids"].clone().apply_(lambda one, table=table: table[one])
        own = {key.partition(".")[2]: value for key, value in inputs.items() if key.startswith(f"{name}.")}
        own |= {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        jobs[name] = (str(out), own, GREEDY)
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-c", READER, str(folder / "jobs.pt"), str(folder / "answers.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, model, processor, torch.load(folder / "answers.pt"), tied


def test_logits_and_greedy_tokens_are_the_routed_model_s(world):
    folder, model, processor, answers, _ = world
    for name, (kind, logits, written) in answers.items():
        inputs = processor.apply_chat_template(chat(name), **ASK, text_route=name)
        with torch.no_grad():
            want = model(**inputs).logits
        table = renumbered(name, model, processor, folder / f"plain-{name}")
        ours = [i for i in table if i < want.shape[-1] and i not in model.config.placeholder_experts()]
        got = logits[..., [table[i] for i in ours]]
        several.same_logits(got, want[..., ours], 1e-5)
        if name == "base":
            assert torch.equal(logits, want) and kind == "LlamaForCausalLM"
        routed = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        assert written.tolist() == [[table[i] for i in row] for row in routed.tolist()], name


def test_an_expert_is_of_its_own_class_with_its_own_ids(world):
    folder, model, _, answers, tied = world
    names = {"llava": "LlavaForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
    for name in model.config.experts:
        kind = KINDS[name]
        assert answers[name][0] == names.get(kind, answers[name][0])
        config = json.loads((folder / f"plain-{name}" / "config.json").read_text())
        assert "auto_map" not in config and config["architectures"] == [answers[name][0]]
        token = several.PLACEHOLDERS[kind][0]  # as before the merge, which calls the second <image> otherwise
        plain = json.loads((folder / f"plain-{name}" / "tokenizer.json").read_text())["added_tokens"]
        place = next(entry["id"] for entry in plain if entry["content"] == token)
        keys = [key for key in config if key.endswith(("_token_id", "_token_index"))]
        assert place in [config[key] for key in keys]
        files = sorted((folder / f"plain-{name}").glob("*.safetensors"))
        assert len(files) > 1 and not list((folder / f"plain-{name}").glob("*.py"))
        there = [k for path in files for k in several.tiny.tensors(path.parent)]
        assert any("lm_head" in key for key in there) is not tied


def test_an_exported_processor_gives_the_expert_s_prompt(world):
    folder, model, processor, _, _ = world
    for name in model.config.experts:
        _, own = several.stock(folder / f"plain-{name}")
        asked = [user(noise(0) if name == "ear" else picture(0), text("what is this ?"))]
        got = own.apply_chat_template(asked, processor_kwargs={"return_tensors": "pt"}, **ASK)["input_ids"]
        table = renumbered(name, model, processor, folder / f"plain-{name}")
        want = processor.apply_chat_template(chat(name), **ASK)["input_ids"]
        assert got.tolist() == [[table[i] for i in row] for row in want.tolist()], name


def test_base_is_the_base_bit_for_bit(world):
    folder, _, _, _, _ = world
    want, got = (several.tiny.tensors(folder / place) for place in ("base", "plain-base"))
    assert set(want) == set(got) and all(torch.equal(want[name], got[name]) for name in want)


def test_the_language_model_alone_and_in_another_dtype(world, tmp_path):
    folder, model, processor, answers, _ = world
    out = export_route(folder / "mmer", "image", tmp_path / "llm", llm_only=True, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    inputs = processor(text="what is this ?", text_route="image")
    with torch.no_grad():
        want = model(**inputs).logits[..., : model.config.text_config.vocab_size]
        got = plain(inputs["input_ids"]).logits[..., : want.shape[-1]]
    several.same_logits(got, want, 1e-5)
    half = export_route(folder / "mmer", "image", tmp_path / "half", dtype="bfloat16", progress=False)
    whole = several.tiny.tensors(folder / "plain-image")
    assert all(torch.equal(t, whole[n].to(torch.bfloat16)) for n, t in several.tiny.tensors(half).items())


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(world, tmp_path, monkeypatch):
    folder, *_ = world
    source, out = folder / "mmer", tmp_path / "out"
    for arguments, message in [
        ((source, "nobody", out), "route is 'nobody', expected one of"),
        ((folder / "base", "base", out), "model_type"),
        ((source, "base", source / "inside"), "beside it"),
        ((source, "base", source.parent), "beside it"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_route(*arguments, progress=False)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        export_route(source, "base", out, dtype="int8", progress=False)
    with pytest.raises(ValueError, match="max_shard_size"):
        export_route(source, "base", out, max_shard_size="big", progress=False)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_route(source, "base", out, progress=False)
    with pytest.raises(ValueError, match="no config.json"):
        export_route(source, "base", out, overwrite=True, progress=False)
    (out / "config.json").write_text("{}")

    def broken(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(exporting._Export, "write_words", broken)
        with pytest.raises(OSError, match="full"):
            export_route(source, "base", out, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "mine.txt", "out"]
    export_route(source, "base", out, overwrite=True, progress=False)
    assert not (out / "mine.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["exact", "paper", "none"])
def test_every_kind_of_decoupling(kind, tmp_path):
    """Each tensor of the exported language model has the bits that the routed model multiplies with."""
    base = several.save_base(tmp_path / "base")
    several.save_expert(tmp_path / "image", "llava", base, seed=1, noise=0.0, norms=False)
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)")
    tuned = peft.get_peft_model(several.stock(tmp_path / "image")[0], settings)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "lora")
    source = {"lora": str(tmp_path / "lora"), "tower": str(tmp_path / "image")}
    how = {"kind": kind} if kind != "paper" else {"kind": kind, "scale": "none", "rank": 0}
    recipe = {"base": str(tmp_path / "base"), "experts": {"image": source}, "decoupling": how}
    model, _ = several.merge_and_load(recipe, tmp_path / "mmer")
    out = export_route(tmp_path / "mmer", "image", tmp_path / "plain", progress=False)
    plain, changed = several.stock(out)[0].get_decoder().state_dict(), 0
    for name, module in model.model.language_model.named_modules():
        if hasattr(module, "route_weight") and getattr(module, "delta", None) is not None:
            with torch.no_grad():
                want = module.route_weight(2)
            assert torch.equal(plain[f"{name}.weight"][: len(want)], want), name
            changed += not torch.equal(want, module.weight)
    assert changed == 4


def test_an_expert_without_a_class_of_transformers_is_refused_by_name(world, tmp_path, monkeypatch):
    folder, *_ = world
    merged = exporting.open_folder(folder / "mmer")
    merged.config.experts["image"]["config"]["model_type"] = ComposedConfig.model_type
    monkeypatch.setattr(exporting, "open_folder", lambda _: merged)
    with pytest.raises(ValueError, match="expert 'image' is of another code base.*--llm-only"):
        export_route(folder / "mmer", "image", tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
