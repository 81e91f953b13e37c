"""Scorers by value: rules by hand, CIDEr beside its formula, embeddings beside a loop."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from evaluation_mmer import scorers
from evaluation_mmer.embeddings import embed
from evaluation_mmer.tasks import Item

from .tiny_world import tokenizer


def item(*answers, choices=(), right=None):
    return Item("t", "w", (), "?", answers, choices, right)


NORMAL = {
    " The Dog. ": "dog",
    "two dogs!": "2 dogs",
    "dont know": "don't know",
    "isn't it": "isn't it",
    "2.50 dollars.": "2.50 dollars",
    "100,978": "100978",
    "red, green": "red green",
    "2:30 pm": "2:30 pm",
    "girl's t-shirt": "girl's t shirt",
    "A": "a",
    "$5 + 3": "5 3",
    "“quoted”": "quoted",
}


@pytest.mark.parametrize("text", NORMAL)
def test_normalise_by_hand(text):
    assert scorers.normalise(text) == NORMAL[text]


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_more(text):
    once = scorers.normalise(text)
    assert once == once.strip() and "  " not in once
    if not set(once.split()) & {"a", "an", "the"}:
        assert scorers.normalise(scorers.normalise(once)) == scorers.normalise(once)


def test_exact_match_is_with_any_answer():
    items = [item("a dog", "puppy"), item("Two"), item("cat")]
    assert scorers.exact_match(items, ["The puppy.", "2", "cats"]) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError):
        scorers.exact_match(items, ["dog"])


def test_choice_by_hand():
    items = [item(choices=("x", "y"), right=1), item(choices=("x", "y"), right=0)]
    assert scorers.choice(items, [1, 1]) == [1.0, 0.0]


def cider_d(known: list[list[str]], given: list[str]) -> list[float]:
    """CIDEr-D from its formula (Vedantam et al. 2015, equations 1 to 3 with clipping and length penalty σ = 6)."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for references, candidate in zip(known, given):
        total = 0.0
        for n in (1, 2, 3, 4):
            frequency = Counter(g for many in known for g in {g for text in many for g in grams(text, n)})

            def weigh(text, n=n, frequency=frequency):
                return {
                    g: c * (math.log(len(known)) - math.log(max(1, frequency[g]))) for g, c in grams(text, n).items()
                }

            ours = weigh(candidate)
            for reference in references:
                theirs = weigh(reference)
                length = math.sqrt(sum(v * v for v in ours.values())) * math.sqrt(sum(v * v for v in theirs.values()))
                product = sum(min(v, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, v in ours.items())
                # the challenge's code measures length in pairs of words
                apart = max(len(candidate.split()) - 1, 0) - max(len(reference.split()) - 1, 0)
                total += (product / length if length else 0.0) * math.exp(-(apart**2) / (2 * 36)) / len(references)
        scores.append(10 * total / 4)
    return scores


KNOWN = [["a red dog runs fast", "the dog runs"], ["a green cat sleeps"], ["birds fly over 2 red houses now"]]
GIVEN = ["red dog runs home fast", "green cat sleeps", "nothing at all"]


def test_cider_beside_its_formula():
    pytest.importorskip("pycocoevalcap")
    items = [item(*many) for many in KNOWN]
    got = scorers.caption(items, GIVEN)
    want = cider_d([[scorers.normalise(one) for one in many] for many in KNOWN], [scorers.normalise(g) for g in GIVEN])
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert got[1] > got[0] > 0 == got[2]


def test_what_the_caption_scorer_refuses(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ValueError, match=r"needs pycocoevalcap: pip install mmer\[evaluate\]"):
        scorers.caption([item("x")] * 2, ["x", "y"])


def test_captions_of_one_item(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(ValueError, match="found 1 item, expected two or more"):
        scorers.caption([item("x")], ["x"])


# similarity


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    own = tokenizer()
    config = BertConfig(
        vocab_size=len(own), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.5, pad_token_id=own.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    own.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    parts = ["Transformer", "Pooling", "Normalize"]
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{p}"} for p in parts]))
    return folder


def test_embeddings_beside_a_loop(encoder):
    texts = ["red dog", "a green cat and the blue dog ?", "red", "what is this"]
    got = embed(texts, str(encoder), batch_size=3)
    model, own = BertModel.from_pretrained(encoder).eval(), tokenizer()
    for text, vector in zip(texts, got):
        ids = torch.tensor([own(text)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        mean = sum(states[place] for place in range(len(states))) / len(states)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_similarity_is_the_best_cosine(encoder):
    items = [item("red dog", "green cat"), item("blue")]
    got = scorers.similarity(items, ["green cat", "red"], str(encoder))
    blue, red = embed(["blue", "red"], str(encoder))
    assert got == pytest.approx([1.0, float(blue @ red)], abs=1e-5) and got[1] < 0.999


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, r"found \['pooling_mode_cls_token'\], expected"),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "found cls, expected the mean"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], r"found \['Dense'\]"),
    ],
)  # fmt: skip
def test_another_way_of_pooling_is_refused(encoder, file, values, message):
    before = (encoder / file).read_text()
    (encoder / file).write_text(json.dumps(values))
    try:
        with pytest.raises(ValueError, match=message):
            embed(["red"], str(encoder))
    finally:
        (encoder / file).write_text(before)
