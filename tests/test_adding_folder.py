"""`add` on disk and at the command line: whole or not at all, a merge when asked, and clear about what is wrong."""

import importlib
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import mmer
from merging_mmer import add
from merging_mmer.shards import ShardWriter

from . import tiny_growing as growing
from . import tiny_several as several
from .tiny_merges import run

tiny = several.tiny
SETTINGS = {"decoupling": {"kind": "mask", "rank": 2}, "method": {"name": "ties", "density": 0.3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, {**growing.make(folder, words=94), **SETTINGS}


def test_remerge_equals_merging_together_byte_for_byte(world, tmp_path):
    _, recipe = world
    run(growing.some(recipe, "one", "two"), tmp_path / "out")
    add(tmp_path / "out", {"three": recipe["experts"]["three"]}, remerge=True, progress=False)
    run(recipe, tmp_path / "together")
    for path in (tmp_path / "together").iterdir():
        if path.name != "merge_report.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "together"]


@pytest.fixture
def merged(world, tmp_path):
    """(recipe of all three, a folder of the first alone)"""
    recipe = world[1]
    if not (world[0] / "first").exists():
        run(growing.some(recipe, "one"), world[0] / "first")
    return recipe, Path(shutil.copytree(world[0] / "first", tmp_path / "out"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_at_once_are_one_after_another(merged, tmp_path):
    recipe, out = merged
    experts = {name: recipe["experts"][name] for name in ("two", "three")}
    add(out, experts, out=tmp_path / "both", progress=False, max_shard_size="40KB")
    assert len(list((tmp_path / "both").glob("*.safetensors"))) > 3
    for name, source in experts.items():
        add(out, {name: source}, progress=False)
    one, two = tiny.tensors(out), tiny.tensors(tmp_path / "both")
    assert set(one) == set(two) and all(growing.same(one[name], two[name]) for name in one)
    assert (out / "config.json").read_bytes() == (tmp_path / "both" / "config.json").read_bytes()


def test_what_else_lies_in_the_folder_stays(merged, tmp_path):
    recipe, out = merged
    (out / "plots").mkdir()
    (out / "plots" / "curve.png").write_bytes(b"x")
    (out / "LICENSE").write_text("mine")
    (out / "gone_mmer.py").write_text("# of an older version")
    seen = []
    add(out, {"two": recipe["experts"]["two"]}, progress=False, finish=lambda folder: seen.append(folder.name))
    assert (out / "LICENSE").read_text() == "mine" and (out / "plots" / "curve.png").read_bytes() == b"x"
    assert not (out / "gone_mmer.py").exists() and (out / "generation_config.json").is_file()
    assert seen == ["out"] and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=lambda kind: kind.__name__)
def test_an_addition_that_breaks_off_leaves_the_old_folder(merged, tmp_path, monkeypatch, error):
    recipe, out = merged
    before, real = content(out), ShardWriter.add

    def fail(self, name, tensor):
        if name.startswith("model.experts.two."):
            raise error("broken off")
        real(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(error):
        add(out, {"two": recipe["experts"]["two"]}, progress=False)
    assert content(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_successor_did_not_get_its_name_is_put_back(merged, tmp_path):
    """Killed between the two renamings, or unable to make the second."""
    recipe, out = merged
    before = content(out)
    workplace = tmp_path / ".out.rewrite"
    workplace.mkdir()
    out.rename(workplace / "out.replaced")
    with pytest.raises(ValueError, match=r"\['one'\] are there already"):
        add(out, {"one": recipe["experts"]["one"]}, progress=False)
    assert content(out) == before
    stored = importlib.import_module("merging_mmer.stored")

    def second_fails(unfinished, target):
        target.rename(unfinished.with_name(f"{target.name}.replaced"))
        raise OSError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "put_in_place", second_fails)
        with pytest.raises(OSError, match="no space"):
            add(out, {"two": recipe["experts"]["two"]}, progress=False)
    assert content(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_does_not_fit_is_refused(merged, world, tmp_path):
    recipe, out = merged
    before, two = content(out), {"two": recipe["experts"]["two"]}
    other = several.save_base(tmp_path / "other", words=94, seed=7)
    several.save_expert(tmp_path / "stranger", "llava", other, 1, words=94, noise=0.1)
    wrong = [
        ({"merged": two["two"]}, {}, "experts.merged: expected letters"),
        ({}, {}, "experts"),
        ({"two": str(tmp_path / "nowhere")}, {}, "is no folder here"),
        ({"stranger": str(tmp_path / "stranger")}, {}, "'stranger' was not tuned from"),
        ({"stranger": str(tmp_path / "stranger")}, {"base": str(tmp_path / "other")}, "expected the base that it was"),
        ({"two": {"model": two["two"], "modality": "video"}}, {}, r"asked for \['video'\], but it brings \['audio'\]"),
        (two, {"out": world[0]}, "is not empty"),
        (two, {"max_shard_size": "x"}, "max_shard_size"),
    ]
    for experts, how, words in wrong:
        with pytest.raises(ValueError, match=words):
            add(out, experts, progress=False, **how)
    with pytest.raises(ValueError, match="nothing can be put in its place: give out"):
        add("org/on-the-hub", two, progress=False)
    with pytest.raises(ValueError, match="expected a folder that `mmer merge` made"):
        add(tmp_path / "other" / "..", two, progress=False)
    assert content(out) == before
    tensors = tiny.tensors(out)
    del tensors["model.language_model.norm.weight"]
    tiny.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.language_model.norm.weight missing.*mmer verify"):
        add(out, two, progress=False)
    (out / "merge_recipe.yaml").unlink()
    with pytest.raises(ValueError, match="model.language_model.norm.weight|merge_recipe.yaml"):
        add(out, two, progress=False)


def test_a_remerge_names_the_originals_that_are_not_there(merged, tmp_path):
    recipe, out = merged
    text = (out / "merge_recipe.yaml").read_text()
    (out / "merge_recipe.yaml").write_text(text.replace(recipe["experts"]["one"], str(tmp_path / "lost")))
    with pytest.raises(ValueError, match=rf"experts.one.model: {tmp_path}/lost; experts.two.model: .*/gone"):
        add(out, {"two": str(tmp_path / "gone")}, remerge=True, progress=False)


def test_a_static_merge_is_refused(world, tmp_path):
    _, recipe = world
    run(growing.some(recipe, "one", decoupling={"kind": "none"}), tmp_path / "out")
    with pytest.raises(ValueError, match="static merge .* with remerge"):
        add(tmp_path / "out", {"two": recipe["experts"]["two"]}, progress=False)


# the command


def command(*words):
    return CliRunner().invoke(mmer.app, ["add", *map(str, words)])


def test_the_command(merged, tmp_path):
    recipe, out = merged
    source = recipe["experts"]["two"]
    done = command(out, "--expert", f"two={source}", "--lambda", "0", "--modality", "audio", "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert "was added beside one" in " ".join(done.output.split())
    written = yaml.safe_load((tmp_path / "new" / "merge_recipe.yaml").read_text())["experts"]["two"]
    assert written["lambda"] == 0 and written["modality"] == ["audio"] and written["model"] == source
    assert "| two |" in (tmp_path / "new" / "README.md").read_text()
    listed = tmp_path / "experts.yaml"
    listed.write_text(yaml.safe_dump({"experts": {"three": {"model": recipe["experts"]["three"], "weight": 2.0}}}))
    done = command(tmp_path / "new", "--recipe", listed)
    assert done.exit_code == 0, done.output
    assert mmer.MMERConfig.from_pretrained(tmp_path / "new").expert_names == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no expert to add"),
        (["--expert", "two"], "found neither model nor lora"),
        (["--expert", "two=a", "--expert", "two=b"], "is there twice"),
        (["--expert", "two=a", "--expert", "three=b", "--weight", "2"], "speak of one --expert"),
        (["--expert", "one=a"], "['one'] are there already"),
        (["--recipe", "FILE"], "expected a mapping `experts` alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_says_what_is_wrong(merged, tmp_path, words, told):
    (tmp_path / "all.yaml").write_text("base: x\nexperts: {two: y}\n")
    done = command(merged[1], *(str(tmp_path / "all.yaml") if word == "FILE" else word for word in words))
    assert done.exit_code == 1 and told in " ".join(done.stderr.split()), done.output
