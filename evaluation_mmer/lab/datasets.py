"""Questions about pictures and sounds: `load_items("image" | "audio", split)` gives LabItems in a seeded order.

A LabItem is the media (a PIL picture, or float32 samples at 16 kHz), the question and the one right answer. The splits
are train, validation and test; the test split holds 10,000 pictures, and 32 words by voices never heard in training.
`score` says whether an answer is right.
"""

import os
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from . import fashion, speech
from .cache import Progress, say

QUESTIONS = {"image": "What clothing item is shown?", "audio": "What word is spoken?"}
ANSWERS = {"image": fashion.CLASSES, "audio": speech.WORDS}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LabItem:
    media: Any
    question: str
    answer: str


def load_items(
    name: str,
    split: str,
    n: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = say,
) -> list[LabItem]:
    """The first `n` (or all) items of the split in the order that `seed` gives."""
    if name not in QUESTIONS or split not in SPLITS:
        raise ValueError(f"no items {name!r}, {split!r}; there are {', '.join(QUESTIONS)} with {', '.join(SPLITS)}")
    pairs: list[tuple[Any, str]]
    pairs = fashion.pictures(split, cache, progress) if name == "image" else speech.clips(split, cache, progress)
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    if n is not None and n > len(order):
        raise ValueError(f"{n} items asked for, but the {split} split of {name} has {len(order)}")
    chosen = (pairs[index] for index in order[:n])
    return [LabItem(as_media(name, media), QUESTIONS[name], answer) for media, answer in chosen]


def as_media(name: str, media: Any) -> Any:
    return Image.fromarray(media).convert("RGB") if name == "image" else media


def normalise(text: str) -> str:
    return " ".join(text.strip().lower().strip(".!? \n").split())


def score(prediction: str, answer: str) -> bool:
    """Exact match, whatever the case, the spaces around and a full stop."""
    return normalise(prediction) == normalise(answer)
