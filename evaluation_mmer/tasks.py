"""Tasks: what a model is asked, and how its answers are scored.

Enters: a YAML file with a list of tasks, and for each its rows, a JSONL file beside it or a dataset of the `datasets`
library. Leaves: `Task`s, and `Item`s with their media, the words of the user's turn, the known answers and choices.
Invariant: what is loaded can be asked and scored: media are there, answers or choices are what the scorer needs;
anything else raises ValueError that names file and line.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError, model_validator

from configuration_mmer.route_names_mmer import AUTO, MODALITIES

from .datasets_source import DatasetSource, dataset_rows
from .media_sources import Medium, media_of

Modality = Literal["image", "video", "audio", "point_cloud"]
Scorer = Literal["exact_match", "choice", "caption", "similarity"]
# what the Hub calls a task with these media; any other mixture is any-to-any
TYPES = {
    (): "text-generation",
    ("image",): "image-text-to-text",
    ("video",): "video-text-to-text",
    ("audio",): "audio-text-to-text",
}
_MOST_BYTES, _SHOWN = 1 << 20, 80
_WORDS = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Task(BaseModel):
    """One task.

    data: a JSONL file, relative to the tasks' own, or `{dataset: id or folder, config:, split:, revision:}`.
    media: modality -> column; columns called as the modalities where it is absent. question, answers, choices:
    columns; choices may also be the list itself. template: the words of the user's turn, in Jinja, from a row's
    columns. scorer: see scorers.py. expert: who encodes the media, where not the default ones. route: the text's, as
    `text_route`. delimiter: what stands between prompt and choice (see likelihood.py). embedding: the model of
    `similarity`. type, dataset_name, dataset_type: what the model card says of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,80}$")]
    data: Annotated[str, StringConstraints(min_length=1)] | DatasetSource
    media: dict[Modality, str] | None = None
    question: str = "question"
    answers: str = "answers"
    choices: str | Annotated[list[str], Field(min_length=2)] = "choices"
    template: str | None = None
    scorer: Scorer = "exact_match"
    expert: str | None = None
    route: str = AUTO
    max_new_tokens: int = Field(default=32, ge=1, le=1 << 16)
    delimiter: str | None = None
    embedding: str = "sentence-transformers/all-MiniLM-L6-v2"
    type: str | None = None
    dataset_name: str | None = None
    dataset_type: str | None = None
    _where: str = PrivateAttr("tasks")
    _folder: Path = PrivateAttr(Path("."))

    @model_validator(mode="after")
    def _template_reads(self):
        try:
            _WORDS.from_string(self.template or "")
        except jinja2.TemplateError as error:
            raise ValueError(
                f"template: found {_short(self.template)}, which is no Jinja template: {error}"
            ) from error
        return self

    @property
    def where(self) -> str:
        """File and line of the task, for messages."""
        return self._where

    @property
    def source(self) -> str:
        """Where its rows are, for messages."""
        return str(self._folder / self.data) if isinstance(self.data, str) else self.data.named

    @property
    def source_name(self) -> str:
        """A Hub id as it is; of files and folders their names alone."""
        if isinstance(self.data, str):
            return Path(self.data).stem
        local = (self._folder / self.data.dataset).is_dir()
        return Path(self.data.dataset).name if local else self.data.dataset

    def placed(self, where: str, folder: Path) -> "Task":
        self._where, self._folder = where, folder
        return self

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file and line, row), in order."""
        if isinstance(self.data, DatasetSource):
            return dataset_rows(self.data, self._folder, self.where)
        return jsonl_rows(self._folder / self.data, self.where)

    @property
    def media_folder(self) -> Path:
        """What paths in the rows are relative to."""
        return (self._folder / self.data).parent if isinstance(self.data, str) else self._folder


@dataclass(frozen=True)
class Item:
    """One question. right: the place of the right choice; None where there are no choices."""

    task: str
    where: str
    media: tuple[Medium, ...]
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    right: int | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(medium.modality for medium in self.media)

    @cached_property
    def digest(self) -> str:
        """sha256 of all that the model is asked: media by their bytes, words and choices."""
        asked = [[(m.modality, m.digest) for m in self.media], self.text, self.choices]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a YAML file. Raises ValueError that lists every faulty field with its line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no file of this name, expected a YAML file with `tasks:`")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes, expected tasks of at most {_MOST_BYTES:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node, values = _parsed(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not readable as YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict) or set(values) != {"tasks"} or not isinstance(values["tasks"], list):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: found {found}, expected a mapping `tasks` alone, with a list of tasks")
    if not values["tasks"]:
        raise ValueError(f"{path}: `tasks` is empty, expected at least one task")
    made, faults = [], []
    for place, entry in enumerate(values["tasks"]):
        try:
            task = Task.model_validate(entry)
        except ValidationError as error:
            faults += [_fault(path, node, ("tasks", place), fault) for fault in error.errors()]
            continue
        made.append(task.placed(f"{path}:{_line(node, ('tasks', place))}", path.parent))
    names = [task.name for task in made]
    faults += [f"{task.where}: the name {task.name!r} is there twice" for task in made if names.count(task.name) > 1]
    if faults:
        raise ValueError("\n".join(faults))
    return made


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it has aliases (*name), expected every value written out")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting = [] if node is None else [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, yaml.MappingNode):
            keys = [key.value for key, _ in one.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{twice!r} is given twice at {one.start_mark}")
            waiting += [value for _, value in one.value]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value
    return node, yaml.safe_load(text)


def _line(node: yaml.Node | None, place: tuple[Any, ...]) -> int:
    """The line of what lies at `place`, or of the innermost that is there."""
    for part in place:
        inner = None
        if isinstance(node, yaml.MappingNode):
            inner = next((value for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            inner = node.value[part]
        if inner is None:
            break
        node = inner
    return 0 if node is None else node.start_mark.line + 1


def _fault(path: Path, node: yaml.Node | None, above: tuple[Any, ...], fault: Any) -> str:
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown field, expected some of {sorted(Task.model_fields)}"
    elif fault["type"] not in ("missing", "value_error"):
        message += f" (found {_short(fault['input'])})"
    return f"{path}:{_line(node, (*above, *fault['loc']))}: {f'{field}: ' if field else ''}{message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def jsonl_rows(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{where}: data: there is no file {path}, expected a JSONL file, relative to the tasks' own")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not readable as JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: found {_short(row)}, expected a JSON object, one on each line")
            yield f"{path}:{number}", row


def load_items(task: Task, limit: int | None = None) -> list[Item]:
    """The first `limit` (or all) items of a task. Raises ValueError that names file and line."""
    items: list[Item] = []
    for where, row in task.rows():
        if limit is not None and len(items) == limit:
            break
        items.append(_item(task, where, row))
    if not items:
        raise ValueError(f"{task.where}: data: {task.source} has no rows, expected at least one")
    return items


def _item(task: Task, where: str, row: dict[str, Any]) -> Item:
    media = tuple(media_of(row, task.media or dict(zip(MODALITIES, MODALITIES)), task.media_folder, where, task.media))
    try:
        text = _column(row, task.question, where) if task.template is None else _rendered(task.template, row, where)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: template of task {task.name!r}: {error}. The row has {sorted(row)}") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {task.question}: found {_short(text)}, expected the words of a question")
    if task.scorer != "choice":
        return Item(task.name, where, media, text, _answers(task, row, where))
    choices = _choices(task, row, where)
    return Item(task.name, where, media, text, (), choices, _right(task, row, where, choices))


def _rendered(template: str, row: dict[str, Any], where: str) -> str:
    return _WORDS.from_string(template).render(**{str(name): value for name, value in row.items()})


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: has no {name!r}, only {sorted(row)}; a task's fields say what a column is called")
    return row[name]


def _words(values: Any) -> list[str]:
    values = values if isinstance(values, list | tuple) else [values]
    plain = [value for value in values if isinstance(value, str | int | float) and not isinstance(value, bool)]
    return [str(value) for value in plain] if len(plain) == len(values) else []


def _answers(task: Task, row: dict[str, Any], where: str) -> tuple[str, ...]:
    given = _column(row, task.answers, where)
    answers = _words(given)
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: {task.answers}: found {_short(given)}, expected one answer or a list of them")
    return tuple(answers)


def _choices(task: Task, row: dict[str, Any], where: str) -> tuple[str, ...]:
    given = task.choices if isinstance(task.choices, list) else _column(row, task.choices, where)
    choices = _words(given)
    alike = len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices)
    if len(choices) < 2 or alike:
        raise ValueError(f"{where}: choices: found {_short(given)}, expected two or more that differ")
    return tuple(choices)


def _right(task: Task, row: dict[str, Any], where: str, choices: tuple[str, ...]) -> int:
    """The place of the right choice; a row gives its words, or its place as a whole number from 0."""
    given = _column(row, task.answers, where)
    one = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(one, int) and not isinstance(one, bool) and str(one) not in choices:
        if 0 <= one < len(choices):
            return one
    elif isinstance(one, str | int | float) and str(one) in choices:
        return choices.index(str(one))
    raise ValueError(
        f"{where}: {task.answers}: found {_short(given)}, expected the one right choice of {list(choices)}, or its "
        "place from 0"
    )


def task_type(task: Task, items: list[Item]) -> str:
    """The Hub's word for a task, by the media of its items."""
    kinds = {kind for item in items for kind in item.modalities}
    return task.type or TYPES.get(tuple(sorted(kinds)), "any-to-any")


__all__ = ["Item", "Medium", "Task", "load_items", "load_tasks", "task_type"]
