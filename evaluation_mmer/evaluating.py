"""`mmer evaluate`: tasks asked of a merged folder, and of the originals that it was made from.

Enters: the folder, a tasks file, what to compare with. Leaves: an `Evaluation`, evaluation.json, and beside it the
answers it rests on (evaluation.jsonl), from which a run that was killed goes on. Invariants: everything that can be
refused (tasks, media, routes, originals that are not at hand) is refused before a model is loaded; one model is in
memory at a time; merged model and original get the same items in the same batches, and decode greedily.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from configuration_mmer.routes_mmer import AUTO, ROUTE_NAMES
from merging_mmer.checkpoints import DTYPES
from merging_mmer.folder_checks import REPORT, MergedFolder
from merging_mmer.input_hashes import sha256
from merging_mmer.recipe import Recipe
from merging_mmer.stored import open_folder, read_processor
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from processing_mmer.processing_mmer import MMERProcessor

from .answers import Answer, AnswerJournal, ask
from .originals import BASE, Originals, settings_files
from .results import NAME, Evaluation, Result, compared, measured
from .scorers import METRICS, choice, written_scorer
from .subjects import MergedSubject, Subject, expert_of
from .tasks import Item, Task, load_items, load_tasks, task_type

_DTYPES = {"auto": "auto", **DTYPES}
ORIGINALS = "originals"
MERGED = ""  # among the names of those who are asked


@dataclass
class Question:
    """One task on one route.

    experts: all who encode media. expert: whose task it is, None where it is nobody's alone. original: the name of who
    is asked beside, None where nobody is to be.
    """

    task: Task
    route: str
    items: list[Item]
    experts: list[str]
    expert: str | None
    original: str | None
    answers: dict[str, list[Answer]] = field(default_factory=dict)


def evaluate(
    folder: str | Path,
    tasks: str | Path,
    against: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    route: Sequence[str] = (),
    output: str | Path | None = None,
    fresh: bool = False,
    recipe: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = True,
    finish: Callable[[Path], object] | None = None,
) -> Evaluation:
    """Ask the tasks of a YAML file of a merged folder, on the Hub or here, and write evaluation.json.

    against: "originals" asks each task of its original too: the expert whose media they are, the base where there are
    none. route: routes to ask on, in place of the tasks' own. output: the file to write, if not the folder's own.
    fresh: ask everything anew. recipe: where the originals are now, if not where the folder's recipe says. finish: is
    called with the folder when its own evaluation.json was written.
    Raises ValueError for tasks, routes, media and originals that do not fit, before anything is asked.
    """
    if against not in (None, ORIGINALS):
        raise ValueError(f"against is {against!r}, expected {ORIGINALS!r}, or nothing")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}: expected whole numbers of 1 or more")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(_DTYPES)}")
    listed = load_tasks(tasks)
    merged = open_folder(folder)
    if output is None and not Path(folder).expanduser().is_dir():
        raise ValueError(f"{folder} is no folder here, so nothing can be written into it: give output (--output)")
    target = merged.folder / NAME if output is None else Path(output)
    processor = read_processor(merged)
    questions = [
        _question(task, one, load_items(task, limit), processor, against is not None)
        for task in listed
        for one in dict.fromkeys(route or [task.route])
    ]
    originals = Originals(_recipe(merged, recipe), processor, trust_remote_code)
    named = list(dict.fromkeys(q.original for q in questions if q.original is not None))
    if named:
        originals.open(named)
    run = _Run(merged, processor, questions, originals, _DTYPES[dtype], device, batch_size, progress)
    keys = run.keys(named)
    with AnswerJournal(target.with_suffix(".jsonl"), set(keys.values()), fresh) as journal:
        run.ask_all(named, keys, journal)
    settings = {"dtype": dtype, "device": device, "batch_size": batch_size, "limit": limit, **_libraries()}
    model = {"name": merged.folder.resolve().name, "report_sha256": sha256(merged.folder / REPORT)}
    evaluation = Evaluation(model, settings, version("mmer"), [_result(q, originals) for q in questions])
    evaluation.write(target)
    if finish is not None and target.resolve() == (merged.folder / NAME).resolve():
        finish(merged.folder)
    return evaluation


def _recipe(merged: MergedFolder, given: str | Path | None) -> Recipe:
    return merged.recipe if given is None else Recipe.load(given)


def _libraries() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _question(task: Task, route: str, items: list[Item], processor: MMERProcessor, compare: bool) -> Question:
    names = list(processor.experts)
    where = task.where if route == task.route else "--route"
    if route not in (AUTO, *ROUTE_NAMES, *names):
        raise ValueError(f"{where}: route: found {route!r}, expected one of {[AUTO, *ROUTE_NAMES, *names]}")
    if task.expert is not None and task.expert not in names:
        raise ValueError(f"{task.where}: expert: found {task.expert!r}, expected one of {names}")
    experts = sorted({expert_of(task, kind, processor) for item in items for kind in item.modalities})
    asked = {*experts, route} & set(names)
    expert = asked.pop() if len(asked) == 1 else None
    original = BASE if not asked and expert is None and route in (AUTO, BASE) else expert
    return Question(task, route, items, experts, expert, original if compare else None)


@dataclass
class _Run:
    merged: MergedFolder
    processor: MMERProcessor
    questions: list[Question]
    originals: Originals
    dtype: Any
    device: str
    batch_size: int
    progress: bool

    def keys(self, named: Sequence[str]) -> dict[tuple[str, int], str]:
        """(who, place of the question) -> the hash of all that the answers depend on, but for the items."""
        weights = self.merged.checkpoint.files
        models = {MERGED: [sha256(path) for path in (*weights, *settings_files([self.merged.folder]))]}
        models |= {name: self.originals.hashes(name) for name in named}
        found = {}
        for place, question in enumerate(self.questions):
            for name in (MERGED, question.original):
                if name is not None:
                    task = question.task
                    asked = [task.scorer == "choice", task.expert, task.max_new_tokens, task.delimiter]
                    route = question.route if name == MERGED else ""
                    depends = [models[name], route, asked, str(self.dtype), self.device, _libraries(), version("mmer")]
                    found[name, place] = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        return found

    def ask_all(self, named: Sequence[str], keys: dict[tuple[str, int], str], journal: AnswerJournal):
        """The merged model first, then each original."""
        for name in (MERGED, *named):
            self._ask_one(name, keys, journal)
            gc.collect()  # before the next model is loaded

    def _ask_one(self, name: str, keys: dict[tuple[str, int], str], journal: AnswerJournal):
        here = [(place, q) for place, q in enumerate(self.questions) if name in (MERGED, q.original)]
        asked = {(keys[name, place], item.digest) for place, question in here for item in question.items}
        # a model that has nothing left to say is not loaded
        model = None if asked <= set(journal.known) else self._load(name)
        for place, question in here:
            key, items, task = keys[name, place], question.items, question.task
            if model is None:
                question.answers[name] = [journal.known[key, item.digest] for item in items]
                continue
            subject: Subject = model
            if name == MERGED:
                subject = MergedSubject(model, self.processor, task, question.route)
            label = f"{task.name}, {question.route if name == MERGED else f'the original {name}'}"
            total = len({item.digest for item in items})
            with tqdm(total=total, desc=label, unit="item", disable=not self.progress) as bar:
                question.answers[name] = ask(subject, task, items, journal, key, self.batch_size, bar.update)

    def _load(self, name: str) -> Any:
        if name != MERGED:
            return self.originals.load(name, self.dtype, self.device)
        model: Any = MMERForConditionalGeneration.from_pretrained(self.merged.folder, dtype=self.dtype)
        return model.to(self.device).eval()


def _scores(question: Question, name: str) -> list[float]:
    answers = question.answers[name]
    if question.task.scorer == "choice":
        return choice(question.items, [answer.place if answer.place is not None else -1 for answer in answers])
    return written_scorer(question.task)(question.items, [answer.words for answer in answers])


def _result(question: Question, originals: Originals) -> Result:
    task, metric, name = question.task, METRICS[question.task.scorer], question.original
    scores, beside = _scores(question, MERGED), {}
    if name is not None:
        words = [[answer.words for answer in question.answers[who]] for who in (MERGED, name)]
        both = scores, _scores(question, name)
        beside = compared((name, originals.source(name)), both, (words[0], words[1]), metric)
    dataset, source = _dataset(task)
    return Result(
        task=task.name,
        task_type=task_type(task, question.items),
        dataset=dataset,
        source=source,
        expert=question.expert,
        experts=question.experts,
        route=question.route,
        scorer=task.scorer,
        template=task.template,
        max_new_tokens=task.max_new_tokens,
        **measured(scores, metric),
        **beside,
    )


def _dataset(task: Task) -> tuple[str, dict[str, str | None]]:
    """Its name, and what the Hub is told of it. Of a folder its name alone."""
    keys, name = ("config", "split", "revision"), task.source_name
    facts = {key: None if isinstance(task.data, str) else getattr(task.data, key) for key in keys}
    return task.dataset_name or name, {"dataset": task.dataset_type or name, **facts}


__all__ = ["ORIGINALS", "evaluate"]
