"""A merge whose base and experts are open: what it will write, the work, the report.

Enters: a recipe. Leaves: the repository, in a folder that may hold what a killed run of the same merge left. It is
planned first: which tensors the experts changed, and where every byte will lie. Then each part is done by itself, by
one of several workers, and written to its place. Invariants: θ₀ is stored bit for bit, what is measured is what is
stored, the bytes depend neither on the number of workers nor on the size of a block.
"""

import shutil
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .added_rows import lay_out, read_rows, row_places
from .checkpoints import DTYPES
from .decoupling import largest_rank, settle
from .experts import Base, open_expert
from .input_hashes import InputHashes, hashes
from .journal import NAME as JOURNAL
from .journal import Journal, fingerprint
from .matrix_work import BLOCK, Job
from .placement import PlacedFiles, Placement, Stored
from .plan import MergePlan, Part, Planner, changed_tensors
from .pretrained import naming
from .ray_engine import Order, parts_on
from .recipe import Recipe
from .report import Measurement, MergeReport
from .repository import build_config, write_repository
from .shards import size_in_bytes
from .task_vectors import one_thread
from .thresholds import model_thresholds
from .vocabulary import Vocabulary, build_processor, merge_vocabulary
from .workers import do_part

_THRESHOLDS = "thresholds"


class OpenedMerge:
    def __init__(
        self,
        recipe: Recipe,
        max_shard_size: str | int,
        trust_remote_code: bool,
        threads: int,
        block: int | None,
        device: str,
        progress: bool,
        ray: Any = None,
    ):
        self.ray, self.trust_remote_code = ray, trust_remote_code
        self.shard_size, self.device, self.progress = size_in_bytes(max_shard_size), device, progress
        self.threads = threads
        self.block = BLOCK if block is None else block
        if min(self.threads, self.block) < 1:
            raise ValueError(f"threads is {threads} and block {block}: expected 1 or more")
        self.base = Base(recipe.base, trust_remote_code)
        self.experts = [open_expert(name, e, self.base, trust_remote_code) for name, e in recipe.experts.items()]
        self.dtype = self._dtype(recipe)
        self.recipe = recipe

    def prepare(self):
        """All that can be known without the values: the settled recipe, vocabulary, processor.

        Other threads look meanwhile which tensors the experts changed.
        """
        tokenizer = self.base.load_tokenizer(self.trust_remote_code)
        self.tokens, stop = len(tokenizer), Event()
        with one_thread(), ThreadPoolExecutor(1) as looking:
            changed = looking.submit(changed_tensors, self.base, self.experts, self.tokens, self.threads, stop)
            try:
                self._prepare(tokenizer)
                self._changed = changed.result()
            except BaseException:
                stop.set()
                raise

    def _prepare(self, tokenizer: PreTrainedTokenizerBase):
        recipe, trust_remote_code = self.recipe, self.trust_remote_code
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
            return DTYPES[recipe.dtype]
        dtype = self.base.tensor(self.base.embedding).dtype
        if dtype not in DTYPES.values():
            raise ValueError(
                f"{self.base.source}: its weights are {dtype}, expected {list(DTYPES)}. Set dtype in the recipe"
            )
        return dtype

    @cached_property
    def plan(self) -> MergePlan:
        planner = Planner(self.recipe, self.base, self.experts, self.dtype, self.rank, self.block)
        rows = []
        if self.vocabulary.added_tokens:
            places = row_places(self.base).values()
            rows = [Stored(place, self.dtype, tuple(m.shape)) for place, m in zip(places, self.added_rows[0])]
        parts = planner.parts(self._changed, rows)
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
                tuple((str(file), *hashed.stats[file], known[str(file)]) for file in hashed.files),
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
