"""The merge: a recipe in, a Hub repository on disk out.

The folder is planned first: which tensors the experts changed, and where every byte will lie. Then each part is done
by itself, by one of several workers, and written to its place. Invariants: θ₀ is stored bit for bit, what is measured
is what is stored, the bytes depend neither on the number of workers nor on the size of a block, and the output folder
appears at once and whole, or not at all.
"""

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .added_rows import lay_out, read_rows, row_places
from .decoupling import largest_rank, settle
from .experts import Base, open_expert
from .input_hashes import InputHashes
from .journal import NAME as JOURNAL
from .journal import Journal, fingerprint
from .matrix_work import BLOCK, Job
from .placement import PlacedFiles, Placement, Stored
from .plan import MergePlan, Part, Planner, changed_tensors
from .pretrained import naming
from .ray_engine import Order, cluster, parts_on
from .recipe import Recipe
from .report import Measurement, MergeReport, sha256
from .repository import build_config, write_repository
from .shards import size_in_bytes
from .task_vectors import one_thread
from .thresholds import model_thresholds
from .vocabulary import Vocabulary, build_processor, merge_vocabulary
from .workers import do_part

_THRESHOLDS = "thresholds"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    progress: bool = True,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    finish: Callable[[Path], object] | None = None,
    threads: int | None = None,
    block: int | None = None,
    device: str = "cpu",
    ray: str | None = None,
) -> MergeReport:
    """Merge what `recipe` names into the new folder `out`.

    A merge that was killed goes on where it was when it is called again, and gives the same bytes. `finish` is called
    with the finished folder, just before it appears under its name, to add files to it (a card).

    threads: workers, each with one tensor at a time; as many as the process has processors when absent. block: entries
    of a block. device: where the arithmetic is done ("cuda"). ray: the address of a Ray cluster whose nodes do the
    work, `auto` for the one that runs here; they must see `out`, and the sources of the recipe. Threads, block and
    cluster change no byte.

    Raises ValueError for a recipe, base or expert that does not fit, and for an `out` that holds something (unless
    `overwrite`); OSError for a disk without room. Nothing is left behind then.
    """
    started = time.monotonic()
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} is not empty. Give another folder, or overwrite=True to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = out.parent / f".{out.name}.partial"
    _check_device(device, ray)
    with nullcontext() if ray is None else cluster(ray) as connected, _alone(workplace):
        put_back(workplace, out)
        try:
            opened = _Merge(recipe, max_shard_size, trust_remote_code, threads, block, device, progress, connected)
            unfinished = workplace / out.name
            with InputHashes(opened.files(), opened.threads, connected) as hashed:
                opened.prepare()
                report = opened.run(unfinished, hashed, started)
            if finish is not None:
                finish(unfinished)
        except Exception:
            # an interrupt is no Exception: it leaves what is done, to go on from
            shutil.rmtree(workplace, ignore_errors=True)
            raise
        put_in_place(unfinished, out)
        shutil.rmtree(workplace)
    return report


def plan(
    recipe: Recipe | str | Path,
    max_shard_size: str | int = "2GB",
    trust_remote_code: bool = False,
    threads: int | None = None,
    block: int | None = None,
) -> MergePlan:
    """What `merge` would do, without writing anything. Raises ValueError as `merge` does."""
    opened = _Merge(recipe, max_shard_size, trust_remote_code, threads, block, "cpu", False)
    opened.prepare()
    return opened.plan


@contextmanager
def _alone(workplace: Path) -> Iterator[None]:
    """Raises ValueError where another process is merging into the same folder."""
    workplace.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder = os.open(workplace, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{workplace}: another process is merging into this folder. Wait for it") from error
        yield
    finally:
        os.close(folder)


def _check_device(device: str, ray: str | None):
    if device == "cpu":
        return
    if ray is not None:
        raise ValueError(f"found device {device!r} and a Ray cluster, whose workers use CPUs: give one of the two")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which is not to be had here: {error}") from error


def put_in_place(unfinished: Path, out: Path):
    """Give a finished folder its name. What stood there is beside it then, under the name `<out>.replaced`."""
    old = unfinished.with_name(f"{out.name}.replaced")
    if out.exists():
        os.replace(out, old)
    os.replace(unfinished, out)


def put_back(workplace: Path, out: Path):
    """Give an old folder its name back, where its successor did not get it: a process killed between two renamings."""
    old = workplace / f"{out.name}.replaced"
    if not out.exists() and old.is_dir():
        os.replace(old, out)


class _Merge:
    def __init__(
        self,
        recipe: Recipe | str | Path,
        max_shard_size: str | int,
        trust_remote_code: bool,
        threads: int | None,
        block: int | None,
        device: str,
        progress: bool,
        ray: Any = None,
    ):
        self.ray, self.trust_remote_code = ray, trust_remote_code
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.shard_size, self.device, self.progress = size_in_bytes(max_shard_size), device, progress
        self.threads = _processors() if threads is None else threads
        self.block = BLOCK if block is None else block
        if min(self.threads, self.block) < 1:
            raise ValueError(f"threads is {threads} and block {block}: expected 1 or more")
        self.base = Base(recipe.base, trust_remote_code)
        self.experts = [open_expert(name, e, self.base, trust_remote_code) for name, e in recipe.experts.items()]
        self.dtype = self._dtype(recipe)
        self.recipe = recipe

    def prepare(self):
        """All that can be known before the values are read: the settled recipe, vocabulary, processor."""
        recipe, trust_remote_code = self.recipe, self.trust_remote_code
        tokenizer = self.base.load_tokenizer(trust_remote_code)
        self.tokens = len(tokenizer)
        settled = settle(recipe.decoupling, self.experts, self.base, self.tokens)
        self.recipe = recipe.model_copy(update={"decoupling": settled})
        processors = {e.name: e.load_processor(trust_remote_code) for e in self.experts}
        configs = {e.name: e.config for e in self.experts}
        wanted = {name: expert.modalities for name, expert in recipe.experts.items()}
        self.vocabulary: Vocabulary = merge_vocabulary(tokenizer, processors, configs, wanted, recipe.own_tokenizers)
        self.processor = build_processor(
            self.vocabulary, processors, tokenizer.chat_template, recipe.text_route, recipe.default_experts
        )
        self.rank = largest_rank(self.experts) if settled.kind == "exact" else settled.rank

    def _dtype(self, recipe: Recipe) -> torch.dtype:
        if recipe.dtype is not None:
            return _DTYPES[recipe.dtype]
        dtype = self.base.tensor(self.base.embedding).dtype
        if dtype not in _DTYPES.values():
            raise ValueError(
                f"{self.base.source}: its weights are {dtype}, expected {list(_DTYPES)}. Set dtype in the recipe"
            )
        return dtype

    @cached_property
    def plan(self) -> MergePlan:
        changed = changed_tensors(self.base, self.experts, self.tokens, self.threads)
        planner = Planner(self.recipe, self.base, self.experts, self.dtype, self.rank, self.block)
        rows = []
        if self.vocabulary.added_tokens:
            places = row_places(self.base).values()
            rows = [Stored(place, self.dtype, tuple(m.shape)) for place, m in zip(places, self.added_rows[0])]
        parts = planner.parts(changed, rows)
        placement = Placement([stored for part in parts for stored in part.stored], self.shard_size)
        return MergePlan(parts, placement, self.threads, list(self.warnings))

    @property
    def warnings(self) -> list[str]:
        of_experts = [note for expert in self.experts for note in expert.notes]
        return [*self.base.notes, *self.vocabulary.warnings, *of_experts]

    def run(self, folder: Path, hashed: InputHashes, started: float) -> MergeReport:
        """Everything of the repository into `folder`, which may hold what a killed run of the same merge left."""
        with one_thread():  # inside a part; the parts are done side by side
            parts, placement = self.plan.parts, self.plan.placement
            inputs = hashed.result()
            key = fingerprint([self.recipe.resolved(), self.shard_size, self.device], inputs)
            journal = Journal(folder.parent / JOURNAL, key)
            journal.same = journal.same and PlacedFiles.there(folder, placement)
            # first of all: no journal may speak of files that are not its own
            journal.begin()
            try:
                self._clear(folder, keep=placement.files if journal.same else [])
                with closing(self._files(folder, journal.same)) as files:
                    self._do_parts(files, journal, hashed)
            finally:
                journal.close()
        hashed.check()
        measurement = self._measured(journal)
        report = self._report(measurement, inputs)
        config = build_config(
            self.recipe, self.base, self.experts, self.vocabulary,
            [part.name.removesuffix(".weight") for part in parts if part.kind == "matrix"],
            [part.name for part in parts if part.kind == "small"],
            self.rank, self.dtype, self.added_rows[1] if self.vocabulary.added_tokens else {},
        )  # fmt: skip
        report.seconds = time.monotonic() - started
        write_repository(folder, self.recipe, self.base, config, self.processor, report)
        files.finish()
        return report

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [*self.base.files(), *(file for expert in self.experts for file in expert.files())]

    def _clear(self, folder: Path, keep: Sequence[str]):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _files(self, folder: Path, there: bool) -> PlacedFiles:
        try:
            return PlacedFiles(folder, self.plan.placement, there)
        except OSError as error:
            size = self.plan.placement.total_bytes / 1e9
            raise OSError(error.errno, f"{folder.parent}: no room for the {size:.2f} GB of the merge", None) from error

    def _do_parts(self, files: PlacedFiles, journal: Journal, hashed: InputHashes):
        job = Job(
            self.recipe, self.base, self.experts, self.tokens, self.dtype, self.rank, files, block=self.block,
            added_rows=list(self.added_rows[0]) if self.vocabulary.added_tokens else [],
        )  # fmt: skip
        todo = [part for part in self.plan.parts if part.name not in journal.done]
        todo.sort(key=lambda part: -part.reads)  # the largest first, so that none is left over at the end
        shown = tqdm(
            total=self.plan.reads, initial=self.plan.reads - sum(part.reads for part in todo), desc="Merging",
            unit="B", unit_scale=True, disable=not self.progress,
        )  # fmt: skip
        with ThreadPoolExecutor(self.threads) as pool:
            if _THRESHOLDS not in journal.done:
                journal.add(_THRESHOLDS, model_thresholds(job, self.base.names, pool))
            job.thresholds = {name: (value, shares) for name, (value, shares) in journal.done[_THRESHOLDS].items()}
            with shown, closing(self._done(job, todo, pool, hashed)) as done:
                for part, numbers in done:
                    journal.add(part.name, numbers)
                    shown.update(part.reads)

    def _done(
        self, job: Job, todo: Sequence[Part], pool: ThreadPoolExecutor, hashed: InputHashes
    ) -> Generator[tuple[Part, Any], None, None]:
        """Each part, with its numbers, when it is done: here, or by the workers of a cluster."""
        if self.ray is not None:
            here = [part for part in todo if part.kind == "rows"]
            yield from ((part, do_part(job, part)) for part in here)
            known = hashed.result()
            order = Order(
                self.recipe.model_dump_json(by_alias=True), self.tokens, self.dtype, self.rank, self.block,
                self.trust_remote_code, job.files.folder,
                tuple((str(file), *stat, known[str(file)]) for file, stat in hashed.stats.items()),
            )  # fmt: skip
            there = [part for part in todo if part.kind != "rows"]
            yield from parts_on(self.ray, order, self.plan.placement, job.thresholds, there)
            return
        futures = {pool.submit(do_part, job, part, self.device): part for part in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            job.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise

    def _measured(self, journal: Journal) -> Measurement:
        """All parts' numbers together, in the order of the plan."""
        measurement = Measurement([expert.name for expert in self.experts], self.dtype)
        for part in self.plan.parts:
            if (numbers := journal.done[part.name]) is not None:
                measurement.join(numbers)
        for expert in self.experts:
            with naming(*expert.weight_files, *self.base.weights.checkpoint.files):
                measurement.distance[expert.name].check(expert.name, self.base.source)
        return measurement

    @cached_property
    def added_rows(self) -> tuple[torch.Tensor, dict[str, dict[str, int]]]:
        """(matrices (matrices, rows, hidden), token -> {expert: its own row}); see added_rows.py."""
        names, tokens = self.base.vocabulary_names, self.vocabulary.added_tokens
        rows = {expert.name: read_rows(expert, names, tokens) for expert in self.experts}
        empty = torch.zeros(len(names), self.base.shapes[names[0]][1], dtype=self.dtype)
        matrices, own = lay_out(rows, [token.token for token in tokens], empty)
        if self.recipe.decoupling.kind == "none":  # one static model: every route reads the mean
            return matrices[:, : len(tokens)], {}
        return matrices, own

    def _report(self, measurement: Measurement, inputs: dict[str, str]) -> MergeReport:
        recipe = self.recipe.resolved()
        report = MergeReport(
            base={"source": self.recipe.base, "sha256": hashes(self.base.files(), inputs)},
            experts={e.name: {**recipe["experts"][e.name], "sha256": hashes(e.files(), inputs)} for e in self.experts},
            method=recipe["method"],
            decoupling={**recipe["decoupling"], "rank": self.rank},
            dtype=str(self.dtype).removeprefix("torch."),
            warnings=self.warnings,
        )
        measurement.fill(report)
        return report


def hashes(files: Sequence[Path], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 by file name; a second file of one name (checkpoint and adapter) gets its number behind it."""
    found: dict[str, str] = {}
    for file in files:
        name = file.name if file.name not in found else f"{file.name} ({len(found)})"
        found[name] = sha256(file) if known is None else known[str(file)]
    return found


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
