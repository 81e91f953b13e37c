"""`mmer remove`: an expert leaves a merged folder, and the other experts' routes stay as they are. The reverse of add.

Enters: a merged folder; neither the base nor an original is needed. Leaves: the folder without the expert's masks,
scales, corrections, copies of small tensors, tower, processor and templates, and without the tokens that only it
brought, put in its place whole. In every matrix, with k the expert that leaves:

    τ* ← 0 where mₖ has a bit and no other mask has, else as it was

Invariant: θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ of the others is the same in every entry, and so is θ₀. Where the others' masks
have bits too, τ* is a mean that k took part in, and its share cannot be told from theirs: the merged route θ₀ + τ*
keeps it, and `remerge` makes that route anew from the originals. Kind `exact` keeps all task vectors, so τ* is made
anew from those that stay; the merged route's small tensors are made anew from the others' copies in every kind but
`none`, where one vector serves all experts and stays as it is.

Ids of tokens never move: the last ones go, and the id of one in between is held by a token `<removed:id>` that nobody
writes, since a tokenizer numbers its added tokens without gaps when it is loaded. Rows that routes share stay.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from configuration_mmer.routes_mmer import AUTO
from modeling_mmer.routed_weights_mmer import OWN_PARTS
from processing_mmer.processing_mmer import MMERProcessor

from .added_rows import TokenRows, join_rows, split_rows
from .folder_checks import MergedFolder
from .matrices import merged_vector, row_blocks
from .naming import stored_name
from .report import MergeReport
from .selection import model_threshold
from .shards import ShardWriter, size_in_bytes
from .stored import (
    Parts,
    Rewriting,
    changed_config,
    language_model_names,
    open_folder,
    own_tensors,
    read_processor,
    stored_report,
    stored_task_vector,
    target_of,
)
from .task_vectors import task_vector

_ROWS = ("model.added_embeddings.weight", "added_head.weight")


def remove(
    folder: str | Path,
    experts: str | Collection[str],
    remerge: bool = False,
    out: str | Path | None = None,
    base: str | None = None,
    progress: bool = True,
    max_shard_size: str | int = "2GB",
    trust_remote_code: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> MergeReport:
    """Take `experts` out of a merged folder, in its place, or as the new folder `out`.

    With `remerge` the experts that stay are merged together, from their originals, by the folder's recipe: that is
    `merge`, and what else the folder holds is gone then; `base` is where the base is now. `finish` as in `merge`.
    Raises ValueError for a name that is not there and for the last expert; the folder is untouched then.
    """
    started = time.monotonic()
    size_in_bytes(max_shard_size)
    names = [experts] if isinstance(experts, str) else list(experts)
    target, merged = target_of(folder, out), open_folder(folder)
    recipe = merged.recipe.without_experts(names)
    written = Rewriting(merged, target, base, progress, max_shard_size, trust_remote_code, finish)
    if remerge:
        return written.from_originals(recipe)
    return written.changed(_Removal(merged, names), started)


class _Removal:
    def __init__(self, merged: MergedFolder, names: list[str]):
        self.merged, self.names = merged, names
        self.recipe = merged.recipe.without_experts(names)
        self.kind = merged.config.decoupling["kind"]
        every = merged.config.expert_names
        self.kept = [place for place, name in enumerate(every) if name not in names]
        self.gone = [place for place, name in enumerate(every) if name in names]
        self.stay = list(self.recipe.experts)
        self.stored_processor = read_processor(merged)
        self.tokens = self._tokens()
        self.thresholds = self._thresholds()

    def _theta_0(self, name: str) -> torch.Tensor:
        return self.merged.checkpoint.tensor(stored_name(name))

    def _of_all(self, expert: int) -> Iterator[torch.Tensor]:
        for name in language_model_names(self.merged):
            yield stored_task_vector(self.merged, name, self._theta_0(name), expert)

    def _thresholds(self) -> dict[str, tuple[float, int]]:
        """scope: model. One threshold for each expert that stays, where all of its task vector is known."""
        if self.kind != "exact" or self.recipe.method.scope == "tensor":
            return {}
        known = {name: place for name, place in zip(self.stay, self.kept) if self.recipe.density(name) < 1}
        return {n: model_threshold(partial(self._of_all, k), self.recipe.density(n)) for n, k in known.items()}

    # tensor by tensor

    def write_tensors(self, writer: ShardWriter, progress: bool):
        merged, gone = self.merged, tuple(f"model.experts.{name}." for name in self.names)
        config = merged.config
        apart = {f"{prefix}.{part}" for _, prefix in merged.matrices() for part in OWN_PARTS}
        deltas = {f"{prefix}.delta": prefix for _, prefix in merged.matrices()}
        small = {}
        for name in config.expert_tensors:
            prefix, _, leaf = stored_name(name).rpartition(".")
            small[f"{prefix}.expert_{leaf}"] = name
            apart.add(f"{prefix}.merged_{leaf}")
        for name in tqdm(merged.expected, desc="Removing", unit="tensor", disable=not progress):
            if name in deltas:
                for place, tensor in self.matrix(deltas[name]).items(deltas[name]):
                    writer.add(place, tensor)
            elif name in small:
                self.small_tensor(writer, small[name])
            elif name not in apart and name not in _ROWS and not name.startswith(gone):
                writer.add(name, merged.checkpoint.tensor(name))
        if self.tokens:
            matrices, _ = join_rows(self.tokens)
            for name, matrix in zip(self._row_names(), matrices, strict=True):
                writer.add(name, matrix.contiguous())

    def matrix(self, prefix: str) -> Parts:
        """The parts of one matrix, without those of the experts that leave."""
        parts = Parts.read(self.merged, prefix)
        if "masks" in parts.own:
            for rows in row_blocks(parts.delta):
                alone = parts.claimed(rows, self.gone) & ~parts.claimed(rows, self.kept)
                parts.delta[rows] = parts.delta[rows].masked_fill(alone, 0.0)
        elif self.kind == "exact" and any(bool(parts.low_rank(expert).any()) for expert in self.gone):
            taus = [parts.low_rank(expert) for expert in self.kept]
            parts.delta = merged_vector(self.recipe, self.stay, taus, self.thresholds, self.merged.dtype)
        parts.keep(self.kept)
        return parts

    def small_tensor(self, writer: ShardWriter, name: str):
        theta_0, (prefix, _, leaf) = self._theta_0(name), stored_name(name).rpartition(".")
        own = own_tensors(self.merged, name, theta_0)
        taus = [task_vector(tensor, theta_0) for tensor in own]
        joint = self.merged.checkpoint.tensor(f"{prefix}.merged_{leaf}")
        if self.kind != "none" and any(bool(taus[expert].any()) for expert in self.gone):
            left = [taus[expert] for expert in self.kept]
            tau = merged_vector(self.recipe, self.stay, left, self.thresholds, self.merged.dtype)
            joint = (theta_0.float() + tau).to(joint.dtype)
        writer.add(f"{prefix}.expert_{leaf}", torch.stack([own[expert] for expert in self.kept]))
        writer.add(f"{prefix}.merged_{leaf}", joint)

    # tokens

    def _row_names(self) -> list[str]:
        return [name for name in _ROWS if name in self.merged.expected]

    def _tokens(self) -> list[TokenRows]:
        """The added tokens that stay, and those that hold an id: see the text above."""
        if not self.merged.config.added_tokens:
            return []
        stored = torch.stack([self.merged.checkpoint.tensor(name) for name in self._row_names()])
        rows = split_rows(self.merged.config, stored)
        for row in rows:
            row.experts = [name for name in row.experts if name not in self.names]
            row.own = {name: own for name, own in row.own.items() if name not in self.names}
        rows.sort(key=lambda row: row.id)
        while rows and not rows[-1].experts:
            rows.pop()
        known = self.stored_processor.tokenizer.get_vocab()
        for row in rows:
            if not row.experts and not row.token.startswith("<removed:"):
                row.token, row.joint = f"<removed:{row.id}>", torch.zeros_like(row.joint)
                if row.token in known:
                    raise ValueError(f"the tokenizer has a token {row.token!r} already: merge anew with remerge")
        return rows

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: Any = self.stored_processor.tokenizer
        before = {token["id"]: token["token"] for token in self.merged.config.added_tokens}
        after = {row.id: row.token for row in self.tokens}
        if before == after:
            return tokenizer
        if not tokenizer.is_fast:
            lost = sorted(set(before.values()) - set(after.values()))
            raise ValueError(
                f"{type(tokenizer).__name__} has no tokenizer.json, so the tokens {lost} cannot be taken out of it: "
                "merge anew with remerge"
            )
        core = tokenizer.backend_tokenizer
        values = json.loads(core.to_str())
        tokens = []
        for token in values["added_tokens"]:
            if token["id"] not in before:
                tokens.append(token)
            elif token["id"] in after:
                held = after[token["id"]] != before[token["id"]]
                plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                tokens.append({**token, "content": after[token["id"]], **(plain if held else {})})
        tokenizer._tokenizer = type(core).from_str(json.dumps({**values, "added_tokens": tokens}))
        found = {token: place for place, token in after.items()}
        if wrong := {t: n for t, n in found.items() if tokenizer.convert_tokens_to_ids(t) != n}:
            raise ValueError(f"without {self.names} the tokenizer would number {wrong} anew: merge anew with remerge")
        return tokenizer

    # beside the tensors

    def config(self) -> Any:
        old = self.merged.config
        return changed_config(
            self.merged,
            experts={name: old.experts[name] for name in self.stay},
            default_experts=self.recipe.default_experts,
            text_route=self.recipe.text_route,
            added_tokens=join_rows(self.tokens)[1] if self.tokens else [],
        )

    def processor(self) -> MMERProcessor:
        stored = self.stored_processor
        entries = json.loads((self.merged.folder / "processor_config.json").read_text(encoding="utf-8"))["experts"]
        templates = {
            key: template
            for key, template in stored.expert_templates.items()
            if key.partition(".")[0] not in self.names
        }
        return MMERProcessor(
            self._tokenizer(),
            [entry for entry in entries if entry["name"] in self.stay],
            self.recipe.default_experts,
            self.recipe.text_route,
            stored.chat_template,
            templates,
        )

    def report(self, seconds: float) -> MergeReport:
        """The folder's report without the experts that left; nothing else in it changes."""
        report = stored_report(self.merged)
        for name in self.names:
            del report.experts[name]
            report.warnings = [warning for warning in report.warnings if f"expert {name!r}" not in warning]
            report.notes = [note for note in report.notes if not note.startswith(f"expert {name!r}")]
            report.notes.append(f"expert {name!r} was removed; {self._what_stays()}")
        if self.merged.config.text_route in self.names:
            report.notes.append(f"text_route was {self.merged.config.text_route!r} and is {AUTO!r} now")
        report.seconds = seconds
        return report

    def _what_stays(self) -> str:
        if self.kind == "exact":
            return "the merged route was made anew from the experts that stay"
        return "the merged route keeps what it shared with the others, and a remerge makes it anew"
