"""EleutherAI's lm-eval and lmms-eval take a merged folder: the first as it is, the second by our plugin."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from . import tiny_tasks as tiny

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["what is this", "describe the sound", "red dog and blue cat ?", "is a word spoken"]
CHOICES = ["red", "green cat", "blue"]
TASK = """\
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny.merged_world(tmp_path_factory.mktemp("harness"))
    rows = [{"question": q, "choices": CHOICES, "label": n % 3} for n, q in enumerate(QUESTIONS)]
    path = tiny.write_rows(folder / "harness" / "words.jsonl", rows)
    (folder / "harness" / "local_words.yaml").write_text(TASK.format(rows=path))
    return folder


def start(world, *command: str, **environment) -> None:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    known |= {"HF_HOME": str(world / "hub"), **environment}
    done = subprocess.run([sys.executable, *command], cwd=world, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def results_of(folder: Path) -> dict:
    (path,) = folder.rglob("*results*.json")
    return json.loads(path.read_text())["results"]


@torch.no_grad()
def base_accuracy(world) -> float:
    """The base alone, each choice token by token."""
    model, words = (
        AutoModelForCausalLM.from_pretrained(world / "base").eval(),
        AutoTokenizer.from_pretrained(world / "base"),
    )
    right = 0
    for number, question in enumerate(QUESTIONS):
        scores = []
        for choice in CHOICES:
            ids, total = words(question, add_special_tokens=False)["input_ids"], 0.0
            for token in words(choice, add_special_tokens=False)["input_ids"]:
                total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids = [*ids, token]
            scores.append(total)
        assert len({math.floor(score * 100) for score in scores}) == len(scores), "no two alike"
        right += scores.index(max(scores)) == number % 3
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_lm_eval_as_it_is(world):
    """One text task on local data, through the Auto classes and the folder's own code: the base's answers."""
    pytest.importorskip("lm_eval")
    start(
        world, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=out,trust_remote_code=True,dtype=float32",
        "--tasks", "local_words", "--include_path", "harness", "--device", "cpu", "--batch_size", "2",
        "--output_path", "lm-eval-results",
    )  # fmt: skip
    assert results_of(world / "lm-eval-results")["local_words"]["acc,none"] == pytest.approx(base_accuracy(world))


LMMS_TASK = """\
task: local_pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function visuals.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
VISUALS = """\
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
ENTRY_POINT = "[lmms_eval.models]\nmmer = evaluation_mmer.lmms_plugin:MANIFEST\n"


def picture_answers(world) -> list[str]:
    """What the merged folder answers, picture by picture, as its README says."""
    model = AutoModel.from_pretrained(world / "out", trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(world / "out", trust_remote_code=True)
    found = []
    for number, question in enumerate(QUESTIONS):
        medium = {"type": "image", "path": str(world / "tasks" / "media" / f"a{number}.png")}
        chat = [{"role": "user", "content": [medium, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.mark.slow
def test_lmms_eval_by_our_plugin(world):
    """One task of local pictures: the answers of the folder, each item alone."""
    pytest.importorskip("lmms_eval")
    answers = picture_answers(world)
    rows = [
        {"image": str(world / "tasks" / "media" / f"a{n}.png"), "question": q, "answer": answers[n] if n < 3 else "-"}
        for n, q in enumerate(QUESTIONS)
    ]
    folder = world / "lmms"
    path = tiny.write_rows(folder / "pictures.jsonl", rows)
    (folder / "local_pictures.yaml").write_text(LMMS_TASK.format(rows=path))
    (folder / "visuals.py").write_text(VISUALS)
    # what setup.cfg declares, for a checkout that was installed before
    (world / "site" / "mmer_entry-0.dist-info").mkdir(parents=True)
    (world / "site" / "mmer_entry-0.dist-info" / "METADATA").write_text("Name: mmer-entry\nVersion: 0\n")
    (world / "site" / "mmer_entry-0.dist-info" / "entry_points.txt").write_text(ENTRY_POINT)
    start(
        world, "-m", "lmms_eval", "--model", "mmer", "--model_args", "pretrained=out,dtype=float32", "--tasks",
        "local_pictures", "--include_path", "lmms", "--device", "cpu", "--batch_size", "3", "--log_samples",
        "--output_path", "lmms-results", PYTHONPATH=f"{ROOT}{os.pathsep}{world / 'site'}",
    )  # fmt: skip
    assert results_of(world / "lmms-results")["local_pictures"]["exact_match,none"] == pytest.approx(0.75)
    (samples,) = (world / "lmms-results").rglob("*samples*.jsonl")
    logged = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples.read_text().splitlines())}
    assert [logged[n] if isinstance(logged[n], str) else logged[n][0] for n in range(4)] == answers
