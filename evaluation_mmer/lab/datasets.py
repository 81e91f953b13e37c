"""The experts' questions: `load_items("image" | "audio" | "digits" | "video" | "point_cloud", split)` gives LabItems.

A LabItem is the media (a PIL picture, float32 samples at 16 kHz, frames (8, 56, 56, 3) uint8, or points (N, 3)), the
question and the one right answer. They come in the order that a seed gives; the splits are train, validation and test.
`score` says whether an answer is right.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from . import clips, digits, fashion, furniture, speech
from .cache import Progress, say

QUESTIONS = {
    "image": "What clothing item is shown?",
    "audio": "What word is spoken?",
    "digits": "What digit is shown?",
    "video": "How does it move?",
    "point_cloud": "What object is this?",
}
ANSWERS = {
    "image": fashion.CLASSES,
    "audio": speech.WORDS,
    "digits": digits.CLASSES,
    "video": clips.MOVEMENTS,
    "point_cloud": furniture.CLASSES,
}
SOURCES: dict[str, Callable[..., Sequence[tuple[Any, str]]]] = {
    "image": fashion.pictures,
    "audio": speech.clips,
    "digits": digits.pictures,
    "video": clips.clips,
    "point_cloud": furniture.clouds,
}
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
    pairs = SOURCES[name](split, cache, progress)
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    if n is not None and n > len(order):
        raise ValueError(f"{n} items asked for, but the {split} split of {name} has {len(order)}")
    chosen = (pairs[index] for index in order[:n])
    return [LabItem(as_media(name, media), QUESTIONS[name], answer) for media, answer in chosen]


def as_media(name: str, media: Any) -> Any:
    return Image.fromarray(media).convert("RGB") if name in ("image", "digits") else media


def normalise(text: str) -> str:
    return " ".join(text.strip().lower().strip(".!? \n").split())


def score(prediction: str, answer: str) -> bool:
    """Exact match, whatever the case, the spaces around and a full stop."""
    return normalise(prediction) == normalise(answer)
