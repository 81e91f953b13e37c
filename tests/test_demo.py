"""The demo's pieces; the whole of it is run by test_readme.py."""

from pathlib import Path

from evaluation_mmer.demo import EXPERTS, Clock, conversations, recipe, samples, spans
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
    assert set(found) == set(EXPERTS)
    for expert, entries in found.items():
        assert len(entries) >= 5
        for entry in entries:
            assert Path(entry["file"]).is_file() and entry["answer"] in ANSWERS[expert]


def test_conversations_ask_about_each_and_all_and_both_tasks():
    asked = [(chat[0]["content"], route) for _, chat, route in conversations()]
    kinds = [[block["type"] for block in blocks] for blocks, _ in asked]
    each = ["image", "audio", "video", "point_cloud"]
    together = [[*(other for other in each if other != kind), kind, "text"] for kind in each]
    assert kinds == [*[[kind, "text"] for kind in each], *together, *[["image", "text"]] * 2, ["text"]]
    assert [route for blocks, route in asked if len(blocks) == 5] == each
    digit, forgotten = (blocks[0] for blocks, _ in asked[8:10])
    assert digit["expert"] == forgotten["expert"] == "digits" and forgotten["path"] == asked[0][0][0]["path"]


def test_the_recipe_is_one():
    class Expert:
        lora, tower, modality = Path("lora"), Path("tower"), "image"

    made = Recipe.from_dict(recipe(Path("base"), {"image": Expert(), "digits": Expert()}))
    assert made.decoupling.kind == "mask" and list(made.experts) == ["image", "digits"]
    assert made.default_experts == {"image": "image"}


def test_clock_counts_what_fails_too():
    clock = Clock()
    try:
        with clock.step("broken"):
            raise KeyError
    except KeyError:
        assert clock.seconds["broken"] >= 0
