"""Scores of answers, without keys and without judges.

Enters: items and what a model answered. Leaves: one number an item, in the items' order; a task's value is their mean.
    exact_match   1 where an answer is one of the known ones after `normalise`, else 0
    choice        1 where the right choice has the highest likelihood (likelihood.py), else 0
    caption       CIDEr against the known captions, ten times a cosine: 0 … 10
    similarity    the highest cosine with a known answer, of sentence embeddings: -1 … 1
Invariant: a score depends on the items and answers alone; where it looks at all items (CIDEr's word frequencies), at
the known answers of all of them.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .tasks import Item, Task


@dataclass(frozen=True)
class Metric:
    """What the Hub calls it; `shares`: scores are 0 or 1."""

    type: str
    name: str
    shares: bool


METRICS = {
    "exact_match": Metric("exact_match", "exact match after normalisation", True),
    "choice": Metric("accuracy", "accuracy by the likelihood of each choice", True),
    "caption": Metric("cider", "CIDEr", False),
    "similarity": Metric("cosine_similarity", "cosine of sentence embeddings", False),
}

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't "
        "shouldn't wasn't weren't won't wouldn't couldn't've shouldn't've wouldn't've could've should've would've "
        "he's here's how's it'll let's she's that's there's they'd they'll they're they've we've what'll what're "
        "what's where's who's who've you'd you'll you're you've y'all i'm i've o'clock"
    ).split()
}


def normalise(text: str) -> str:
    """An answer as the VQA challenge compares it (Antol et al. 2015; rules at visualqa.org/evaluation.html):

    lower case; periods go, but those of decimals; number words up to ten are digits; articles go; contractions get
    their apostrophe; other punctuation, apart from apostrophes and colons, is a space, and goes between digits
    (100,978). Of an answer of nothing else (the article "a" as a letter) all is kept but case and spaces.
    """
    lowered = " ".join(text.lower().split())
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)", "", lowered)
    plain = re.sub(r"(?<=\d),(?=\d)", "", plain)
    kept = "".join(
        letter if letter in ".':" or unicodedata.category(letter)[0] not in "PS" else " " for letter in plain
    )
    words = [_CONTRACTIONS.get(word, _NUMBERS.get(word, word)) for word in kept.split() if word not in _ARTICLES]
    return " ".join(words) or lowered


def exact_match(items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    return [
        float(normalise(answer) in {normalise(known) for known in item.answers})
        for item, answer in zip(items, answers, strict=True)
    ]


def caption(items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    """CIDEr-D of pycocoevalcap, the COCO caption challenge's own code (Vedantam et al. 2015).

    Words are those of `normalise`: the challenge's tokenizer is a Java program, so values are near its own and not
    the same. Raises ValueError without the library, and for one item, whose words have no frequency.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ValueError(
            "scorer 'caption' needs pycocoevalcap: pip install mmer[evaluate], or take the scorer 'similarity'"
        ) from error
    if len(items) < 2:
        raise ValueError(
            f"scorer 'caption': found {len(items)} item, expected two or more: CIDEr weighs words by how many items "
            "have them"
        )
    known = {place: [normalise(one) for one in item.answers] for place, item in enumerate(items)}
    given = {place: [normalise(answer)] for place, answer in enumerate(answers)}
    _, scores = Cider().compute_score(known, given)
    return [float(score) for score in scores]


def similarity(items: Sequence[Item], answers: Sequence[str], source: str) -> list[float]:
    """source: the embedding model, a Hub id or a folder."""
    from .embeddings import embed

    words = list(dict.fromkeys([*answers, *(known for item in items for known in item.answers)]))
    vectors = dict(zip(words, embed(words, source), strict=True))
    return [
        max(float(np.dot(vectors[answer], vectors[known])) for known in item.answers)
        for item, answer in zip(items, answers, strict=True)
    ]


def choice(items: Sequence[Item], chosen: Sequence[int]) -> list[float]:
    return [float(item.right == place) for item, place in zip(items, chosen, strict=True)]


def written_scorer(task: Task) -> Callable[[Sequence[Item], Sequence[str]], list[float]]:
    """The scorer of a task whose answers are written, not chosen."""
    if task.scorer == "similarity":
        return lambda items, answers: similarity(items, answers, task.embedding)
    return {"exact_match": exact_match, "caption": caption}[task.scorer]


__all__ = ["METRICS", "Metric", "caption", "choice", "exact_match", "normalise", "similarity", "written_scorer"]
