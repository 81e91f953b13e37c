"""The checks that a merged folder can answer by itself, without the base or the experts it was made from.

Enters: `MergedFolder`, a folder with its config. Leaves: for each check nothing where all is well, else a `Fault` that
says what was found and what was expected. Invariants: no check changes anything or runs the folder's own code, one
matrix with its masks is in memory at a time, and a check that cannot be made says why (`Skip`).
"""

from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from configuration_mmer.configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import write_hub_code
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import pack_bits, unpack_bits
from processing_mmer.processing_mmer import MMERProcessor

from . import pretrained
from .checkpoints import Checkpoint
from .matrices import row_blocks
from .naming import listing, stored_name
from .recipe import Recipe
from .report import misplaced, tensor_kind

RECIPE, REPORT = "merge_recipe.yaml", "merge_report.json"


class Fault(Exception):
    """A check failed: what was found, and what was expected."""

    def __init__(self, found: str, expected: str):
        super().__init__(f"{found}; expected {expected}")
        self.found, self.expected = found, expected


class Skip(Exception):
    """A check that cannot be made here, and why."""


class Remark(Exception):
    """Something worth knowing that makes no folder wrong."""


class MergedFolder:
    """A merged folder, opened piece by piece: what is broken raises where it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def config(self) -> MMERConfig:
        path = self.folder / pretrained.CONFIG
        pretrained.check_numbers(path, values := pretrained.read_json(path))
        if values.get("model_type") != "mmer":
            raise ValueError(f"config.json has model_type {values.get('model_type')!r}, a merged folder has 'mmer'")
        with pretrained.naming(path):
            return MMERConfig.from_pretrained(self.folder)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        """Every tensor that the config demands, by its name in the files, on the meta device."""
        with torch.device("meta"):
            model = MMERForConditionalGeneration(self.config)
        tied = set(model.all_tied_weights_keys)
        return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model in the files."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        # given the LLM's config, transformers does not look at the folder's own code
        return pretrained.load_tokenizer(self.folder, config=self.config.text_config)

    @cached_property
    def processor(self) -> MMERProcessor:
        pretrained.check_files(self.folder, *pretrained.PROCESSOR_PARTS, *pretrained.TOKENIZER_PARTS)
        with pretrained.naming(pretrained.processor_files(self.folder)):
            return MMERProcessor.from_pretrained(self.folder, config=self.config.text_config, trust_remote_code=False)

    @cached_property
    def sound(self) -> set[str]:
        """Names of the tensors whose shape in the files is the demanded one."""
        there = set(self.checkpoint.keys())
        return {n for n, t in self.expected.items() if n in there and self.checkpoint.shape(n) == tuple(t.shape)}

    @cached_property
    def report(self) -> dict[str, Any]:
        path = self.folder / REPORT
        if not path.is_file():
            raise Skip(f"there is no {REPORT}; a folder that save_pretrained wrote has none")
        try:
            report = pretrained.read_json(path)
        except ValueError as error:
            raise Fault(str(error), "what the merge wrote") from error
        if not {"base", "experts", "dtype", "tensors"} <= set(report):
            raise Fault(f"{REPORT} lacks base, experts, dtype or tensors", "what the merge wrote")
        if wrong := misplaced(report):
            raise Fault(f"{REPORT}: {wrong} is of another form", "what the merge wrote")
        return report

    @cached_property
    def recipe(self) -> Recipe:
        path = self.folder / RECIPE
        if not path.is_file():
            raise Skip(f"there is no {RECIPE}; a folder that save_pretrained wrote has none")
        try:
            return Recipe.load(path)
        except ValueError as error:
            raise Fault(str(error), "a recipe that loads") from error

    def matrices(self) -> Iterator[tuple[str, str]]:
        """(name of the module relative to the language model, stored prefix) of every matrix with a delta."""
        for module in self.config.delta_modules:
            yield module, stored_name(f"{module}.x").removesuffix(".x")

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor. Raises Skip where it is missing, of another shape or not finite: other checks say so."""
        if name not in self.sound:
            raise Skip(f"{name} is missing or has another shape than config.json demands: see tensors")
        if self.checkpoint.dtype(name).is_floating_point != self.expected[name].is_floating_point():
            raise Skip(f"{name} is {self.checkpoint.dtype(name)}: see tensors")
        try:
            return self.checkpoint.tensor(name)
        except ValueError as error:
            raise Skip(f"{name} has NaN or infinite values: see finite") from error

    def part(self, prefix: str, part: str) -> torch.Tensor | None:
        """A stored part of a matrix ("masks", "delta", …); None where the config gives it none. Raises as `read`."""
        name = f"{prefix}.{part}"
        return self.read(name) if name in self.expected else None


def check_config(merged: MergedFolder) -> str:
    config = merged.config
    try:
        demanded = len(merged.expected)
    except Exception as error:  # a model of this config cannot be built, whatever of transformers says so
        raise Fault(f"no model can be built from config.json: {error}", "a config whose parts fit together") from error
    kind = config.decoupling["kind"]
    return f"experts {', '.join(config.expert_names)}, decoupling {kind}, {demanded} tensors"


def check_files(merged: MergedFolder) -> str:
    index, single = merged.folder / "model.safetensors.index.json", merged.folder / "model.safetensors"
    there = {path.name for path in merged.folder.glob("*.safetensors")}
    if index.is_file() and single.is_file():
        raise Fault("both model.safetensors and model.safetensors.index.json are there", "one or the other")
    checkpoint = merged.checkpoint
    unused = sorted(there - {path.name for path in checkpoint.files})
    if unused:
        raise Fault(f"{unused} is used by nothing", f"only {[path.name for path in checkpoint.files]}")
    total = sum(stored_bytes(checkpoint, name) for name in checkpoint.keys())
    if index.is_file():
        written = pretrained.read_json(index)
        promised, metadata = set(written["weight_map"]), written.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise Fault(f"{index.name}: metadata is {type(metadata).__name__}", "a mapping")
        said = metadata.get("total_size", total)
        if left := set(checkpoint.keys()) - promised:
            raise Fault(f"the index does not name {listing(left)}", "every tensor of every shard")
        if said != total:
            raise Fault(f"the index says {said} bytes, the shards hold {total}", "the same")
    return f"{len(checkpoint.files)} weight files, {len(checkpoint.keys())} tensors, {total} bytes"


def stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    return torch.Size(checkpoint.shape(name)).numel() * checkpoint.dtype(name).itemsize


def check_tensors(merged: MergedFolder) -> str:
    checkpoint, there = merged.checkpoint, set(merged.checkpoint.keys())
    faults: list[tuple[str, str]] = []
    if missing := set(merged.expected) - there:
        faults.append((f"{listing(missing)} missing", "every tensor that config.json demands"))
    if strangers := there - set(merged.expected):
        faults.append((f"{listing(strangers)} too many", "no tensor that config.json does not demand"))
    for name in sorted(there & set(merged.expected)):
        wanted = merged.expected[name]
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        if shape != tuple(wanted.shape):
            faults.append((f"{name} has shape {shape}", f"{tuple(wanted.shape)}"))
        own = wanted.is_floating_point() and not name.startswith("model.experts.")
        right = dtype == (merged.dtype if own else wanted.dtype)
        if not right and not (name.startswith("model.experts.") and dtype.is_floating_point):
            faults.append((f"{name} is {dtype}", f"{merged.dtype if own else wanted.dtype}"))
    if faults:
        shown = faults[:8]
        more = f", and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
        raise Fault("; ".join(found for found, _ in shown) + more, "; ".join(dict.fromkeys(e for _, e in shown)))
    return f"all {len(there)}"


def check_finite(merged: MergedFolder) -> str:
    broken, seen = [], 0
    for name in merged.checkpoint.keys():
        if not merged.checkpoint.dtype(name).is_floating_point:
            continue
        seen += 1
        try:
            merged.checkpoint.tensor(name)
        except ValueError as error:
            broken.append(str(error).partition(": ")[2].partition(". ")[0])
    if broken:
        raise Fault("; ".join(broken[:8]), "numbers")
    return f"{seen} tensors of floats"


def check_masks(merged: MergedFolder) -> str:
    """Bits behind the last column are 0, and so are bits where τ* is 0."""
    matrices = 0
    for module, prefix in merged.matrices():
        masks, delta = merged.part(prefix, "masks"), merged.part(prefix, "delta")
        if masks is None or delta is None:
            continue
        matrices += 1
        for expert, of in zip(merged.config.expert_names, masks, strict=True):
            for rows in row_blocks(delta):
                bits, where = unpack_bits(of[rows], delta.shape[1]), f"{module}, expert {expert!r}"
                if beyond := int((pack_bits(bits) != of[rows]).sum()):
                    raise Fault(f"{where}: {beyond} bytes have bits behind the last column", "0 in the padding bits")
                if idle := int((bits & (delta[rows] == 0)).sum()):
                    raise Fault(f"{where}: {idle} bits are 1 where the merged vector is 0", "0 there")
    if not matrices:
        raise Skip(f"decoupling of kind {merged.config.decoupling['kind']!r} has no masks")
    return f"{matrices} matrices, {len(merged.config.expert_names)} experts"


def check_scales(merged: MergedFolder) -> str:
    """Scales are positive, since a mask keeps entries of the expert's own sign alone, and 1 beside an empty mask."""
    matrices = 0
    for module, prefix in merged.matrices():
        masks, scales = merged.part(prefix, "masks"), merged.part(prefix, "scales")
        if scales is None or masks is None:
            continue
        matrices += 1
        empty = ~masks.bool().any(-1)  # (experts, out)
        empty = empty if scales.shape[1] == empty.shape[1] else empty.all(-1, keepdim=True)
        for expert, own, unused in zip(merged.config.expert_names, scales, empty, strict=True):
            where = f"{module}, expert {expert!r}"
            if bool((own <= 0).any()):
                raise Fault(f"{where}: a scale is {float(own.min()):.4g}", "scales above 0")
            if bool((own[unused] != 1).any()):
                raise Fault(f"{where}: a scale beside an empty mask is not 1", "1 there")
    if not matrices:
        raise Skip("this decoupling has no scales")
    return f"{matrices} matrices"


def check_density(merged: MergedFolder) -> str:
    """The share of ones in the masks, by kind of tensor and in all, is the report's."""
    report = merged.report
    ones: dict[str, dict[str, list[int]]] = {name: {} for name in merged.config.expert_names}
    for module, prefix in merged.matrices():
        masks = merged.part(prefix, "masks")
        if masks is None:
            continue
        shape = merged.expected[f"{prefix}.delta"].shape
        for expert, of in zip(merged.config.expert_names, masks, strict=True):
            bits = sum(int(unpack_bits(of[rows], shape[1]).sum()) for rows in row_blocks(of))
            for kind in (tensor_kind(f"{module}.weight"), "total"):
                sums = ones[expert].setdefault(kind, [0, 0])
                sums[0] += bits
                sums[1] += shape.numel()
    if not any(ones.values()):
        raise Skip(f"decoupling of kind {merged.config.decoupling['kind']!r} has no masks")
    for expert, kinds in ones.items():
        said = report["experts"].get(expert, {})
        for kind, (on, of_all) in kinds.items():
            shares = said.get("total", {}) if kind == "total" else said.get("tensors", {}).get(kind, {})
            wanted = shares.get("mask_density")
            if wanted is None or abs(on / of_all - wanted) > 1e-9:
                raise Fault(
                    f"expert {expert!r}: {on / of_all:.6f} of the mask bits are 1 ({kind})",
                    f"{wanted}, as {REPORT} says",
                )
    totals = {expert: kinds["total"] for expert, kinds in ones.items()}
    return ", ".join(f"{expert} {on / of_all:.1%}" for expert, (on, of_all) in totals.items())


def check_processor(merged: MergedFolder) -> str:
    try:
        processor = merged.processor
    except ValueError as error:
        raise Fault(f"it does not load: {error}", "a processor") from error
    if list(processor.experts) != merged.config.expert_names:
        raise Fault(
            f"the processor's experts are {list(processor.experts)}", f"{merged.config.expert_names}, in order"
        )
    if processor.text_route != merged.config.text_route:
        raise Fault(
            f"the processor's text_route is {processor.text_route!r}", f"config.json's {merged.config.text_route!r}"
        )
    if (merged.folder / "generation_config.json").is_file():
        pretrained.check_generation(merged.folder)
    return f"{len(processor.tokenizer)} tokens; takes {', '.join(processor.default_experts)}"


def check_placeholders(merged: MergedFolder) -> str:
    """config.json, processor_config.json and the tokenizer agree on every placeholder and every added token."""
    config = merged.config
    path = merged.folder / "processor_config.json"
    if not path.is_file():
        raise Fault("there is no processor_config.json", "one")
    entries = pretrained.read_json(path).get("experts") or []
    found = {entry["name"]: entry["placeholders"] for entry in entries}
    for name in config.expert_names:
        for modality, wanted in config.experts[name]["placeholders"].items():
            own = found.get(name, {}).get(modality) or {}
            if (own.get("token"), own.get("id")) != (wanted["token"], wanted["id"]):
                raise Fault(
                    f"experts.{name}.{modality} is {own.get('token')!r} ({own.get('id')}) in processor_config.json",
                    f"{wanted['token']!r} ({wanted['id']}), as in config.json",
                )
        if extra := set(found.get(name, {})) - set(config.modalities(name)):
            raise Fault(f"processor_config.json has {sorted(extra)} for expert {name!r}", "what config.json has")
    vocabulary = merged.tokenizer.get_vocab()
    placeholders = [p for name in config.expert_names for p in config.experts[name]["placeholders"].values()]
    for token in [*placeholders, *config.added_tokens]:
        if vocabulary.get(token["token"]) != token["id"]:
            raise Fault(
                f"the tokenizer has {token['token']!r} at {vocabulary.get(token['token'])}",
                f"{token['id']}, as in config.json",
            )
    return f"{len(placeholders)} placeholders, {len(config.added_tokens)} added tokens"


def check_recipe(merged: MergedFolder) -> str:
    """The recipe says what the report and the config say: sources, coefficients, method, decoupling, experts."""
    recipe, config = merged.recipe.resolved(), merged.config
    pairs: list[tuple[str, Any, Any]] = [
        ("experts", list(recipe["experts"]), config.expert_names),
        ("text_route", recipe["text_route"], config.text_route),
        ("decoupling.kind", recipe["decoupling"]["kind"], config.decoupling["kind"]),
        ("decoupling.scale", recipe["decoupling"]["scale"], config.decoupling["scale"]),
    ]
    if config.decoupling["kind"] != "exact":  # whose rank is the adapters'
        pairs.append(("decoupling.rank", recipe["decoupling"]["rank"], config.decoupling["rank"]))
    pairs += [(f"default_experts.{m}", n, config.default_experts[m]) for m, n in recipe["default_experts"].items()]
    for where, found, expected in pairs:
        if found != expected:
            raise Fault(f"{RECIPE}: {where} is {found!r}", f"{expected!r}, as in config.json")
    written = yaml.safe_load((merged.folder / RECIPE).read_text(encoding="utf-8"))
    report = merged.report
    pairs = [("base", recipe["base"], report["base"].get("source"))]
    pairs += _pairs("method", recipe["method"], written.get("method"), report["method"])
    said = {key: value for key, value in report["decoupling"].items() if key != "rank"}
    pairs += _pairs("decoupling", {**recipe["decoupling"], "rank": None}, {}, said)
    if recipe["dtype"] is not None:
        pairs.append(("dtype", recipe["dtype"], report["dtype"]))
    for name, expert in recipe["experts"].items():
        pairs += _pairs(f"experts.{name}", expert, written["experts"][name], report["experts"].get(name, {}))
    for where, found, expected in pairs:
        if found != expected:
            raise Fault(f"{RECIPE}: {where} is {found!r}", f"{expected!r}, as in {REPORT}")
    return f"{RECIPE}, {REPORT} and config.json agree"


def _pairs(where: str, recipe: dict[str, Any], written: Any, said: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, of the recipe, of the report) for each field that the recipe's file or the report has. A default that
    is in neither came with a later version."""
    own = written if isinstance(written, dict) else {}
    return [(f"{where}.{key}", value, said.get(key)) for key, value in recipe.items() if key in own or key in said]


def check_code(merged: MergedFolder) -> str:
    """The folder's code is what this version would write."""
    with TemporaryDirectory() as temporary:
        current = {path.name: path.read_bytes() for path in write_hub_code(temporary)}
    there = {path.name: path.read_bytes() for path in merged.folder.glob("*_mmer.py")}
    if not there:
        raise Fault("no *_mmer.py", "the code that runs the model, or nobody can load the folder from the Hub")
    if gone := sorted(set(_names(merged.config.auto_map)) - {name.removesuffix(".py") for name in there}):
        raise Fault(f"auto_map names {gone}, whose files are not there", "a file for each")
    differing = sorted(name for name in {*there, *current} if there.get(name) != current.get(name))
    if differing:
        raise Remark(
            f"{listing(differing)} differ from those of the installed mmer {version('mmer')}: the folder comes from "
            f"another version (its config.json is of transformers {merged.config.transformers_version})"
        )
    return f"{len(there)} files, those of mmer {version('mmer')}"


def _names(auto_map: dict[str, str] | None) -> list[str]:
    return [entry.partition(".")[0] for entry in (auto_map or {}).values()]
