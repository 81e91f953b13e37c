"""`remove`: an expert leaves a merged folder; the others stay, bit for bit, and ids of tokens never move."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import mmer
from merging_mmer import add, remove
from merging_mmer.shards import ShardWriter
from merging_mmer.verification import verify
from processing_mmer import MMERProcessor

from . import tiny_growing as growing
from . import tiny_several as several
from .tiny_merges import run
from .tiny_processors import user

tiny = several.tiny
SPARSE = {"name": "ties", "density": 0.3}
CASES = {
    "mask": {"decoupling": {"kind": "mask", "rank": 2}, "method": SPARSE},
    "tied": {"decoupling": {"kind": "mask", "scale": "tensor", "rank": 0}},
    "exact": {"method": {**SPARSE, "scope": "model"}},
    "none": {"decoupling": {"kind": "none"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, growing.make(folder, words=94)


@pytest.fixture(scope="module", params=CASES)
def case(request, world, tmp_path_factory):
    """A folder of three experts, one that the first has left, and one that it has joined again, loaded."""
    recipe, place = world[1], tmp_path_factory.mktemp("shrunk")
    if request.param == "tied":
        recipe = growing.make(place, tie_word_embeddings=True)
    if request.param == "exact":
        recipe = growing.make_loras(place, {"one": 3, "two": 2, "three": 2})
    recipe = {**recipe, **CASES[request.param]}
    run(recipe, place / "old")
    report = remove(place / "old", "one", out=place / "new", progress=False)
    if request.param != "none":
        add(place / "new", {"one": recipe["experts"]["one"]}, out=place / "again", progress=False)
    return SimpleNamespace(
        name=request.param, place=place, recipe=recipe, report=report,
        old=growing.load(place / "old"), new=growing.load(place / "new"),
    )  # fmt: skip


def test_the_other_routes_do_not_change_by_one_bit(case):
    growing.check_unchanged(case.old, case.new, ["base", "two", "three"])
    assert case.new[0].config.expert_names == ["two", "three"]
    assert not [name for name in tiny.tensors(case.place / "new") if name.startswith("model.experts.one.")]


def test_who_comes_back_changes_nothing_of_the_others(case):
    if case.name == "none":
        pytest.skip("nobody joins a static merge")
    growing.check_unchanged(case.new, growing.load(case.place / "again"), ["base", "two", "three"])


@pytest.mark.parametrize("folder", ["new", "again"])
def test_the_folder_is_sound_and_tells_the_truth(case, folder):
    if (case.name, folder) == ("none", "again"):
        pytest.skip("nobody joins a static merge")
    result = verify(case.place / folder, originals=True, load=case.name == "tied")
    skipped = {"exact": {"masks", "scales", "density"}, "none": {"masks", "scales", "density"}}
    assert {c.name for c in result.checks if c.status != "passed"} == skipped.get(case.name, set()), result.checks


def test_the_report_is_the_old_one_without_it(case):
    before = json.loads((case.place / "old" / "merge_report.json").read_text())
    after = json.loads((case.place / "new" / "merge_report.json").read_text())
    assert before["experts"].pop("one") and after["experts"] == before["experts"]
    assert after["notes"][-1].startswith("expert 'one' was removed; the merged route ")
    assert "one" not in (case.place / "new" / "merge_recipe.yaml").read_text().split("experts:")[1].split()[0]


def test_the_merged_vector_loses_what_it_alone_had(case):
    old, new = tiny.tensors(case.place / "old"), tiny.tensors(case.place / "new")
    zeroed = 0
    for name in (name for name in old if name.endswith(".masks")):
        delta, wanted = old[name.replace("masks", "delta")], new[name.replace("masks", "delta")]
        assert torch.equal(new[name], old[name][1:])
        before, after, masks = delta.tolist(), wanted.tolist(), old[name].tolist()
        for row, column in itertools.product(range(delta.shape[0]), range(delta.shape[1])):
            one, two, three = (mask[row][column // 8] >> (column % 8) & 1 for mask in masks)
            alone = one and not two and not three
            zeroed += bool(alone)
            assert after[row][column] == (0 if alone else before[row][column]), (name, row, column)
    assert (zeroed > 100) == (case.name not in ("exact", "none"))


def test_what_is_known_of_all_is_merged_anew(case):
    """Small tensors, and all of them where LoRAs are kept exactly, are those of a merge without the expert."""
    run(growing.some(case.recipe, "two", "three"), case.place / "without")
    new, wanted = tiny.tensors(case.place / "new"), tiny.tensors(case.place / "without")
    ends = (".delta",) if case.name == "exact" else () if case.name == "none" else (".merged_weight",)
    compared = [name for name in wanted if name.endswith(ends or "nothing")]
    assert len(compared) == {"exact": 6, "none": 0}.get(case.name, 5)
    for name in compared:
        torch.testing.assert_close(new[name], wanted[name], rtol=1e-5, atol=1e-7)
    if case.name == "none":
        old = tiny.tensors(case.place / "old")
        assert all(torch.equal(old[name], new[name]) for name in new if name.endswith((".delta", ".merged_weight")))


def test_who_comes_and_goes_leaves_no_trace_beside_the_merged_route(case):
    if case.name == "none":
        pytest.skip("nobody joins a static merge")
    remove(case.place / "again", "one", out=case.place / "gone", progress=False)
    growing.check_unchanged(case.new, growing.load(case.place / "gone"), ["base", "two", "three"])
    one, two = tiny.tensors(case.place / "new"), tiny.tensors(case.place / "gone")
    assert set(one) == set(two)
    for name in one:
        if not name.endswith(".delta"):
            assert growing.same(one[name], two[name]) or ".merged_" in name, name
    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        assert (case.place / "new" / name).read_bytes() == (case.place / "gone" / name).read_bytes(), name


# tokens


def test_ids_in_between_are_held_and_never_written(case):
    model, processor = case.new
    before = {token["id"]: token for token in case.old[0].config.added_tokens}
    held = [token for token in model.config.added_tokens if not token["experts"]]
    assert [before[token["id"]]["token"] for token in held] == ["<image>", "<mine>"]
    assert [token["token"] for token in held] == [f"<removed:{token['id']}>" for token in held]
    vocabulary = processor.tokenizer.get_vocab()
    assert "<image>" not in vocabulary and "<mine>" not in vocabulary and "<both>" in vocabulary
    unknown = processor.tokenizer.unk_token_id
    assert processor.tokenizer("what <mine>")["input_ids"][-1] == unknown
    inputs = processor(text=" ".join(token["token"] for token in held) + " what")
    for route in ("merged", "two", "three"):
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], text_route=route).logits
        assert torch.isinf(logits[..., [token["id"] for token in held]]).all()
        assert torch.isfinite(logits[..., : len(several.WORDS)]).all()
    assert {m for own in processor.experts.values() for m in own.modalities} == {"image", "audio"}
    assert processor.default_experts == {"audio": "two", "image": "three"}
    assert "one" not in processor.expert_templates
    with pytest.raises(ValueError, match="one"):
        processor.apply_chat_template([user({**growing.MEDIA["one"], "expert": "one"})], **growing.ASK)


def test_the_last_tokens_go(case, tmp_path):
    remove(case.place / "old", ["three"], out=tmp_path / "out", progress=False)
    config = mmer.MMERConfig.from_pretrained(tmp_path / "out")
    assert [token["id"] for token in config.added_tokens] == list(
        range(config.added_tokens[0]["id"], config.vocab_size)
    )
    assert not {"<image:three>", "<new>"} & {token["token"] for token in config.added_tokens}
    tokenizer = MMERProcessor.from_pretrained(tmp_path / "out", config=config.text_config).tokenizer
    assert len(tokenizer) == config.vocab_size == case.old[0].config.vocab_size - 2
    growing.check_unchanged(case.old, growing.load(tmp_path / "out"), ["base", "one", "two"])


# the whole


@pytest.fixture
def merged(world, tmp_path):
    """(recipe of two, a folder of them)"""
    recipe = growing.some(world[1], "one", "two", **CASES["mask"], default_experts={"image": "one"}, text_route="two")
    if not (world[0] / "pair").exists():
        run(recipe, world[0] / "pair")
    return recipe, Path(shutil.copytree(world[0] / "pair", tmp_path / "out"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_defaults_that_name_it_go_with_it(merged):
    _, out = merged
    report = remove(out, "two", progress=False)
    assert "text_route was 'two' and is 'auto' now" in report.notes
    config = mmer.MMERConfig.from_pretrained(out)
    assert config.text_route == "auto" and config.default_experts == {"image": "one"}
    assert verify(out).ok


def test_remerge_equals_merging_the_others_together(merged, tmp_path):
    recipe, out = merged
    remove(out, "one", remerge=True, progress=False)
    run({**recipe, "experts": {"two": recipe["experts"]["two"]}, "default_experts": {}}, tmp_path / "together")
    for path in (tmp_path / "together").iterdir():
        if path.name != "merge_report.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_what_cannot_be_is_refused_and_changes_nothing(merged, tmp_path, monkeypatch):
    _, out = merged
    before = content(out)
    for experts, words in (("three", r"no \['three'\], only \['one', 'two'\]"), (["one", "two"], "one must stay")):
        with pytest.raises(ValueError, match=words):
            remove(out, experts, progress=False)

    def fail(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        remove(out, "one", progress=False)
    assert content(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(merged):
    _, out = merged
    done = CliRunner().invoke(mmer.app, ["remove", str(out), "--expert", "one"])
    assert done.exit_code == 0 and "the merged route keeps what it shared" in " ".join(done.output.split())
    assert "| two |" in (out / "README.md").read_text() and "| one |" not in (out / "README.md").read_text()
    done = CliRunner().invoke(mmer.app, ["remove", str(out), "--expert", "two"])
    assert done.exit_code == 1 and "one must stay" in " ".join(done.stderr.split())
