"""Likelihoods of choices, beside a slow re-statement: one choice at a time, token by token, nothing padded."""

import pytest
import torch

from evaluation_mmer.likelihood import best, choice_tokens, delimiter_of, likelihoods
from evaluation_mmer.originals import Originals
from evaluation_mmer.subjects import MergedSubject
from evaluation_mmer.tasks import load_items, load_tasks
from merging_mmer.stored import open_folder, read_processor
from modeling_mmer import MMERForConditionalGeneration

from . import tiny_tasks as tiny
from .tiny_processors import make_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny.merged_world(tmp_path_factory.mktemp("likelihood"))
    merged = open_folder(folder / "out")
    tasks = {task.name: task for task in load_tasks(folder / "tasks" / "tasks.yaml")}
    model = MMERForConditionalGeneration.from_pretrained(folder / "out")
    return {"tasks": tasks, "merged": merged, "model": model, "processor": read_processor(merged)}


def slow(model, inputs: dict, ids: list[int]) -> tuple[float, int]:
    """log p of `ids` behind one prompt, by a whole forward for each token."""
    total, inputs = 0.0, dict(inputs)
    for token in ids:
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, -1))
        new = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0, "route_ids": None}
        for name, value in new.items():
            if name in inputs:
                one = inputs["text_route"][0] if value is None else value
                inputs[name] = torch.cat([inputs[name], torch.full((1, 1), int(one))], 1)
    return total, len(ids)


@pytest.mark.parametrize("route", ["auto", "merged"])
@pytest.mark.parametrize("name", ["colours", "sounds"])
def test_of_the_merged_model(world, name, route):
    task, model = world["tasks"][name], world["model"]
    subject = MergedSubject(model, world["processor"], task, route)
    items = load_items(task, 3)
    pairs = [(item, choice) for item in items for choice in item.choices]
    got = likelihoods(subject, pairs)
    vocabulary = world["processor"].tokenizer.get_vocab()
    for (item, choice), (total, tokens) in zip(pairs, got, strict=True):
        inputs = {key: value for key, value in subject.inputs([item]).items()}
        want, count = slow(model, inputs, [vocabulary[word] for word in choice.split()])
        assert tokens == count and total == pytest.approx(want, abs=2e-4)
    # one by one is what they are together
    for pair, (total, _) in zip(pairs, got, strict=True):
        assert likelihoods(subject, [pair])[0][0] == pytest.approx(total, abs=2e-4)


def test_of_an_original(world):
    task = world["tasks"]["colours"]
    originals = Originals(world["merged"].recipe, world["processor"])
    originals.open(["image"])
    subject = originals.load("image", torch.float32, "cpu")
    items = load_items(task, 2)
    pairs = [(item, choice) for item in items for choice in item.choices]
    vocabulary = subject.tokenizer.get_vocab()
    for (item, choice), (total, tokens) in zip(pairs, likelihoods(subject, pairs), strict=True):
        want = slow(subject.model, subject.inputs([item]), [vocabulary[word] for word in choice.split()])
        assert (total, tokens) == (pytest.approx(want[0], abs=2e-4), want[1])


def test_suppressed_tokens_are_nobodys_choice(world):
    """As in generation: they take no part in the probabilities."""
    task, model = world["tasks"]["colours"], world["model"]
    subject = MergedSubject(model, world["processor"], task, "auto")
    (item,) = load_items(task, 1)
    red = world["processor"].tokenizer.convert_tokens_to_ids("red")
    plain = likelihoods(subject, [(item, "green")])[0][0]
    odds = torch.tensor(likelihoods(subject, [(item, "red")])[0][0]).exp()
    model.generation_config.suppress_tokens = [red]
    try:
        got = likelihoods(subject, [(item, "green")])[0][0]
    finally:
        model.generation_config.suppress_tokens = None
    assert got == pytest.approx(plain - float(torch.log1p(-odds)), abs=2e-4)


def test_the_best_choice_is_by_its_mean():
    assert best([(-3.0, 1), (-4.0, 2), (-9.0, 4)]) == 1
    assert best([(-2.0, 1), (-4.0, 2)]) == 0  # alike: the first


def test_what_stands_between_prompt_and_answer():
    assert [delimiter_of(text, ["</s>"]) for text in ("USER: hi ASSISTANT:", "assistant\n", "hi</s>", "")] == [
        " ", "", "", "",
    ]  # fmt: skip


class Reader:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def reader(self, item):
        return self.tokenizer


def test_the_tokens_of_a_choice_are_those_of_the_whole_text():
    own = make_tokenizer()
    read = lambda text: own(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    got = choice_tokens(Reader(own), None, "ASSISTANT:", "a dog")
    assert read("ASSISTANT:") + got == read("ASSISTANT: a dog") and own.decode(got) == " a dog"
    assert choice_tokens(Reader(own), None, "<|im_start|>assistant\n", "cups") == read("cups")
    # where the end of the prompt would be read otherwise, the choice is read alone
    together, alone = read("ASSISTANT"), read("ASSIST")
    assert together[: len(alone)] != alone, "the tokenizer joins the two"
    assert choice_tokens(Reader(own), None, "ASSIST", "ANT", "") == read("ANT")


def test_a_choice_of_no_tokens():
    class Mute:
        all_special_tokens = ()

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1] if text else []}

    class Where:
        where = "rows.jsonl:3"

    class Deaf(Mute):
        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="rows.jsonl:3: the choice 'x' has no tokens"):
        choice_tokens(Reader(Deaf()), Where(), "a prompt", "x")
    assert choice_tokens(Reader(Mute()), Where(), "", "x") == [1]
