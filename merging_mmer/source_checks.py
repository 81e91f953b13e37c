"""The checks of a merged folder against what it was made from: the base, and the original experts.

Enters: `MergedFolder`, and `Sources`, which finds base and experts where the recipe or the caller says they are.
Leaves: for each check what it saw, or a `Fault` or `Skip`. Invariants: an expert's parameters come from the stored
parts through the routing code that inference uses, never through the merge's; one tensor of the base and of each
expert is in memory at a time.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoTokenizer

from configuration_mmer.routes_mmer import FIRST_EXPERT_ROUTE
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import PARTS
from modeling_mmer.routing_mmer import route_weight_of

from .checkpoints import fetch
from .experts import Base, Expert, open_expert
from .folder_checks import REPORT, Fault, MergedFolder, Skip
from .input_hashes import sha256
from .matrices import row_blocks
from .naming import listing, stored_name
from .recipe import ExpertRecipe, Recipe
from .report import tensor_kind
from .tokenization import PROBES

_SOURCES = ("model", "lora", "tower")  # the fields of an expert in a recipe that name a place

# how far a residual may lie from the reported one: sums in another order, and of θ₀'s size where τ is small
_RELATIVE, _ROUNDING = 1e-4, 1e-6


def at_hand(source: str, download: bool = False) -> Path | None:
    """The folder of a source: itself, or the Hub's copy in the cache; None where it is neither, unless `download`."""
    if download:
        return fetch(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    repo_id, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        return None
    try:
        cached = Path(snapshot_download(repo_id, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return cached if any(cached.glob("*.safetensors")) or any(cached.glob("*.bin")) else None


@dataclass
class Sources:
    """Where base and experts are. `base` goes before the recipe's. `recipe` is another one than the folder's own;
    `originals`: the experts are wanted, and fetched where they are not at hand."""

    merged: MergedFolder
    base_source: str | None = None
    originals: bool = False
    other_recipe: Recipe | None = None
    trust_remote_code: bool = False
    _opened: dict[str, Expert] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        if self.other_recipe is not None:
            return self.other_recipe
        try:
            return self.merged.recipe
        except Fault as error:
            raise Skip("the recipe does not load: see recipe") from error

    @cached_property
    def base_folder(self) -> Path:
        if self.base_source is not None:
            return fetch(self.base_source)
        try:
            source = self.recipe.base
        except Skip as skip:
            raise Skip(f"{skip}. Name the base with --base") from skip
        folder = at_hand(source, self.originals)
        if folder is None:
            raise Skip(f"the base {source} is not at hand. Name its place with --base")
        return folder

    @cached_property
    def base(self) -> Base:
        base = Base(str(self.base_folder), self.trust_remote_code)
        if base.tied and not self.merged.config.text_config.tie_word_embeddings:
            base.untie()
        return base

    @cached_property
    def base_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base_folder, trust_remote_code=self.trust_remote_code)

    def expert_folders(self, name: str) -> dict[str, Path]:
        """Field of the recipe -> folder, for what is at hand of an expert (all of it when originals are wanted)."""
        own, folders = self.recipe.experts.get(name), {}
        if own is None:
            raise Skip(f"the recipe has no expert {name!r}: see recipe")
        for key in _SOURCES:
            source = getattr(own, key, None)
            if isinstance(source, str) and (folder := at_hand(source, self.originals)) is not None:
                folders[key] = folder
        return folders

    def encoder_folders(self, name: str) -> list[Path]:
        """Where the encoders that the recipe names for an expert are, as far as they are at hand."""
        own = self.recipe.experts.get(name)
        given = None if own is None else own.encoder
        sources = list(given.values()) if isinstance(given, dict) else [given] if given else []
        files = [Path(source).expanduser() for source in sources]
        places = [
            file.parent if file.is_file() else at_hand(source) for source, file in zip(sources, files, strict=True)
        ]
        return [place for place in places if place is not None]

    @cached_property
    def experts(self) -> list[Expert]:
        """The original experts, in the order of the masks."""
        if not self.originals:
            raise Skip("not asked for: --originals compares with the original experts")
        opened = []
        for name in self.merged.config.expert_names:
            folders = {key: str(folder) for key, folder in self.expert_folders(name).items()}
            own: ExpertRecipe = self.recipe.experts[name].model_copy(update=folders)
            opened.append(open_expert(name, own, self.base, self.trust_remote_code))
        return opened


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def all_or_skip(differing: list[str], unseen: list[str], what: str, expected: str):
    if differing:
        raise Fault(f"{len(differing)} tensors differ: {listing(differing)}", expected)
    if unseen:
        raise Skip(f"{listing(unseen)} could not be read (see tensors and finite); all other {what} agree")


def check_sources(merged: MergedFolder, sources: Sources) -> str:
    """The files of base and experts that are at hand have the sha256 that the report has."""
    report, seen, absent = merged.report, 0, []
    folders: dict[str, list[Path]] = {}
    try:
        folders["base"] = [sources.base_folder]
    except Skip:
        folders["base"] = []
    for name in merged.config.expert_names:
        folders[name] = [*sources.expert_folders(name).values(), *sources.encoder_folders(name)]
    wanted = {"base": report["base"].get("sha256", {})}
    wanted |= {name: report["experts"].get(name, {}).get("sha256", {}) for name in merged.config.expert_names}
    for name, hashes in wanted.items():
        for label, digest in hashes.items():
            file = label.partition(" (")[0]
            paths = [folder / file for folder in folders[name] if (folder / file).is_file()]
            if not paths:
                absent.append(f"{name}/{label}")
                continue
            found = {sha256(path): path for path in paths}
            if digest not in found:
                raise Fault(f"{paths[0]} ({name}) has sha256 {next(iter(found))}", f"{digest}, as {REPORT} says")
            seen += 1
    if not seen:
        raise Skip(f"none of the {len(absent)} files that the merge read is at hand")
    return f"{seen} files" + (f"; not at hand: {listing(absent)}" if absent else "")


def check_base(merged: MergedFolder, sources: Sources) -> str:
    """θ₀ is the base's, bit for bit, in the folder's dtype."""
    base, differing, unseen = sources.base, [], []
    for name in base.names:
        if stored_name(name) not in merged.expected:
            raise Fault(f"the base has {name}", f"no such tensor, by config.json: is {base.folder} the base?")
        try:
            stored = merged.read(stored_name(name))
        except Skip:
            unseen.append(name)
            continue
        if not same_bits(stored, base.tensor(name).to(stored.dtype)):
            differing.append(name)
    all_or_skip(differing, unseen, "tensors of the base", f"the bits of {base.folder}")
    return f"{len(base.names)} tensors, bit for bit those of {base.folder}"


def check_tokenizer(merged: MergedFolder, sources: Sources) -> str:
    """The base's tokens keep their ids, and text without added tokens becomes the base's ids."""
    base, own = sources.base_tokenizer, merged.tokenizer
    ours = own.get_vocab()
    for token, token_id in base.get_vocab().items():
        if ours.get(token) != token_id:
            raise Fault(f"{token!r} has id {ours.get(token)}", f"{token_id}, as in the base")
    for text in PROBES:
        found, expected = own(text)["input_ids"], base(text)["input_ids"]
        if found != expected:
            raise Fault(f"{text!r} becomes {found}", f"{expected}, as in the base")
    return f"{len(base)} tokens of the base, {len(own) - len(base)} behind them"


class _Residual:
    """‖θ̂-θ‖², ‖τ‖² and ‖θ₀‖² in fp64, by kind of tensor and in all."""

    def __init__(self):
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, kind: str, error: torch.Tensor, tau: torch.Tensor, theta_0: torch.Tensor):
        values = [float(part.double().square().sum()) for part in (error, tau, theta_0)]
        for key in (kind, "total"):
            self.sums[key] = [a + b for a, b in zip(self.sums[key], values)]

    def share(self, kind: str = "total") -> float:
        error, tau, _ = self.sums[kind]
        return (error / tau) ** 0.5 if tau else 0.0

    def allowed(self, kind: str) -> float:
        _, tau, theta_0 = self.sums[kind]
        return _RELATIVE * self.share(kind) + (_ROUNDING * (theta_0 / tau) ** 0.5 if tau else 0.0)


def check_residuals(merged: MergedFolder, sources: Sources) -> str:
    """‖θ̂ᵢ-θᵢ‖/‖τᵢ‖ of every expert, from the stored tensors, is what the report says (where there is one)."""
    experts, base, tokens = sources.experts, sources.base, len(sources.base_tokenizer)
    found = {expert.name: _Residual() for expert in experts}
    for name in base.names:
        theta_0 = base.tensor(name)
        taus = [expert.task_vector(name, theta_0, tokens) for expert in experts]
        module = name.removesuffix(".weight")
        stored = module in merged.config.delta_modules or name in merged.config.expert_tensors
        if not stored and not any(bool(tau.any()) for tau in taus):
            continue
        for route, (expert, tau) in enumerate(zip(experts, taus, strict=True)):
            for rows, theta in _recovered(merged, name, route):
                error = theta.float() - theta_0[rows].float() - tau[rows]
                found[expert.name].add(tensor_kind(name), error, tau[rows], theta_0[rows])
    words = ", ".join(f"{name} {residual.share():.4f}" for name, residual in found.items())
    try:
        report = merged.report
    except Skip as skip:
        return f"{words} (no report to compare with: {skip})"
    for name, residual in found.items():
        said = report["experts"].get(name, {})
        kinds = {"total": said.get("total", {}), **said.get("tensors", {})}
        for kind, shares in kinds.items():
            wanted = shares.get("residual", -1.0)
            if abs(residual.share(kind) - wanted) > residual.allowed(kind):
                raise Fault(
                    f"expert {name!r}: residual {residual.share(kind):.6f} ({kind})", f"{wanted:.6f}, as {REPORT} says"
                )
    return words


def _recovered(merged: MergedFolder, name: str, expert: int) -> Iterable[tuple[slice, torch.Tensor]]:
    """(rows, θ̂ of one expert in them), by blocks, as inference makes it."""
    module, _, leaf = name.rpartition(".")
    if module in merged.config.delta_modules and leaf == "weight":
        matrix = routed_matrix(merged, stored_name(name).removesuffix(".weight"))
        with torch.no_grad():
            for rows in row_blocks(matrix.weight):
                yield rows, matrix.route_weight(FIRST_EXPERT_ROUTE + expert, rows)
        return
    if name not in merged.config.expert_tensors:
        raise Fault(f"an original expert changed {name}, of which config.json has nothing", "a delta or a copy of it")
    yield slice(None), merged.read(f"{stored_name(module + '.')}expert_{leaf}")[expert]


def routed_matrix(merged: MergedFolder, prefix: str) -> Any:
    """A linear of the routing code that holds the stored parts of one matrix."""
    rows, columns = merged.expected[f"{prefix}.weight"].shape
    matrix: Any = nn.Linear(columns, rows, bias=False, device="meta")
    route_weight_of(matrix, len(merged.config.experts), merged.config.decoupling)
    for part in PARTS:
        tensor = merged.part(prefix, part)
        setattr(matrix, part, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    return matrix


def check_towers(merged: MergedFolder, sources: Sources) -> str:
    """Every tensor of every tower is the original's, bit for bit."""
    differing, unseen, seen = [], [], 0
    for expert in sources.experts:
        for name in expert.tower:
            place = f"model.experts.{expert.name}.{name}"
            try:
                stored = merged.read(place)
            except Skip:
                unseen.append(place)
                continue
            seen += 1
            if not same_bits(stored, expert.tower_tensor(name).to(stored.dtype)):
                differing.append(place)
    all_or_skip(differing, unseen, "tensors of the towers", "the bits of the original experts")
    return f"{seen} tensors"


def check_load(merged: MergedFolder, sources: Sources) -> str:
    """The loaded model's base route gives the logits of the base's own class, bit for bit."""
    model: Any = MMERForConditionalGeneration.from_pretrained(merged.folder, dtype=merged.dtype).eval()
    kind: Any = type(sources.base.weights.model)
    base: Any = kind.from_pretrained(sources.base_folder, dtype=merged.dtype).eval()
    for text in PROBES:
        ids = torch.tensor([merged.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            found, expected = model(input_ids=ids, text_route="base").logits, base(input_ids=ids).logits
        if not same_bits(found, expected):
            worst = float((found - expected).abs().max())
            raise Fault(
                f"on {text!r} the logits of the base route lie up to {worst:.3g} apart", "the base's, bit for bit"
            )
    return f"{len(PROBES)} prompts"
