"""`mmer add`: a modality or a task joins a finished folder, and the other experts' routes stay as they are.

Enters: a merged folder, its base, the newcomer. Leaves: the folder with the newcomer behind the others, put in its
place whole. With θ₀, τ*, masks mᵢ as they are stored, and τ = θ - θ₀ of the newcomer, in every matrix:

    free  = no mask mᵢ has a bit there: no expert's route reads τ* there
    τ*    ← v where free and v ≠ 0, else as it was; v is what the recipe's method makes of τ alone (trimmed, times
            alpha; with the defaults τ itself), in the stored dtype
    m, s, BA of the newcomer: `decouple`, `rescale`, `correct` of τ against that τ*, as in a merge

Invariants: θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ of the others is the same in every entry, since mᵢ is 0 wherever τ* changed;
so is θ₀. In a matrix that no expert changed before, their masks and corrections are 0 and their scales 1. The merged
route θ₀ + τ* does change. Two newcomers at once are added one after another.

Kind `exact` has no masks. There τᵢ = BᵢAᵢ is known of all, τ* is read by the merged route alone and made anew by the
recipe's method. Where the newcomer's LoRA has a larger rank, the others' factors are padded with zeros; their products
are compared bit by bit, and a folder where they would differ is refused. Kind `none` has one vector for all experts
and can only be merged again.

Tensors too small to compress: each expert's own copy stays, the newcomer's goes behind, exactly; the merged route's is
made anew from these copies by the recipe's method (trimmed in the tensor alone where the recipe says scope: model and
the threshold of an older expert is not known). Tokens keep their ids and rows, new ones follow behind; of a token that
is there already the newcomer gets a row of its own where its differs, and all other routes read the row they had.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configuration_mmer.configuration_mmer import MMERConfig

from .added_rows import TokenRows, add_rows, join_rows, read_rows, row_places, split_rows
from .decoupling import exact_factors, largest_rank
from .experts import Base, open_expert
from .folder_checks import MergedFolder
from .input_hashes import hashes
from .matrices import Decoupled, decouple_matrix, merged_vector, row_blocks
from .naming import HEAD, stored_name
from .recipe import ExpertRecipe, expert_recipes
from .report import Measurement, MergeReport, count_copy, count_unchanged, starved, tensor_kind
from .repository import expert_entry
from .selection import model_threshold
from .shards import ShardWriter, size_in_bytes
from .source_checks import same_bits
from .stored import (
    Parts,
    Rewriting,
    changed_config,
    open_folder,
    own_tensors,
    read_processor,
    stored_report,
    stored_task_vector,
    stored_vocabulary,
    target_of,
)
from .task_vectors import task_vector
from .vocabulary import build_processor, merge_vocabulary


def add(
    folder: str | Path,
    experts: Mapping[str, ExpertRecipe | Mapping[str, Any] | str],
    remerge: bool = False,
    out: str | Path | None = None,
    base: str | None = None,
    progress: bool = True,
    max_shard_size: str | int = "2GB",
    trust_remote_code: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> MergeReport:
    """Add `experts` (as a recipe has them) to a merged folder, in its place, or as the new folder `out`; `base` is
    where the base is now.

    With `remerge` all experts are merged together, from their originals, by the folder's recipe: that is `merge`, and
    what else the folder holds is gone then. `finish` as in `merge`. Raises ValueError for what does not fit; the old
    folder is untouched then.
    """
    started = time.monotonic()
    size_in_bytes(max_shard_size)
    newcomers = expert_recipes(experts)
    target, merged = target_of(folder, out), open_folder(folder)
    recipe = merged.recipe.with_experts(newcomers)
    written = Rewriting(merged, target, base, progress, max_shard_size, trust_remote_code, finish)
    if remerge:
        return written.from_originals(recipe)
    return written.changed(_Addition(merged, newcomers, base, trust_remote_code), started)


class _Addition:
    def __init__(
        self, merged: MergedFolder, experts: dict[str, ExpertRecipe], base: str | None, trust_remote_code: bool
    ):
        self.merged, self.old = merged, list(merged.config.expert_names)
        self.recipe = merged.recipe.with_experts(experts)
        self.kind, self.dtype = merged.config.decoupling["kind"], merged.dtype
        if self.kind == "none":
            raise ValueError(
                f"{merged.folder} is a static merge (decoupling.kind none): all its experts share one merged vector, "
                "so none can join without changing the others. Merge all anew with remerge"
            )
        self.base = Base(base or self.recipe.base, trust_remote_code)
        if not merged.config.text_config.tie_word_embeddings:
            self.base.untie()
        self._check_base()
        self.newcomers = [open_expert(name, e, self.base, trust_remote_code) for name, e in experts.items()]
        self.opened = {expert.name: expert for expert in self.newcomers}
        tokenizer = self.base.load_tokenizer(trust_remote_code)
        self.tokens = len(tokenizer)
        self._merge_vocabulary(tokenizer, trust_remote_code)
        rank = merged.config.decoupling["rank"]
        self.decoupling = {**merged.config.decoupling}
        if self.kind == "exact":
            self.decoupling["rank"] = max(rank, largest_rank(self.newcomers))
        self.delta_modules: list[str] = []
        self.expert_tensors: list[str] = []
        self.added_tokens: list[dict[str, Any]] = []
        # of kind exact all task vectors are known; else the newcomers' alone
        self.known = [*(self.old if self.kind == "exact" else ()), *experts]
        self.measurement = Measurement(self.known, self.dtype)
        self.unchanged = Measurement(self.old, self.dtype)
        self.free = {name: [0, 0] for name in experts}
        self.thresholds = self._thresholds()

    def _check_base(self):
        """The base has the tensors that the folder has; their values are compared one by one, when they are read."""
        strangers = [name for name in self.base.names if self._place(name) not in self.merged.expected]
        if strangers:
            raise ValueError(
                f"{self.base.source} has {strangers[0]}, which {self.merged.folder} has not: expected the base that "
                f"it was merged from, {self.merged.recipe.base}. Name its place with base"
            )

    def _merge_vocabulary(self, tokenizer: Any, trust_remote_code: bool):
        self.stored_processor = read_processor(self.merged)
        earlier = stored_vocabulary(self.merged, self.stored_processor)
        self.processors = {e.name: e.load_processor(trust_remote_code) for e in self.newcomers}
        wanted = {e.name: self.recipe.experts[e.name].modalities for e in self.newcomers}
        configs = {e.name: e.config for e in self.newcomers}
        own = self.recipe.own_tokenizers
        self.vocabulary = merge_vocabulary(tokenizer, self.processors, configs, wanted, own, earlier)

    def _task_vector(self, expert: str, name: str, theta_0: torch.Tensor) -> torch.Tensor:
        """τ of one tensor, from the newcomer's original, or from what the folder keeps of another."""
        if expert in self.old:
            return stored_task_vector(self.merged, self._source(name), theta_0, self.old.index(expert))
        return self.opened[expert].task_vector(name, theta_0, self.tokens)

    def _thresholds(self) -> dict[str, tuple[float, int]]:
        """scope: model. One threshold for each expert that all of τ is known of, as in a merge."""
        if self.recipe.method.scope == "tensor":
            return {}
        names = [name for name in self.known if self.recipe.density(name) < 1]
        return {name: model_threshold(partial(self._of_all, name), self.recipe.density(name)) for name in names}

    def _of_all(self, expert: str) -> Iterator[torch.Tensor]:
        """τ of one expert, tensor by tensor."""
        for name in self.base.names:
            yield self._task_vector(expert, name, self.base.tensor(name))

    def _source(self, name: str) -> str:
        """The tensor whose parts a tensor starts from: a head that is told apart from now on was the embedding."""
        tied = self.merged.config.text_config.tie_word_embeddings
        return self.base.embedding if tied and name == f"{HEAD}.weight" else name

    def _place(self, name: str) -> str:
        return stored_name(self._source(name))

    # tensor by tensor

    def write_tensors(self, writer: ShardWriter, progress: bool):
        for name in tqdm(self.base.names, desc="Adding", unit="tensor", disable=not progress):
            self.add_tensor(writer, name)
        for expert in self.newcomers:
            self.measurement.distance[expert.name].check(expert.name, self.base.source)
        self.write_rows(writer)
        for name in self.merged.expected:
            if name.startswith("model.experts."):
                writer.add(name, self.merged.checkpoint.tensor(name))
        for expert in self.newcomers:
            for name in expert.tower:
                writer.add(f"model.experts.{expert.name}.{name}", expert.tower_tensor(name))

    def add_tensor(self, writer: ShardWriter, name: str):
        theta_0, stored = self.base.tensor(name), self.merged.checkpoint.tensor(self._place(name))
        if not same_bits(stored, theta_0.to(self.dtype)):
            raise ValueError(
                f"{name} of {self.base.source} is not the one in {self.merged.folder}: expected the base that it was "
                f"merged from, {self.merged.recipe.base}. Name its place with base"
            )
        writer.add(stored_name(name), stored)
        taus = {expert: self._task_vector(expert, name, theta_0) for expert in self.known}
        config, module = self.merged.config, name.removesuffix(".weight")
        old = self._source(name)
        there = old.removesuffix(".weight") in config.delta_modules or old in config.expert_tensors
        if not there and not any(bool(tau.any()) for tau in taus.values()):
            self.measurement.same(theta_0)
            return
        self.measurement.several(name, list(taus.values()), theta_0)
        matrix = name in self.base.delta_weights
        if not there:
            self.count_for_the_others(name, theta_0, matrix and self.kind != "exact")
        if matrix:
            self.delta_modules.append(module)
            parts = self.matrix(name, theta_0, taus, there)
            for place, tensor in parts.items(stored_name(module + ".x").removesuffix(".x")):
                writer.add(place, tensor)
        elif name.startswith(f"{HEAD}."):
            raise ValueError(
                f"{name}: an expert changed the bias of the head, which the merged model has no place for"
            )
        else:
            self.expert_tensors.append(name)
            self.small_tensor(writer, name, theta_0, taus)

    def count_for_the_others(self, name: str, theta_0: torch.Tensor, masked: bool):
        """A tensor in which the others have nothing, but which their routes now find among the changed ones."""
        for expert in self.old:
            for rows in row_blocks(theta_0):
                nothing = torch.zeros(theta_0[rows].shape)
                mask = nothing.bool() if masked else None
                self.unchanged.one(expert, name, theta_0[rows], nothing, nothing, nothing, mask)

    def matrix(self, name: str, theta_0: torch.Tensor, taus: dict[str, torch.Tensor], there: bool) -> Parts:
        """The parts of one matrix, the newcomers' behind the others'."""
        if there:
            parts = Parts.read(self.merged, self._place(name).removesuffix(".weight"))
        else:
            parts = Parts.empty(theta_0.shape, len(self.old), self.decoupling, self.dtype)
        rank = min(self.decoupling["rank"], *theta_0.shape)
        changed = any(bool(taus[expert.name].any()) for expert in self.newcomers)
        if self.kind == "exact":
            parts.widen(rank, f"{name} of {', '.join(self.old)}")
            if changed:
                parts.delta = merged_vector(self.recipe, self.known, list(taus.values()), self.thresholds, self.dtype)
        made = []
        for expert in self.newcomers:
            tau = taus[expert.name]
            if self.kind == "exact":
                dense = bool(expert.dense_part(name, theta_0, self.tokens).any())
                b, a = exact_factors(expert, name, theta_0, rank, self.tokens, dense)
                own = Decoupled(correction=(b.to(self.dtype), a.to(self.dtype)))
            else:
                self.fill_free(expert.name, parts, tau)
                lam, scale = self.recipe.lam(expert.name), self.decoupling["scale"]
                own = decouple_matrix(tau, parts.delta, lam, scale, rank, self.dtype)
            parts.append(own)
            made.append((expert.name, tau, own))
        for expert_name, tau, own in made:
            self.measurement.stored(expert_name, own.stored().values())
            for rows in row_blocks(tau):
                mask, delta = None if own.mask is None else own.mask[rows], parts.delta[rows]
                recovered = own.tau(parts.delta, rows)
                self.measurement.one(expert_name, name, theta_0[rows], tau[rows], delta, recovered, mask)
        return parts

    def fill_free(self, expert: str, parts: Parts, tau: torch.Tensor):
        """τ* ← v where no mask has a bit and v is not 0."""
        own = merged_vector(self.recipe, [expert], [tau], self.thresholds, self.dtype)
        for rows in row_blocks(tau):
            free, changed = ~parts.claimed(rows), tau[rows] != 0
            parts.delta[rows] = torch.where(free & (own[rows] != 0), own[rows], parts.delta[rows])
            self.free[expert][0] += int((free & changed).sum())
            self.free[expert][1] += int(changed.sum())

    def small_tensor(self, writer: ShardWriter, name: str, theta_0: torch.Tensor, taus: dict[str, torch.Tensor]):
        """Each expert's own copy, and θ₀ + τ* of all copies."""
        prefix, _, leaf = stored_name(name).rpartition(".")
        own = own_tensors(self.merged, name, theta_0)
        every = [task_vector(copy, theta_0) for copy in own]
        for expert in self.newcomers:
            tau = taus[expert.name]
            own.append((expert.exact_tensor(name) if bool(tau.any()) else theta_0).to(self.dtype))
            every.append(tau)
        if any(bool(taus[expert.name].any()) for expert in self.newcomers):
            merged = merged_vector(self.recipe, list(self.recipe.experts), every, self.thresholds, self.dtype)
            joint = (theta_0.float() + merged).to(self.dtype)
        else:
            joint = self.merged.checkpoint.tensor(f"{prefix}.merged_{leaf}")
            merged = joint.float() - theta_0.float()
        for expert, tensor in zip(self.newcomers, own[len(self.old) :], strict=True):
            recovered = tensor.float() - theta_0.float()
            self.measurement.stored(expert.name, [tensor])
            self.measurement.one(expert.name, name, theta_0, taus[expert.name], merged, recovered, None)
        writer.add(f"{prefix}.expert_{leaf}", torch.stack(own))
        writer.add(f"{prefix}.merged_{leaf}", joint)

    def write_rows(self, writer: ShardWriter):
        """The rows of the added tokens: the others' as they were, behind them those that only newcomers have."""
        tokens = self.vocabulary.added_tokens
        if not tokens:
            return
        places, names = row_places(self.base), self.base.vocabulary_names
        known: dict[str, TokenRows] = {}
        if self.merged.config.added_tokens:
            read = self.merged.checkpoint.tensor
            stored = torch.stack([read(places[self._source(name)]) for name in names])
            known = {token.token: token for token in split_rows(self.merged.config, stored)}
        found = {expert.name: read_rows(expert, names, tokens) for expert in self.newcomers}
        empty = torch.zeros(len(names), self.base.shapes[names[0]][1], dtype=self.dtype)
        matrices, self.added_tokens = join_rows([add_rows(known.get(t.token), t, found, empty) for t in tokens])
        for name, matrix in zip(names, matrices, strict=True):
            writer.add(places[name], matrix.contiguous())

    # beside the tensors

    def config(self) -> MMERConfig:
        entries = {expert.name: expert_entry(expert, self.vocabulary) for expert in self.newcomers}
        return changed_config(
            self.merged,
            self.base.tied,
            experts={**self.merged.config.experts, **entries},
            default_experts=self.recipe.default_experts,
            delta_modules=self.delta_modules,
            expert_tensors=self.expert_tensors,
            decoupling=self.decoupling,
            added_tokens=self.added_tokens,
        )

    def processor(self) -> Any:
        stored = self.stored_processor
        entries = json.loads((self.merged.folder / "processor_config.json").read_text(encoding="utf-8"))["experts"]
        return build_processor(
            self.vocabulary,
            self.processors,
            stored.chat_template,
            self.recipe.text_route,
            self.recipe.default_experts,
            entries,
            stored.expert_templates,
        )

    def report(self, seconds: float) -> MergeReport:
        """The folder's report with the newcomers' numbers; the others' stay, but for tensors that are new among the
        changed ones."""
        report, measured = stored_report(self.merged), MergeReport()
        self.measurement.fill(measured)
        told_apart = self.merged.config.text_config.tie_word_embeddings and not self.base.tied
        for name, sums in self.unchanged.sums.items():
            count_unchanged(report.experts[name], sums)
            if told_apart and self.base.embedding.removesuffix(".weight") in self.merged.config.delta_modules:
                count_copy(report.experts[name], f"{HEAD}.weight", tensor_kind(self.base.embedding))
        recipe = self.recipe.resolved()["experts"]
        for expert in self.newcomers:
            name = expert.name
            numbers = {**recipe[name], "sha256": hashes(expert.files()), **measured.experts[name]}
            report.experts[name] = numbers | {"added": self._added(name)}
            report.notes.append(_note(name, report.experts[name]))
        report.tensors, report.seconds = measured.tensors, seconds
        report.decoupling = {**report.decoupling, "rank": self.decoupling["rank"]}
        if self.kind == "exact":
            report.sign_conflicts = measured.sign_conflicts
        told = [f"expert {expert.name!r} is" for expert in self.newcomers]
        report.warnings += self.vocabulary.warnings
        report.warnings += [warning for warning in starved(report.experts) if warning.startswith(tuple(told))]
        return report

    def _added(self, name: str) -> dict[str, Any]:
        """Beside whom it was added, and the share of the entries it changed that no mask had claimed."""
        free, changed = self.free[name]
        beside = self.old + [expert.name for expert in self.newcomers]
        share = free / changed if changed else None
        return {"beside": beside[: beside.index(name)], "free_entries": share}


def _note(name: str, numbers: dict[str, Any]) -> str:
    added, residual = numbers["added"], numbers["total"]["residual"]
    note = f"expert {name!r} was added beside {', '.join(added['beside'])}; its residual is {residual:.3f}"
    if added["free_entries"] is None:
        return note
    return f"{note}, and {added['free_entries']:.1%} of the entries that it changed were free in the merged vector"
