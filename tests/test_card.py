"""The model card: every number from the report, front matter that the Hub reads, snippets that run."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from hub_cards import write_card
from mmer import merge
from tests import tiny_world


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    merge(tiny_world.make(folder / "world"), folder / "mmer-tiny", progress=False)
    return folder / "mmer-tiny"


def test_the_front_matter_is_what_the_hub_reads(merged):
    data = ModelCard.load(merged / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "any-to-any"
    assert set(data.tags) == {"mmer", "merge", "multimodal", "image", "audio"}
    assert data.base_model is None, "folders of this machine mean nothing on the Hub"


def test_ids_on_the_hub_are_named_as_base_models(merged, tmp_path):
    for path in merged.iterdir():
        if path.name != "merge_recipe.yaml":
            (tmp_path / path.name).symlink_to(path)
    recipe = (merged / "merge_recipe.yaml").read_text()
    (tmp_path / "merge_recipe.yaml").write_text(re.sub(r"base: .*", "base: org/llm@main", recipe))
    (tmp_path / "README.md").unlink()
    data = ModelCard.load(write_card(tmp_path, "org/mmer-tiny")).data
    assert data.base_model == ["org/llm"] and data.base_model_relation == "merge"


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
    assert str(merged.parent) not in text, "a path of the machine that merged"
    assert "{{" not in text and "{%" not in text


def test_its_snippet_is_python(merged):
    (snippet,) = re.findall(r"```python\n(.*?)```", (merged / "README.md").read_text(), re.DOTALL)
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained("mmer-tiny"' in snippet and '"type": "audio"' in snippet


def test_a_folder_that_no_merge_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, merge_recipe.yaml, merge_report.json"):
        write_card(tmp_path)
