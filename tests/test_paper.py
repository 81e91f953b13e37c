"""The recipe for the paper's own tables: recipe and tasks load, rows are made as the authors' files have them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from evaluation_mmer.tasks import load_items, load_tasks
from merging_mmer import Recipe
from mmer import app

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "benchmarks" / "paper"
TEXT = (ROOT / "benchmarks" / "reproduce_paper.md").read_text()
sys.path.append(str(PAPER))

import rows  # noqa: E402

QUESTION = {
    "id": 7,
    "conversations": [
        {"from": "human", "value": "image: <image>\naudio: <audio>\nWhat do both share?\nA. water\nB. fire"},
        {"from": "gpt", "value": "A"},
    ],
    "modal_inputs": {"vision": ["a.png"], "audio": ["b.wav"], "video": []},
}


def test_the_recipe_is_the_paper_s():
    recipe = Recipe.load(PAPER / "recipe.yaml")
    assert recipe.decoupling.kind == "paper" and recipe.method.scope == "model"
    assert list(recipe.experts) == ["image", "audio", "video", "point"]


def test_what_is_put_in_its_place_gives_recipes(tmp_path):
    found = re.findall(r"sed 's/(.*?)/(.*?)/' benchmarks/paper/recipe.yaml", TEXT)
    text = (PAPER / "recipe.yaml").read_text()
    kinds = []
    for old, new in found:
        assert old in text
        kinds.append(Recipe.from_dict(yaml.safe_load(text.replace(old, new))).decoupling.kind)
    assert kinds == ["mask", "none"]


def test_naive_mc_and_damc_are_recipes():
    base = yaml.safe_load((PAPER / "recipe.yaml").read_text())
    base["method"], base["decoupling"] = {"name": "task_arithmetic", "alpha": 0.25}, {"kind": "none"}
    assert Recipe.from_dict(base).method.alpha == 0.25
    folder = "modelcompose/multimodal-vicuna-7b-v1.5-audio-damc"
    both = {f"audio_{key}": {"model": folder, "lora_key": key} for key in ("audio", "default")}
    assert Recipe.from_dict({"base": base["base"], "experts": both, "decoupling": {"kind": "exact"}})


def test_rows_have_media_question_and_answer(tmp_path):
    questions, out = tmp_path / "q.json", tmp_path / "mcub-4.jsonl"
    questions.write_text(json.dumps([QUESTION]))
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"id": 7, "conversations": [{"value": "B"}]}]))
    command = [sys.executable, str(PAPER / "rows.py"), str(questions), "--answers", str(answers), "--out", str(out)]
    done = subprocess.run([*command, "--media", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, out.read_text().splitlines())
    assert found == {
        "id": "7",
        "image": [str(tmp_path / "a.png")],
        "audio": [str(tmp_path / "b.wav")],
        "question": "What do both share?\nA. water\nB. fire",
        "answers": ["B"],
    }


def test_every_task_takes_such_rows(tmp_path):
    """With media that are there; ModelNet40's have choices."""
    (tmp_path / "a.png").write_bytes((ROOT / "evaluation_mmer/lab/samples/trousers.png").read_bytes())
    made = {"image": "a.png", "question": "What is it?", "answers": ["chair"], "choices": ["chair", "table"]}
    (tmp_path / "tasks.yaml").write_text((PAPER / "tasks.yaml").read_text())
    tasks = load_tasks(tmp_path / "tasks.yaml")
    for task in tasks:
        (tmp_path / task.data).write_text(json.dumps(made))
        (item,) = load_items(task)
        assert item.modalities == ("image",)
    named = {task.name for task in tasks if not re.match("mcub|music|avqa", task.name)}
    assert {"vqav2", "gqa", "textvqa", "vizwiz", "scienceqa", "pope", "okvqa"} <= named


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "7: found 0 turns of a human"),
        ({"conversations": QUESTION["conversations"][:1]}, "7: has no answer"),
        ({"modal_inputs": {"vision": ["a.png"]}}, "7: found 0 audio media and 1 placeholders"),
        ({"modal_inputs": {**QUESTION["modal_inputs"], "video": ["c.mp4"]}}, "7: found 1 video media and 0"),
        ({"modal_inputs": {"smell": ["a"]}}, "7: found media 'smell'"),
    ],
)
def test_a_question_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        rows.row({**QUESTION, **change}, None, Path("."))


def test_answers_are_the_last_turns(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([QUESTION, {"id": "q", "conversations": [{"from": "gpt", "value": "yes"}]}]))
    assert rows.answers_of(path) == {"7": "A", "q": "yes"}
    for form in (
        [{"id": 7}],
        ["B"],
        [{"conversations": [{"value": "A"}]}],
        [{"id": 7, "conversations": [{"value": 1}]}],
    ):
        path.write_text(json.dumps(form))
        with pytest.raises(ValueError, match="expected id and conversations"):
            rows.answers_of(path)


def test_every_task_of_several_media_has_a_command():
    tasks = load_tasks(PAPER / "tasks.yaml")
    for task in tasks:
        if re.match("mcub|music|avqa", task.name):
            made = task.data if task.data in TEXT else task.data.replace(task.name.removeprefix("mcub-"), "$kinds")
            assert f"--out {made}" in TEXT, task.name


def test_every_command_and_option_is_one():
    commands = re.findall(r"^ *(?:for .*; do )?mmer (\w+)([^#;\n]*)", TEXT, re.MULTILINE)
    assert len(commands) >= 8
    for command, rest in commands:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in click_options(command), f"mmer {command} has no {option}"


def click_options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    return {option for parameter in group.commands[command].params for option in parameter.opts}
