"""What a model answered, kept item by item, so that a run that was killed goes on.

Enters: a subject, a task's items, and a journal. Leaves: `Answer`s in the items' order. A line of the journal belongs
to a key: a hash of the model's files, of what the task and the run are set to, and of the libraries' versions.
Invariant: an answer is taken from the journal only for the same key and the same item, media included; a line that
was cut off does not count.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .likelihood import best, likelihoods
from .subjects import Subject
from .tasks import Item, Task


@dataclass(frozen=True)
class Answer:
    """words: what was written, or the choice that was most likely; place: that choice's.

    likelihoods: of each choice the sum of its tokens' log-probabilities and their number.
    """

    words: str
    place: int | None = None
    likelihoods: tuple[tuple[float, int], ...] = ()


class AnswerJournal:
    """A JSONL file of {"key", "item", "words", …}. Only lines of `keys` are kept when it is opened."""

    def __init__(self, path: Path, keys: Collection[str], fresh: bool = False):
        self.path = path
        self.known: dict[tuple[str, str], Answer] = {}
        self._file: IO[bytes] | None = None
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() and not fresh else []
        for line in lines:
            entry = _entry(line)
            if entry is not None and entry["key"] in keys:
                self.known[entry["key"], entry["item"]] = _answer(entry)

    def __enter__(self) -> "AnswerJournal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.fresh")
        with fresh.open("wb") as file:
            for (key, item), answer in self.known.items():
                file.write(_line(key, item, answer))
        fresh.replace(self.path)
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object):
        if self._file is not None:
            self._file.close()

    def add(self, key: str, item: str, answer: Answer):
        assert self._file is not None
        self._file.write(_line(key, item, answer))
        self.known[key, item] = answer


def _line(key: str, item: str, answer: Answer) -> bytes:
    return json.dumps({"key": key, "item": item, **asdict(answer)}).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and {"key", "item", "words", "place", "likelihoods"} <= set(entry)
    return entry if whole else None


def _answer(entry: dict[str, Any]) -> Answer:
    pairs = tuple((float(total), int(tokens)) for total, tokens in entry["likelihoods"])
    return Answer(entry["words"], entry["place"], pairs)


def ask(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    journal: AnswerJournal,
    key: str,
    batch_size: int,
    progress: Callable[[int], object] = bool,
) -> list[Answer]:
    """The answers to all items, those in the journal without asking. `progress` is told of each batch's items."""
    for batch in batches(list({item.digest: item for item in items}.values()), batch_size):
        # a batch is asked whole, also where a kill left some of it: what an item gets does not depend on when
        if any((key, item.digest) not in journal.known for item in batch):
            answer = _choose if task.scorer == "choice" else _write
            for item, one in zip(batch, answer(subject, task, batch, batch_size), strict=True):
                journal.add(key, item.digest, one)
        progress(len(batch))
    return [journal.known[key, item.digest] for item in items]


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items with the same kinds of media together, by length: little padding, one way through the processor."""
    order = sorted(range(len(items)), key=lambda place: (items[place].modalities, len(items[place].text), place))
    batch: list[Item] = []
    for place in order:
        if batch and (len(batch) == size or batch[0].modalities != items[place].modalities):
            yield batch
            batch = []
        batch.append(items[place])
    if batch:
        yield batch


def _write(subject: Subject, task: Task, items: list[Item], batch_size: int) -> list[Answer]:
    inputs = subject.inputs(items)
    with torch.inference_mode():
        tokens = subject.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=task.max_new_tokens,
            pad_token_id=subject.tokenizer.pad_token_id,
        )
    return [Answer(words) for words in subject.decode(tokens[:, inputs["input_ids"].shape[1] :])]


def _choose(subject: Subject, task: Task, items: list[Item], batch_size: int) -> list[Answer]:
    pairs = [(item, choice) for item in items for choice in item.choices]
    found: list[tuple[float, int]] = []
    for start in range(0, len(pairs), batch_size):
        found += likelihoods(subject, pairs[start : start + batch_size], task.delimiter)
    answers = []
    for item in items:
        scores, found = found[: len(item.choices)], found[len(item.choices) :]
        answers.append(Answer(item.choices[best(scores)], best(scores), tuple(scores)))
    return answers


__all__ = ["Answer", "AnswerJournal", "ask", "batches"]
