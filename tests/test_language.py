"""The benchmark of the base's language: what it asks, perplexity by hand, and that it ends where the base changed."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_mmer.tasks import load_items, load_tasks

from . import tiny_tasks as tiny

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import language  # noqa: E402
import language_tasks  # noqa: E402

COUNTS = "cat%1:05:00:: 1 18\nrun%2:38:00:: 1 106\nbank%1:17:01:: 1 20\nbank%1:14:00:: 2 25\nzebu%1:05:00:: 1 2\n"
INDEX = """  1 the licence
bank n 2 1 @ 2 2 00000300 00000200
cat n 1 1 @ 1 1 00000100
zebu n 1 1 @ 1 0 00000400
"""
DATA = """  1 the licence
00000100 05 n 01 cat 0 001 @ 00000001 n 0000 | feline mammal; with fur; "the cat sat on the mat"; "cats purr"
00000200 14 n 01 bank 0 001 @ 00000001 n 0000 | a financial institution
00000300 17 n 01 bank 0 001 @ 00000001 n 0000 | sloping land; "they pulled the canoe up on the bank"
00000400 05 n 01 zebu 0 001 @ 00000001 n 0000 | domesticated ox
"""
CITIES = [
    {"name": f"Land {place}", "capital": f"City {place}", "region": "East" if place < 5 else "West", "population": p}
    for place, p in enumerate([6e6, 7e6, 8e6, 9e6, 4e6, 6e6])
]


def test_wordnet_is_read_by_its_first_senses():
    assert language_tasks.parse_nouns(COUNTS, INDEX, DATA) == [
        {"noun": "bank", "gloss": "sloping land", "example": "they pulled the canoe up on the bank"},
        {"noun": "cat", "gloss": "feline mammal", "example": "the cat sat on the mat"},
    ]


def test_capitals_have_wrong_ones_of_their_region_where_there_are_enough():
    rows = {row["answers"]: row for row in language_tasks.capital_rows(CITIES)}
    assert set(rows) == {"City 0", "City 1", "City 2", "City 3", "City 5"}  # Land 4 is too small
    for city in ("City 0", "City 1", "City 2", "City 3"):
        assert set(rows[city]["choices"]) == {"City 0", "City 1", "City 2", "City 3"}
    assert len(set(rows["City 5"]["choices"])) == 4 and "City 4" not in rows["City 5"]["choices"]
    assert rows["City 5"]["question"] == "What is the capital of Land 5?"
    assert language_tasks.capital_rows(CITIES) == list(rows.values())  # by a seed of its own


def test_a_definition_that_names_its_word_is_left_out():
    found = [{"noun": f"word{i}", "gloss": f"meaning {i}", "example": ""} for i in range(5)]
    found.append({"noun": "cat", "gloss": "a kind of Cat", "example": ""})
    rows = language_tasks.definition_rows(found)
    assert {row["answers"] for row in rows} == {f"word{i}" for i in range(5)}
    assert all(row["answers"] in row["choices"] and len(set(row["choices"])) == 4 for row in rows)


def test_bigbench_questions_with_two_right_answers_are_left_out():
    examples = [
        {"input": "How many?", "target_scores": {"two": 0, "four": 1}},
        {"input": "Which?", "target_scores": {"a": 1, "b": 1, "c": 0}},
    ]
    assert language_tasks.bigbench_rows(examples) == [
        {"question": "How many?", "choices": ["two", "four"], "answers": "four"}
    ]


def test_the_tasks_are_those_of_mmer_evaluate(tmp_path, monkeypatch):
    nouns = [{"noun": f"word{i}", "gloss": f"meaning {i}", "example": ""} for i in range(6)]
    monkeypatch.setattr(language_tasks, "countries", lambda cache: CITIES)
    monkeypatch.setattr(language_tasks, "nouns", lambda cache: nouns)
    tasks = load_tasks(language_tasks.write_tasks(tmp_path, items=3))
    assert [(task.name, task.scorer, len(load_items(task))) for task in tasks] == [
        ("capitals", "choice", 3),
        ("definitions", "choice", 3),
    ]


def test_likelihoods_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [5.0, -5.0]]])
    # of the second token 3 in 4, of the third 4 in 5; what follows the last is asked of nobody
    assert language.negative_log_likelihood(logits, torch.tensor([[0, 1, 0]])) == pytest.approx(-math.log(0.75 * 0.8))


TEXTS = ["the cat sat on the mat", "what do you see here"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.merged_world(tmp_path_factory.mktemp("language"))


def test_perplexity_of_the_base_route_is_the_base_s(world):
    found = language.perplexities(world / "out", world / "base", TEXTS, ["base", "merged"])
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    total, tokens = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            chances = model(ids).logits[0].softmax(-1)
        for place in range(1, ids.shape[1]):
            total -= math.log(chances[place - 1, ids[0, place]])
            tokens += 1
    assert found["base"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["merged"] != pytest.approx(found["base"], rel=1e-6)


def test_a_base_that_changed_by_one_bit_ends_the_run(world, tmp_path):
    folder = Path(shutil.copytree(world / "out", tmp_path / "out"))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "language_model" in name)
    tensors[name][0, 0] += 0.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SystemExit, match="differs from the base in"):
        language.perplexities(folder, world / "base", TEXTS, ["base"])


def test_questions_are_asked_on_every_route(world, tmp_path):
    task = {"question": "what do you see", "choices": ["the cat", "the mat", "here"], "answers": "here"}
    (tmp_path / "choices.jsonl").write_text(f"{json.dumps(task)}\n" * 2)
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks:\n- {name: choices, data: choices.jsonl, scorer: choice}\n")
    rows = language.answered(world / "out", tasks, ["base", "merged", "image"], tmp_path)
    assert [(row["route"], row["n"]) for row in rows] == [("base", 2), ("merged", 2), ("image", 2)]
    assert rows[0]["change"] == 0
    shown = language.markdown(
        [*rows, *({"task": "perplexity", "route": r["route"], "n": 3, "value": 9.5} for r in rows)]
    )
    assert shown.splitlines()[0] == "| route | choices (n = 2) | perplexity (n = 3) |"
    assert shown.splitlines()[2].startswith("| base | ") and shown.splitlines()[2].endswith("| 9.50 |")
