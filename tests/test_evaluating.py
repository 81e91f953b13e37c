"""mmer evaluate: answers are those of each model alone; a killed run goes on; what does not fit is refused at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from evaluation_mmer import answers, evaluating
from evaluation_mmer.evaluating import evaluate
from evaluation_mmer.tasks import load_items, load_tasks
from hub_cards import write_card
from mmer import app
from modeling_mmer import MMERForConditionalGeneration

from . import tiny_tasks as tiny

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["pictures", "colours", "sounds", "words"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.merged_world(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def run(world, tmp_path):
    """Evaluate into a file of this test's own."""

    def made(tasks=None, **settings):
        given = {"output": tmp_path / "evaluation.json", "progress": False, "batch_size": 3, **settings}
        return evaluate(world / "out", tasks or world / "tasks" / "tasks.yaml", **given)

    return made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def words_of(path: Path, item: str) -> set[str]:
    return {line["words"] for line in lines(path) if line["item"] == item}


def test_answers_are_those_of_each_model_alone(world, run, tmp_path):
    """The files that a run writes, beside each model asked as its own README says, item by item."""
    found = run(against="originals")
    model = MMERForConditionalGeneration.from_pretrained(world / "out").eval()
    merged = AutoProcessor.from_pretrained(world / "out", trust_remote_code=True)
    llava = LlavaForConditionalGeneration.from_pretrained(world / "image").eval()
    own = AutoProcessor.from_pretrained(world / "image")
    base, words = (
        AutoModelForCausalLM.from_pretrained(world / "base").eval(),
        AutoTokenizer.from_pretrained(world / "base"),
    )
    ask = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    greedy = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    tasks = {task.name: task for task in load_tasks(world / "tasks" / "tasks.yaml")}

    def answered(who, processor, chat, decode):
        inputs = processor.apply_chat_template(chat, **ask)
        return decode(who.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    same = []
    for item in load_items(tasks["pictures"]):
        chat = [{"role": "user", "content": [
            {"type": "image", "path": item.media[0].source}, {"type": "text", "text": item.text},
        ]}]  # fmt: skip
        alone = [answered(model, merged, chat, merged.decode), answered(llava, own, chat, own.decode)]
        assert words_of(tmp_path / "evaluation.json", item.digest) == {one.strip() for one in alone}
        same.append(alone[0] == alone[1])
    assert found.results[0].agreement == sum(same) / len(same)
    for item in load_items(tasks["words"]):
        alone = answered(base, words, [{"role": "user", "content": item.text}], words.decode)
        assert words_of(tmp_path / "evaluation.json", item.digest) == {alone.strip()}
    assert found.results[3].original.name == "base" and found.results[3].agreement == 1.0


def test_what_is_found(world, run, tmp_path):
    found = run(against="originals")
    assert [result.task for result in found.results] == NAMES
    for result in found.results:
        assert result.n == 4 and result.interval[0] <= result.value <= result.interval[1]
        assert result.value in (0, 0.25, 0.5, 0.75, 1) and result.original is not None
    assert [r.original.name for r in found.results] == ["image", "image", "audio", "base"]
    # a full-rank correction gives each expert back whole: what it chose alone it chooses here
    for result in found.results[1:3]:
        assert result.agreement == 1.0 and result.original.value == result.value
        assert result.retention == (1.0 if result.value else None)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert written["format"] == 1 and written["settings"]["transformers"] and written["model"]["name"] == "out"
    assert str(world) not in (tmp_path / "evaluation.json").read_text(), "no path of the machine"
    first, second = written["tasks"][:2]
    assert second["metric"] == "accuracy" and second["scorer"] == "choice" and second["expert"] == "image"
    assert (first["task"], first["task_type"], first["dataset"]) == ("pictures", "image-text-to-text", "pictures")


def test_a_card_is_made_of_it(world, run):
    """Into the folder itself, where the model card looks for it."""
    found = run(limit=2, against="originals", output=world / "out" / "evaluation.json")
    try:
        card = ModelCard(write_card(world / "out").read_text())
    finally:
        for name in ("evaluation.json", "evaluation.jsonl"):
            (world / "out" / name).unlink()
    # the Hub's form joins tasks of one type on one dataset
    shown = {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results}
    for result in found.results:
        assert (result.dataset, result.metric, round(result.value, 6)) in shown
        if result.retention is not None:
            assert (result.dataset, "retention", round(result.retention, 6)) in shown
        assert f"| {result.task} |" in card.text
    assert any(result.retention is not None for result in found.results)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_finds_the_same(run, tmp_path, monkeypatch):
    whole = run(against="originals", output=tmp_path / "whole.json")
    asked = []
    write, choose = answers._write, answers._choose

    def counting(kind, most):
        def counted(subject, task, items, batch_size):
            asked.append(len(items))
            if len(asked) > most:
                raise Killed
            return kind(subject, task, items, batch_size)

        return counted

    for most in (2, 4, 100):
        monkeypatch.setattr(answers, "_write", counting(write, most))
        monkeypatch.setattr(answers, "_choose", counting(choose, most))
        asked.clear()
        if most < 100:
            with pytest.raises(Killed):
                run(against="originals")
            with (tmp_path / "evaluation.jsonl").open("ab") as file:
                file.write(b'{"key": "cut o')
            assert not (tmp_path / "evaluation.json").exists()
    found = run(against="originals")
    # 16 batches in all (4 tasks of 2, for the merged model and for the originals), 6 were done before
    assert len(asked) == 16 - 6
    assert found.to_dict() == whole.to_dict()
    assert sorted(map(str, lines(tmp_path / "evaluation.json"))) == sorted(map(str, lines(tmp_path / "whole.json")))


def test_nothing_is_asked_twice_unless_it_is_to_be(world, run, tmp_path, monkeypatch):
    before = run(against="originals")
    with monkeypatch.context() as patch:
        patch.setattr(evaluating.MMERForConditionalGeneration, "from_pretrained", None)
        assert run(against="originals").to_dict() == before.to_dict()
        with pytest.raises(TypeError):
            run(fresh=True)
    assert lines(tmp_path / "evaluation.json") == [], "a fresh run forgets the answers"


def test_what_has_changed_is_asked_anew(world, tmp_path, monkeypatch):
    """A medium, a task's prompt, the model: each is told by its hash; other tasks keep their answers."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    tiny.write_all(folder)
    seen: list[str] = []
    ask = answers._write
    monkeypatch.setattr(
        answers, "_write", lambda s, t, items, b: seen.extend(i.text for i in items) or ask(s, t, items, b)
    )

    def again(**fields):
        seen.clear()
        tiny.write_tasks(
            folder / "two.yaml",
            {"name": "pictures", "data": "pictures.jsonl", "max_new_tokens": 2, **fields},
            {"name": "words", "data": "words.jsonl", "max_new_tokens": 2},
        )
        evaluate(world / "out", folder / "two.yaml", output=folder / "e.json", progress=False, batch_size=1)
        return len(seen)

    assert again() == 8
    assert again() == 0
    assert again(scorer="exact_match", type="some-type") == 0, "how answers are scored is no part of them"
    (folder / "media" / "a2.png").write_bytes((folder / "media" / "a1.png").read_bytes())
    assert again() == 1
    assert again(max_new_tokens=3) == 4
    assert again(template="{{ question }} and ?") == 4
    monkeypatch.setattr(evaluating, "settings_files", lambda folders: [folder / "words.jsonl"])
    assert again(template="{{ question }} and ?") == 8, "another model"


def test_routes(world, run):
    task = {"name": "colours", "data": "pictures.jsonl", "scorer": "choice", "answers": "label"}
    tasks = tiny.write_tasks(world / "tasks" / "one.yaml", task)
    found = run(tasks=tasks, limit=2, route=["base", "merged", "image"], against="originals")
    assert [result.route for result in found.results] == ["base", "merged", "image"]
    assert [result.original.name for result in found.results] == ["image"] * 3
    assert found.results[2].agreement == 1.0


def test_media_of_several_experts_have_no_original(world, run):
    rows = [{"image": "media/a0.png", "audio": "media/s0.wav", "question": "what ?", "answers": "red"}]
    tiny.write_rows(world / "tasks" / "both.jsonl", rows)
    tasks = tiny.write_tasks(
        world / "tasks" / "both.yaml", {"name": "both", "data": "both.jsonl", "max_new_tokens": 2}
    )
    (result,) = run(tasks=tasks, against="originals").results
    assert result.experts == ["audio", "image"] and result.original is None
    assert result.task_type == "any-to-any" and result.expert is None


REFUSED = {
    "an unknown route": (
        {"route": "smell"},
        {},
        r"bad.yaml:2: route: found 'smell', expected one of \['auto', 'base'",
    ),
    "an unknown route of the call": ({}, {"route": ["smell"]}, "--route: route: found 'smell'"),
    "an unknown expert": ({"expert": "smell"}, {}, r"bad.yaml:2: expert: found 'smell', expected one of \['image'"),
    "an expert of another modality": ({"expert": "audio"}, {}, "bad.yaml:2: task 'bad' has image media, which its"),
    "a missing medium": ({"media": {"image": "question"}}, {}, "pictures.jsonl:1: question: there is no file"),
    "an unknown scorer": ({"scorer": "judge"}, {}, "bad.yaml:4: scorer: .*found 'judge'"),
    "no answers": ({"answers": "none"}, {}, "pictures.jsonl:1: has no 'none'"),
    "another comparison": ({}, {"against": "gpt"}, "against is 'gpt', expected 'originals'"),
    "no batch": ({}, {"batch_size": 0}, "batch_size is 0"),
    "no items": ({}, {"limit": 0}, "limit 0"),
    "no dtype": ({}, {"dtype": "int8"}, "dtype is 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_a_model_is_loaded(case, world, run, monkeypatch):
    fields, settings, message = REFUSED[case]
    monkeypatch.setattr(evaluating.MMERForConditionalGeneration, "from_pretrained", None)
    task = {"name": "bad", "data": "pictures.jsonl", **fields}
    with pytest.raises(ValueError, match=message):
        run(tasks=tiny.write_tasks(world / "tasks" / "bad.yaml", task), **settings)


def test_originals_that_are_gone(world, run, tmp_path, monkeypatch):
    recipe = tmp_path / "moved.yaml"
    recipe.write_text(f"base: {world / 'base'}\nexperts: {{image: {tmp_path / 'gone'}, audio: {world / 'audio'}}}\n")
    monkeypatch.setattr(evaluating.MMERForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(ValueError, match="gone' is no folder here, and no Hub id"):
        run(against="originals", recipe=recipe)


# the command


def test_the_command(world, tmp_path):
    words = ["evaluate", str(world / "out"), "--tasks", str(world / "tasks" / "tasks.yaml"), "--against", "originals"]
    done = CliRunner().invoke(app, [*words, "--limit", "2", "--batch-size", "2"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert all(
        word in done.output for word in ("evaluation of out", "retention", "colours (accuracy)", "base", "100.0%")
    )
    written = json.loads((world / "out" / "evaluation.json").read_text())
    assert [result["n"] for result in written["tasks"]] == [2] * 4
    for name in ("evaluation.json", "evaluation.jsonl"):
        (world / "out" / name).unlink()
    words[3] = str(tmp_path / "no.yaml")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "there is no file of this name" in " ".join(done.output.split())


def test_the_command_in_a_process_of_its_own(world, tmp_path):
    words = ["evaluate", str(world / "out"), "--tasks", str(world / "tasks" / "tasks.yaml"), "--limit", "1"]
    command = [sys.executable, "-c", "import mmer; mmer.app()", *words, "--output", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "found.json").read_text())["tasks"]) == 4
    assert "pictures, auto: 100%" in done.stderr and not (world / "out" / "evaluation.json").exists()


@torch.no_grad()
def test_another_dtype_runs(run):
    found = run(dtype="bfloat16", limit=1, against="originals")
    assert found.settings["dtype"] == "bfloat16" and len(found.results) == 4
