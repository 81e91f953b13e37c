"""The model card: every number from a file of the folder, front matter that the Hub reads, snippets that run."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hub_cards import write_card
from hub_cards.card import is_generated
from hub_cards.results import read_results
from mmer import merge
from tests import tiny_world
from tests.evaluation_rows import OTHER, ROW


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    merge(tiny_world.make(folder / "world"), folder / "mmer-tiny", progress=False)
    return folder / "mmer-tiny"


@pytest.fixture
def copied(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "mmer-tiny")


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def python_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_the_front_matter_is_what_the_hub_reads(merged):
    data = card_of(merged).data
    assert data.library_name == "transformers" and data.pipeline_tag == "any-to-any"
    assert set(data.tags) == {"mmer", "merge", "multimodal", "image", "audio"}
    assert data.base_model is None, "folders of this machine mean nothing on the Hub"
    assert data.license == "unknown" and data.eval_results is None


def test_ids_on_the_hub_are_named_as_base_models(copied):
    recipe = yaml.safe_load((copied / "merge_recipe.yaml").read_text())
    recipe["base"], recipe["experts"]["image"] = "org/llm@main", {"lora": "org/eye-lora", "tower": "org/eye"}
    (copied / "merge_recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = ModelCard.load(write_card(copied, "org/mmer-tiny")).data
    assert data.base_model == ["org/llm", "org/eye-lora", "org/eye"] and data.base_model_relation == "merge"
    text = (copied / "README.md").read_text()
    assert "[org/llm@main](https://huggingface.co/org/llm/tree/main)" in text
    assert 'from_pretrained("org/mmer-tiny"' in text


def test_the_numbers_are_those_of_the_report(merged):
    text = (merged / "README.md").read_text()
    report = json.loads((merged / "merge_report.json").read_text())
    for name, numbers in report["experts"].items():
        (row,) = re.findall(rf"^\| {name} \|.*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == name and cells[2] == f"`{name}`"
        assert cells[3] == f"{numbers['total']['mask_density']:.1%}"
        assert cells[5] == f"{numbers['total']['residual']:.3f}"
        assert cells[6] == f"{numbers['bits_per_parameter']:.2f}"
    hashes = {("base", *of) for of in report["base"]["sha256"].items()}
    hashes |= {(f"experts.{name}", *of) for name, n in report["experts"].items() for of in n["sha256"].items()}
    assert set(re.findall(r"^\| (\S+) \| (\S+) \| `([0-9a-f]{64})` \|$", text, re.MULTILINE)) == hashes
    assert str(merged.parent) not in text, "a path of the machine that merged"
    assert "{{" not in text and "{%" not in text


def test_residuals_by_layer_add_up_to_those_by_kind(merged):
    report = json.loads((merged / "merge_report.json").read_text())
    for numbers in report["experts"].values():
        inside = [
            of for kind, of in numbers["tensors"].items() if kind.startswith(("self_attn", "mlp", "input", "post"))
        ]
        assert list(numbers["layers"]) == ["0", "1"] and 7 <= len(inside) < len(numbers["tensors"])
        sums = [
            [sum(of["norm"] ** 2 for of in parts), sum((of["norm"] * of["residual"]) ** 2 for of in parts)]
            for parts in (numbers["layers"].values(), inside)
        ]
        assert min(sums[1]) > 0
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-9)


def test_its_snippets_run(merged):
    """As a user runs them, beside the media they name, in a process of its own."""
    place = merged.parent
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(place / "picture.png")
    soundfile.write(place / "sound.wav", rng.standard_normal(16000).astype(np.float32), 16000)
    first, second = python_blocks(merged)
    (place / "ask.py").write_text(f"{first}\nprint('ran', len(media))\n{second}\nprint('ran', pipe.task)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "ask.py"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.findall(r"^ran (.*)$", done.stdout, re.MULTILINE) == ["2", "any-to-any"]
    assert first.count("print(") == 5 and '"type": "audio", "path": "sound.wav"' in first


def test_results_become_a_model_index_and_a_table(copied):
    (copied / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW, OTHER]}))
    write_card(copied)
    data = card_of(copied).data
    assert data.model_name == "mmer-tiny"
    # tasks that the Hub shows under one name are told apart by their metrics' names
    assert [r.metric_name.partition(" (")[0] for r in data.eval_results] == [
        "clothes: accuracy",
        "clothes: accuracy over the original expert's",
        "captions: cider",
    ]
    found = [(r.task_name, r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results]
    assert found == [
        ("clothes", "fashion-mnist", "accuracy", 0.8),
        ("clothes", "fashion-mnist", "retention", 0.9975),
        ("captions", "org/captions", "cider", 103.25),
    ]
    text = (copied / "README.md").read_text()
    assert (
        "| clothes | Fashion MNIST | image | accuracy | 400 | 80.0% (75.8% – 83.6%) | 80.2% (76.0% – 83.8%) | "
        "99.8% (98.2% – 101.3%) | 99.2% |" in text
    )
    assert "| captions | org/captions | image | cider | 400 | 103.2 (101 – 105.5) | – | – | – |" in text


@pytest.mark.parametrize(
    "broken", [{"value": float("nan")}, {"interval": [0.9, 0.1]}, {"retention": "0.9"}, {"original": {"value": 1}}]
)
def test_results_of_another_form_are_refused(tmp_path, broken):
    (tmp_path / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW | broken]}))
    with pytest.raises(ValueError, match="expected what `mmer evaluate` writes"):
        read_results(tmp_path)
    missing = {key: value for key, value in ROW.items() if key != "scorer"}
    (tmp_path / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [missing]}))
    with pytest.raises(ValueError, match="KeyError: 'scorer'"):
        read_results(tmp_path)


def test_licences_are_read_named_and_kept(merged, copied):
    """Read where the originals are; the folder then knows them without."""
    world = merged.parent / "world"
    licences = {"base": "license: llama2", "image": "license: apache-2.0", "audio": "license: [mit]"}
    for name, words in licences.items():
        (world / name / "README.md").write_text(f"---\n{words}\n---\nwords\n")
    try:
        write_card(copied)
    finally:
        for name in licences:
            (world / name / "README.md").unlink()
    text = (copied / "README.md").read_text()
    assert card_of(copied).data.license == "llama2" and "The strictest is llama2 (use limits)" in text
    assert "| experts.image.model | `image` | apache-2.0 | permissive | README.md |" in text
    before = (copied / "README.md").read_bytes()
    write_card(copied)
    assert (copied / "README.md").read_bytes() == before
    write_card(copied, license="llama3.1")
    write_card(copied)
    assert card_of(copied).data.license == "llama3.1", "what a person has settled on stays"
    with pytest.raises(ValueError, match="found the license 'My Own', expected an id"):
        write_card(copied, license="My Own")


def test_a_licence_that_the_hub_does_not_know_is_named_beside(copied):
    entry = {"id": "other", "name": "qwen-research", "link": "https://example.org/terms", "read_in": "README.md"}
    recorded = json.loads((copied / "licenses.json").read_text())
    recorded["sources"]["base"] |= entry
    for place in ("experts.image.model", "experts.audio.model"):
        recorded["sources"][place] |= {"id": "mit", "read_in": "README.md"}
    (copied / "licenses.json").write_text(json.dumps(recorded))
    data = ModelCard.load(write_card(copied)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "qwen-research", entry["link"])
    (copied / "licenses.json").write_text("[]")
    with pytest.raises(ValueError, match="licenses.json has another form"):
        write_card(copied)


def test_a_card_tells_whether_it_was_edited(copied):
    card = copied / "README.md"
    assert is_generated(card)
    card.write_text(card.read_text().replace("## Use", "## How to use"))
    assert not is_generated(card)
    write_card(copied)
    assert is_generated(card)
    card.write_text("by hand\n")
    assert not is_generated(card)


def test_a_folder_that_no_merge_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, merge_recipe.yaml, merge_report.json"):
        write_card(tmp_path)
