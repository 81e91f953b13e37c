"""The merge: a recipe in, a Hub repository on disk out.

One tensor of the language model at a time is read from the base and all experts, merged, decoupled, measured and
written; the peak memory is a few tensors in fp32. Invariants: θ₀ is stored bit for bit, what is measured is what is
stored, and the output folder appears at once and whole, or not at all.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from .added_rows import lay_out, read_rows, row_places
from .decoupling import exact_factors, largest_rank, settle
from .experts import Base, Expert, open_expert
from .journal import Journal, fingerprint
from .matrices import Decoupled, decouple_matrix, merged_vector, row_blocks
from .naming import HEAD, stored_name
from .recipe import Recipe
from .report import Measurement, MergeReport, sha256
from .repository import build_config, write_repository
from .shards import ShardWriter, size_in_bytes
from .ties import model_threshold
from .vocabulary import Vocabulary, build_processor, merge_vocabulary

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    progress: bool = True,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> MergeReport:
    """Merge what `recipe` names into the new folder `out`.

    A merge that was killed goes on where it was when it is called again, and gives the same bytes. `finish` is called
    with the finished folder, just before it appears under its name, to add files to it (a card). Raises ValueError for
    a recipe, base or expert that does not fit, and for an `out` that holds something (unless `overwrite`); nothing is
    left behind then.
    """
    started = time.monotonic()
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    out = Path(os.path.abspath(out))
    size_in_bytes(max_shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} is not empty. Give another folder, or overwrite=True to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = out.parent / f".{out.name}.partial"
    unfinished = workplace / out.name
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        report = _Merge(recipe, unfinished, progress, max_shard_size, trust_remote_code).run(started)
        if finish is not None:
            finish(unfinished)
    except Exception:
        # an interrupt is no Exception: it leaves what is done, to go on from
        shutil.rmtree(workplace, ignore_errors=True)
        raise
    put_in_place(unfinished, out)
    shutil.rmtree(workplace)
    return report


def put_in_place(unfinished: Path, out: Path):
    """Give a finished folder its name. What stood there is beside it then, under the name `<out>.replaced`."""
    old = unfinished.with_name(f"{out.name}.replaced")
    if out.exists():
        os.replace(out, old)
    os.replace(unfinished, out)


class _Merge:
    def __init__(
        self, recipe: Recipe, folder: Path, progress: bool, max_shard_size: str | int, trust_remote_code: bool
    ):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.base = Base(recipe.base, trust_remote_code)
        self.experts = [open_expert(name, e, self.base, trust_remote_code) for name, e in recipe.experts.items()]
        self.dtype = self._dtype()
        tokenizer = AutoTokenizer.from_pretrained(self.base.folder, trust_remote_code=trust_remote_code)
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
        self.measurement = Measurement([e.name for e in self.experts], self.dtype)
        self.delta_modules: list[str] = []
        self.expert_tensors: list[str] = []
        self.thresholds: dict[str, tuple[float, int]] = {}
        self.rank = self._rank()
        self._go_on(max_shard_size)

    def _go_on(self, max_shard_size: str | int):
        """Start, or take up what a killed run of the same merge left in the folder."""
        files = [*self.base.weights.checkpoint.files, *(file for expert in self.experts for file in expert.files())]
        settings = [self.recipe.resolved(), size_in_bytes(max_shard_size)]
        self.journal = Journal(self.folder, fingerprint(settings, files))
        self.step, self.before_step = self.journal.step, self.journal.state
        kept = {self.folder / f"shard-{shard:05d}.partial" for shard in range(self.journal.shards)}
        if kept:
            kept.add(self.journal.path)
        for path in set(self.folder.iterdir()) - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.writer = ShardWriter(self.folder, max_shard_size, self.journal.shards, self._shard_written)
        if self.journal.state is None:
            self.thresholds = self._thresholds()
        else:
            self.restore(self.journal.state)

    def _shard_written(self, shards: int):
        self.journal.write(self.step, shards, self.before_step)

    def state(self) -> dict[str, Any]:
        return {
            "measurement": self.measurement.state(),
            "thresholds": dict(self.thresholds),
            "delta_modules": list(self.delta_modules),
            "expert_tensors": list(self.expert_tensors),
        }

    def restore(self, state: dict[str, Any]):
        self.measurement.restore(state["measurement"])
        self.thresholds = {name: (threshold, ties) for name, (threshold, ties) in state["thresholds"].items()}
        self.delta_modules, self.expert_tensors = list(state["delta_modules"]), list(state["expert_tensors"])

    def _dtype(self) -> torch.dtype:
        if self.recipe.dtype is not None:
            return _DTYPES[self.recipe.dtype]
        dtype = self.base.tensor(self.base.embedding).dtype
        if dtype not in _DTYPES.values():
            raise ValueError(
                f"{self.base.source}: its weights are {dtype}, expected {list(_DTYPES)}. Set dtype in the recipe"
            )
        return dtype

    def _rank(self) -> int:
        decoupling = self.recipe.decoupling
        return largest_rank(self.experts) if decoupling.kind == "exact" else decoupling.rank

    def _thresholds(self) -> dict[str, tuple[float, int]]:
        """scope: model. One threshold per expert over all its tensors, exact, in two passes over them."""
        if self.recipe.method.scope == "tensor":
            return {}

        def taus(expert: Expert):
            return lambda: (expert.task_vector(n, self.base.tensor(n), self.tokens) for n in self.base.names)

        return {
            e.name: model_threshold(taus(e), self.recipe.density(e.name))
            for e in self.experts
            if self.recipe.density(e.name) < 1
        }

    def run(self, started: float) -> MergeReport:
        steps: list[Callable[[], None]] = [partial(self.merge_tensor, name) for name in self.base.names]
        steps += [self.check_distances, self.write_added_rows]
        steps += [partial(self.write_tower, expert) for expert in self.experts]
        with tqdm(
            total=len(steps), initial=self.step, desc="Merging", unit="tensor", disable=not self.progress
        ) as shown:
            for self.step in range(self.step, len(steps)):
                self.before_step = self.state()
                steps[self.step]()
                shown.update()
        config = build_config(
            self.recipe,
            self.base,
            self.experts,
            self.vocabulary,
            self.delta_modules,
            self.expert_tensors,
            self.rank,
            self.dtype,
            self.added_rows[1] if self.vocabulary.added_tokens else {},
        )
        report = self.report()
        report.seconds = time.monotonic() - started
        write_repository(self.folder, self.recipe, self.base, config, self.processor, report)
        self.writer.close()
        self.journal.remove()
        return report

    def check_distances(self):
        for expert in self.experts:
            self.measurement.distance[expert.name].check(expert.name, self.base.source)

    def write_tower(self, expert: Expert):
        for name in expert.tower:
            self.writer.add(f"model.experts.{expert.name}.{name}", expert.tower_tensor(name))

    def merge_tensor(self, name: str):
        theta_0 = self.base.tensor(name)
        self.writer.add(stored_name(name), theta_0.to(self.dtype))
        taus = [expert.task_vector(name, theta_0, self.tokens) for expert in self.experts]
        if not any(bool(tau.any()) for tau in taus):
            self.measurement.same(theta_0)
            return
        self.measurement.several(name, taus, theta_0)
        names = [expert.name for expert in self.experts]
        merged = merged_vector(self.recipe, names, taus, self.thresholds, self.dtype)
        if name in self.base.delta_weights:
            self.delta_modules.append(name.removesuffix(".weight"))
            self.write_matrix(name, theta_0, taus, merged)
        elif name.startswith(f"{HEAD}."):
            raise ValueError(
                f"{name}: an expert changed the bias of the head, which the merged model has no place for"
            )
        else:
            self.expert_tensors.append(name)
            self.write_expert_tensors(name, theta_0, taus, merged)

    def write_matrix(self, name: str, theta_0: torch.Tensor, taus: Sequence[torch.Tensor], delta: torch.Tensor):
        """τ*, masks, scales and corrections of one matrix."""
        kind, scale_kind = self.recipe.decoupling.kind, self.recipe.decoupling.scale
        rank = min(self.rank, *theta_0.shape)
        prefix = stored_name(name).removesuffix(".weight")
        self.writer.add(f"{prefix}.delta", delta)
        parts: dict[str, list[torch.Tensor]] = {"masks": [], "scales": [], "correction_a": [], "correction_b": []}
        for expert, tau in zip(self.experts, taus, strict=True):
            own = Decoupled()
            if kind in ("mask", "paper"):
                own = decouple_matrix(tau, delta, self.recipe.lam(expert.name), scale_kind, rank, self.dtype)
            elif kind == "exact":
                b, a = exact_factors(expert, name, theta_0, tau, rank, self.tokens)
                own = Decoupled(correction=(b.to(self.dtype), a.to(self.dtype)))
            stored = own.stored()
            for part, tensor in stored.items():
                parts[part].append(tensor)
            self.measurement.stored(expert.name, stored.values())
            for rows in row_blocks(tau):
                recovered = delta[rows].float() if kind == "none" else own.tau(delta, rows)
                mask = None if own.mask is None else own.mask[rows]
                self.measurement.one(expert.name, name, theta_0[rows], tau[rows], delta[rows], recovered, mask)
        for part, tensors in parts.items():
            if tensors:
                self.writer.add(f"{prefix}.{part}", torch.stack(tensors))

    def write_expert_tensors(
        self, name: str, theta_0: torch.Tensor, taus: Sequence[torch.Tensor], merged: torch.Tensor
    ):
        """A tensor too small to compress: each expert's own, exactly, and θ₀ + τ* (in a static merge for all)."""
        joint = (theta_0.float() + merged).to(self.dtype)
        own = []
        for expert, tau in zip(self.experts, taus, strict=True):
            if self.recipe.decoupling.kind == "none":
                tensor = joint
            else:
                tensor = (expert.exact_tensor(name) if bool(tau.any()) else theta_0).to(self.dtype)
            own.append(tensor)
            self.measurement.stored(expert.name, [tensor])
            self.measurement.one(expert.name, name, theta_0, tau, merged, tensor.float() - theta_0.float(), None)
        prefix, _, last = stored_name(name).rpartition(".")
        self.writer.add(f"{prefix}.expert_{last}", torch.stack(own))
        self.writer.add(f"{prefix}.merged_{last}", joint)

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

    def write_added_rows(self):
        """The rows of the tokens that the base lacks; 0 where no expert has one."""
        if not self.vocabulary.added_tokens:
            return
        for place, rows in zip(row_places(self.base).values(), self.added_rows[0], strict=True):
            self.writer.add(place, rows.contiguous())

    def report(self) -> MergeReport:
        recipe = self.recipe.resolved()
        report = MergeReport(
            base={
                "source": self.recipe.base,
                "sha256": hashes([*self.base.weights.checkpoint.files, self.base.folder / "config.json"]),
            },
            experts={e.name: {**recipe["experts"][e.name], "sha256": hashes(e.files())} for e in self.experts},
            method=recipe["method"],
            decoupling={**recipe["decoupling"], "rank": self.rank},
            dtype=str(self.dtype).removeprefix("torch."),
            warnings=[*self.vocabulary.warnings, *(note for e in self.experts for note in e.notes)],
        )
        self.measurement.fill(report)
        return report


def hashes(files: Sequence[Path]) -> dict[str, str]:
    """sha256 by file name; a second file of one name (checkpoint and adapter) gets its number behind it."""
    found: dict[str, str] = {}
    for file in files:
        name = file.name if file.name not in found else f"{file.name} ({len(found)})"
        found[name] = sha256(file)
    return found
