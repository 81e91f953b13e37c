"""The demo's pieces; the whole of it is run by test_readme.py."""

from pathlib import Path

from evaluation_mmer.demo import Clock, conversations, recipe, samples, spans
from evaluation_mmer.lab.datasets import ANSWERS
from merging_mmer import Recipe


def test_spans_by_hand():
    names = ["base", "merged", "image", "audio"]
    assert spans([1, 1, 2, 2, 2, 1], [0, 0, 1, 1, 1, 0], names) == "text 2 → merged, image 3 → image, text 1 → merged"
    assert spans([3, 3], [3, 3], names) == "audio 2 → audio"
    # two spans of one kind that take different routes are two spans
    assert spans([0, 1], [0, 0], names) == "text 1 → base, text 1 → merged"


def test_samples_are_there_with_answers_that_the_experts_know():
    found = samples()
    assert set(found) == {"image", "audio"}
    for modality, entries in found.items():
        assert len(entries) >= 5
        for entry in entries:
            assert Path(entry["file"]).is_file() and entry["answer"] in ANSWERS[modality]


def test_conversations_ask_about_each_and_both():
    kinds = [[block["type"] for block in chat[0]["content"]] for _, chat, _ in conversations()]
    assert kinds == [["image", "text"], ["audio", "text"], *[["audio", "image", "text"]] * 2, ["text"]]


def test_the_recipe_is_one():
    class Expert:
        lora, tower = Path("lora"), Path("tower")

    made = Recipe.from_dict(recipe(Path("base"), {"image": Expert(), "audio": Expert()}))
    assert made.decoupling.kind == "mask" and list(made.experts) == ["image", "audio"]


def test_clock_counts_what_fails_too():
    clock = Clock()
    try:
        with clock.step("broken"):
            raise KeyError
    except KeyError:
        assert clock.seconds["broken"] >= 0
