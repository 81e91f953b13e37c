"""A merged folder as something to go on from: its parts read by matrix, and another folder put in its place.

Enters: a merged folder that a merge wrote, with its recipe and report. Leaves: `Parts`, what is stored of one matrix,
and the place where the folder that follows is written. Invariants: what is not touched is passed on bit for bit; the
old folder stays whole until the new one is, and takes its name in one step.
"""

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from configuration_mmer.configuration_mmer import MMERConfig
from modeling_mmer.routed_weights_mmer import OWN_PARTS, unpack_bits
from processing_mmer.processing_mmer import MMERProcessor

from .checkpoints import fetch
from .encoder_sources import fetch_encoder
from .folder_checks import (
    Fault,
    MergedFolder,
    Skip,
    check_config,
    check_files,
    check_tensors,
)
from .lora import fetch_adapter
from .matrices import Decoupled
from .merge import merge, put_back, put_in_place
from .naming import HEAD, PREFIX, stored_name
from .recipe import Recipe
from .report import MergeReport
from .repository import loadable, without_paths, write_words
from .shards import ShardWriter
from .source_checks import same_bits
from .task_vectors import one_thread, task_vector
from .vocabulary import AddedVocabularyToken, Vocabulary

# what is written anew each time; all else that a folder holds is passed on
_WRITTEN = {
    "config.json", "model.safetensors.index.json", "processor_config.json", "merge_recipe.yaml", "merge_report.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates",
    "evaluation.json", "evaluation.jsonl",  # of another model now
}  # fmt: skip


def open_folder(folder: str | Path) -> MergedFolder:
    """The merged folder, whole and with recipe and report. Raises ValueError that says what is wrong with it."""
    merged = MergedFolder(fetch(str(folder)))
    if not (merged.folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: expected a folder that `mmer merge` made")
    try:
        for check in (check_config, check_files, check_tensors):
            check(merged)
        named = list(merged.recipe.experts), list(merged.report["experts"])
    except (Fault, Skip) as error:
        raise ValueError(f"{folder}: {error}. `mmer verify` tells more") from error
    if any(names != merged.config.expert_names for names in named):
        raise ValueError(
            f"{folder}: config.json has the experts {merged.config.expert_names}, its recipe and report {named}: "
            "merge anew"
        )
    return merged


def read_processor(merged: MergedFolder) -> MMERProcessor:
    found, names = list(merged.processor.experts), merged.config.expert_names
    if found != names:
        raise ValueError(
            f"{merged.folder / 'processor_config.json'} has the experts {found}, config.json {names}: expected the "
            "same. Merge anew, or download the folder again"
        )
    return merged.processor


def stored_vocabulary(merged: MergedFolder, processor: MMERProcessor) -> Vocabulary:
    """What a merge knew of the vocabulary after its experts, but for their tokens' ids in their own."""
    config = merged.config
    tokens = [AddedVocabularyToken(t["token"], t["id"], list(t["experts"]), {}) for t in config.added_tokens]
    placeholders = {
        name: {m: (entry["token"], entry["id"]) for m, entry in config.experts[name]["placeholders"].items()}
        for name in config.expert_names
    }
    written = {name: {m: own.written(m) for m in own.modalities} for name, own in processor.experts.items()}
    return Vocabulary(processor.tokenizer, tokens, placeholders, written)


def stored_report(merged: MergedFolder) -> MergeReport:
    known = {field.name for field in fields(MergeReport)}
    return MergeReport(**{key: copy.deepcopy(value) for key, value in merged.report.items() if key in known})


def language_model_names(merged: MergedFolder) -> list[str]:
    """The tensors of θ₀, by the base's names."""
    names = []
    for stored in merged.expected:
        leaf = stored.rpartition(".")[2]
        ours = leaf in (*OWN_PARTS, "delta") or leaf.startswith(("expert_", "merged_"))
        if stored.startswith((PREFIX, f"{HEAD}.")) and not ours:
            names.append(stored.removeprefix(PREFIX))
    return names


@dataclass
class Parts:
    """One matrix: delta (out, in), and of all experts masks (experts, out, ceil(in/8)), scales (experts, out | 1),
    correction_a (experts, rank, in), correction_b (experts, out, rank), where the kind of decoupling has them."""

    delta: torch.Tensor
    own: dict[str, torch.Tensor]

    @classmethod
    def read(cls, merged: MergedFolder, prefix: str) -> "Parts":
        there = [part for part in OWN_PARTS if f"{prefix}.{part}" in merged.expected]
        read = merged.checkpoint.tensor
        return cls(read(f"{prefix}.delta").clone(), {part: read(f"{prefix}.{part}") for part in there})

    @classmethod
    def empty(cls, shape: Sequence[int], experts: int, decoupling: dict[str, Any], dtype: torch.dtype) -> "Parts":
        """A matrix that none of the experts changed: masks and corrections of zeros, scales of ones."""
        (rows, columns), kind = shape, decoupling["kind"]
        own = {}
        if kind in ("mask", "paper"):
            own["masks"] = torch.zeros(experts, rows, -(-columns // 8), dtype=torch.uint8)
        if kind == "mask" and decoupling["scale"] != "none":
            own["scales"] = torch.ones(experts, rows if decoupling["scale"] == "row" else 1, dtype=dtype)
        rank = min(decoupling["rank"], rows, columns)
        if kind in ("mask", "exact") and rank:
            own["correction_a"] = torch.zeros(experts, rank, columns, dtype=dtype)
            own["correction_b"] = torch.zeros(experts, rows, rank, dtype=dtype)
        return cls(torch.zeros(rows, columns, dtype=dtype), own)

    def claimed(self, rows: slice, experts: Sequence[int] | None = None) -> torch.Tensor:
        """bool (rows, in): where some expert (of `experts`) has a bit, so that its route reads the merged vector."""
        masks = self.own["masks"][:, rows]
        joint = torch.zeros_like(masks[0])
        for place in range(len(masks)) if experts is None else experts:
            joint |= masks[place]
        return unpack_bits(joint, self.delta.shape[1])

    def low_rank(self, expert: int) -> torch.Tensor:
        """BᵢAᵢ, fp32 (out, in); of kind exact that is τᵢ."""
        if "correction_a" not in self.own:
            return torch.zeros(self.delta.shape)
        with one_thread():
            return self.own["correction_b"][expert].float() @ self.own["correction_a"][expert].float()

    def widen(self, rank: int, where: str):
        """Pad the factors to `rank` with zeros. Raises ValueError where a product would change by a bit."""
        missing = rank - self.own["correction_a"].shape[1] if "correction_a" in self.own else 0
        if not missing:
            return
        experts = range(len(self.own["correction_a"]))
        before = [self.low_rank(expert) for expert in experts]
        self.own["correction_a"] = torch.nn.functional.pad(self.own["correction_a"], (0, 0, 0, missing))
        self.own["correction_b"] = torch.nn.functional.pad(self.own["correction_b"], (0, missing))
        if not all(same_bits(self.low_rank(expert), old) for expert, old in zip(experts, before)):
            raise ValueError(
                f"{where}: with factors padded to rank {rank} their products round in another way here, so the others "
                "would not stay as they are. Add a LoRA of no larger rank, or merge all anew with remerge"
            )

    def append(self, own: Decoupled):
        for part, tensor in own.stored().items():
            self.own[part] = torch.cat([self.own[part], tensor.unsqueeze(0)])

    def keep(self, experts: Sequence[int]):
        self.own = {part: tensor[list(experts)] for part, tensor in self.own.items()}

    def items(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(stored name, tensor) of each part, in the order of a merge."""
        yield f"{prefix}.delta", self.delta
        for part in OWN_PARTS:
            if part in self.own:
                yield f"{prefix}.{part}", self.own[part]


def own_tensors(merged: MergedFolder, name: str, theta_0: torch.Tensor) -> list[torch.Tensor]:
    """Each expert's own copy of a small tensor: θ₀ where none has one."""
    if name not in merged.config.expert_tensors:
        return [theta_0.to(merged.dtype)] * len(merged.config.expert_names)
    prefix, _, leaf = stored_name(name).rpartition(".")
    return list(merged.checkpoint.tensor(f"{prefix}.expert_{leaf}"))


def stored_task_vector(merged: MergedFolder, name: str, theta_0: torch.Tensor, expert: int) -> torch.Tensor:
    """τᵢ of one tensor, fp32, from the folder alone: what kind exact and copies of small tensors keep of it."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in merged.config.delta_modules:
        return Parts.read(merged, stored_name(name).removesuffix(".weight")).low_rank(expert)
    return task_vector(own_tensors(merged, name, theta_0)[expert], theta_0)


def changed_config(merged: MergedFolder, tied: bool | None = None, **changes: Any) -> MMERConfig:
    """config.json of a folder with some fields changed. `tied`: whether head and embedding are one; as before."""
    old = merged.config
    text = without_paths(old.text_config.to_dict())
    if tied is not None:
        text["tie_word_embeddings"] = tied
    fields = ("experts", "default_experts", "delta_modules", "expert_tensors", "decoupling", "added_tokens")
    values = {field: getattr(old, field) for field in (*fields, "text_route")}
    return loadable(MMERConfig(text_config=text, **{**values, **changes}), merged.dtype)


def originals_at_hand(recipe: Recipe):
    """Fetch base and experts. Raises ValueError that names every one that is not to be had."""
    places: list[tuple[str, str, Callable[[str], Path]]] = [("base", recipe.base, fetch)]
    for name, expert in recipe.experts.items():
        encoder = expert.encoder
        encoders = list(encoder.values()) if isinstance(encoder, dict) else [encoder]
        open_encoder = partial(fetch_encoder, where=f"experts.{name}.encoder")
        given = [("model", expert.model, fetch), ("lora", expert.lora, fetch_adapter), ("tower", expert.tower, fetch)]
        given += [("encoder", source, open_encoder) for source in encoders]
        places += [(f"experts.{name}.{key}", source, opener) for key, source, opener in given if source is not None]
    lost = []
    for place, source, opener in places:
        try:
            opener(source)
        except (ValueError, OSError):  # as huggingface_hub says that something is not there, or cannot be reached
            lost.append(f"{place}: {source}")
    if lost:
        raise ValueError(
            f"remerge needs the base and all original experts, and these are not to be had: {'; '.join(lost)}"
        )


# the folder that follows


def target_of(folder: str | Path, out: str | Path | None) -> Path:
    """Where the new folder goes: `out`, or the place of the old one. Raises ValueError where it may not go there."""
    here = Path(folder).expanduser()
    _restore(here)
    if out is None:
        if not here.is_dir():
            raise ValueError(f"{folder} is no folder here, so nothing can be put in its place: give out")
        return here.resolve()
    target = Path(os.path.abspath(out))
    if target.exists() and target.resolve() != here.resolve() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty. Give another folder")
    return target.resolve()


def _workplace(target: Path) -> Path:
    return target.parent / f".{target.name}.rewrite"


def _restore(folder: Path):
    """Give an old folder its name back, where its successor did not get it: a process killed between two renamings."""
    target = folder.resolve()
    put_back(_workplace(target), target)


@contextmanager
def rewriting(target: Path) -> Iterator[Path]:
    """An empty folder of the same name to write into; it takes the place of `target` when the block ends well."""
    workplace = _workplace(target)
    shutil.rmtree(workplace, ignore_errors=True)
    unfinished = workplace / target.name
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        put_in_place(unfinished, target)
    finally:
        _restore(target)
        shutil.rmtree(workplace, ignore_errors=True)


class Change(Protocol):
    """What becomes of a merged folder: its tensors, and the words beside them."""

    recipe: Recipe

    def write_tensors(self, writer: ShardWriter, progress: bool): ...

    def config(self) -> MMERConfig: ...

    def processor(self) -> MMERProcessor: ...

    def report(self, seconds: float) -> MergeReport: ...


@dataclass(frozen=True)
class Rewriting:
    """How a merged folder is written anew; the arguments are those of `add` and `remove`."""

    merged: MergedFolder
    target: Path
    base: str | None
    progress: bool
    max_shard_size: str | int
    trust_remote_code: bool
    finish: Callable[[Path], object] | None

    def from_originals(self, recipe: Recipe) -> MergeReport:
        """The folder that `merge` makes of `recipe`. Raises ValueError for originals that are not at hand."""
        recipe = recipe if self.base is None else recipe.model_copy(update={"base": self.base})
        originals_at_hand(recipe)
        in_place = self.target == self.merged.folder.resolve()
        return merge(
            recipe, self.target, self.progress, self.max_shard_size, in_place, self.trust_remote_code, self.finish
        )

    def changed(self, change: Change, started: float) -> MergeReport:
        """The folder with `change`, in its place whole; what is not touched of it is passed on."""
        with rewriting(self.target) as unfinished:
            writer = ShardWriter(unfinished, self.max_shard_size)
            change.write_tensors(writer, self.progress)
            config, report = change.config(), change.report(time.monotonic() - started)
            write_words(unfinished, change.recipe, config, change.processor(), report)
            writer.close()
            pass_on(self.merged.folder, unfinished)
            if self.finish is not None:
                self.finish(unfinished)
        return report


def pass_on(old: Path, new: Path):
    """Copy what the old folder holds beside weights, code and what was written anew: a licence, results, …"""
    for path in sorted(old.iterdir()):
        weights = path.name.startswith("model") and path.suffix == ".safetensors"
        if path.name in _WRITTEN or weights or path.name.endswith("_mmer.py") or (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name)  # the Hub's cache holds links; the copy holds files
        else:
            shutil.copy2(path, new / path.name)
