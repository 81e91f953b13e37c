"""Whether a language model fits a base, with every reason that it does not, and how far apart the two are.

Enters: a source that `inspect` has looked into, and the opened base. Leaves: `Fit`. Invariants: what the merge would
refuse does not fit, since the merge's own opening has the last word; distances are over the tensors that were read,
which are named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig

from .checkpoints import Checkpoint
from .experts import LARGEST_DISTANCE, SAME_FIELDS, Base, Distance, Expert, open_expert, sampled_matrices
from .folder_checks import MergedFolder
from .layouts import find_layout
from .naming import HEAD, PREFIX, NamedCheckpoint, class_on_meta, listing, split_names, stored_name
from .recipe import ExpertRecipe
from .task_vectors import task_vector, vocabulary_task_vector
from .vocabulary import merge_vocabulary

_NAME = "inspected"  # the name that this expert has while it is opened; no message shows it


@dataclass
class Fit:
    """`reasons` are all that keep the two apart. distance: ‖τ‖/‖θ₀‖, cosine: of θ and θ₀, equal: share of entries
    exactly equal, all over the matrices in `compared`; changed: which of all tensors read differ; None where nothing
    could be compared."""

    base: str
    reasons: list[str] = field(default_factory=list)
    distance: float | None = None
    cosine: float | None = None
    equal: float | None = None
    compared: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    tensors: int = 0

    @property
    def fits(self) -> bool:
        return not self.reasons


@dataclass
class _Side:
    """A language model by the base's names: shapes, and how to read τ of a tensor."""

    config: PreTrainedConfig
    shapes: dict[str, tuple[int, ...]]
    tau: Callable[[str, torch.Tensor, int], torch.Tensor]


def compare(
    folder: Path,
    kind: str,
    base: Base,
    tower: str | None = None,
    every: bool = False,
    trust_remote_code: bool = False,
    encoder: str | dict[str, str] | None = None,
    lora_key: str | None = None,
) -> Fit:
    """Compare what lies in `folder` (of the `kind` that inspect found) with `base`."""
    fit = Fit(base.source)
    tokens = len(AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code))
    side: _Side | None = None
    foreign = kind == "multimodal checkpoint" and find_layout(folder) is not None
    try:
        side = _SIDES[kind](folder, trust_remote_code) if kind in _SIDES and not foreign else None
    except (ValueError, OSError, KeyError) as error:
        fit.reasons.append(str(error))
    if side is not None:
        fit.reasons += _differing_fields(side.config, base.config)
        fit.reasons += _differing_names(side.shapes, base)
    expert = None
    if kind in ("multimodal checkpoint", "adapter") and not fit.reasons:
        try:
            asked = {"model": str(folder), "encoder": encoder, "lora_key": lora_key}
            recipe = ExpertRecipe.model_validate({**asked, "tower": tower if kind == "adapter" else None})
            expert = open_expert(_NAME, recipe, base, trust_remote_code)
        except (ValueError, OSError, KeyError) as error:
            fit.reasons.append(_anonymous(error))
    if expert is not None or not foreign:
        fit.reasons += _differing_vocabulary(folder, kind, base, expert, trust_remote_code)
    if expert is not None:
        side = _Side(expert.config.get_text_config(), base.shapes, expert.task_vector)
    if side is not None:
        _measure(fit, side, base, tokens, every)
        if kind == "merged" and fit.changed:
            fit.reasons.append(f"{len(fit.changed)} of {fit.tensors} tensors are not the base's, bit for bit")
    return fit


def _anonymous(error: Exception) -> str:
    return (
        str(error)
        .replace(f"expert {_NAME!r} ", "")
        .replace(f"expert {_NAME!r}: ", "")
        .replace(f"experts.{_NAME}.", "")
        .replace(f"expert {_NAME!r}", "it")
    )


# the language model in what was found


def _multimodal(folder: Path, trust_remote_code: bool) -> _Side:
    return _named(folder, True, trust_remote_code)


def _bare(folder: Path, trust_remote_code: bool) -> _Side:
    return _named(folder, False, trust_remote_code)


def _named(folder: Path, multimodal: bool, trust_remote_code: bool) -> _Side:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = class_on_meta(config, multimodal, trust_remote_code)
    weights = NamedCheckpoint(Checkpoint(folder), model, strict=False)
    llm, _ = split_names(model)
    there = {name: full for name, full in llm.items() if full in weights.sources}
    shapes = {name: tuple(weights.meta[full].shape) for name, full in llm.items()}

    def tau(name: str, theta_0: torch.Tensor, tokens: int) -> torch.Tensor:
        if name not in there:  # a tower whose language model is the base's
            return torch.zeros(theta_0.shape)
        theta = weights.tensor(there[name])
        if theta.shape != theta_0.shape:
            return vocabulary_task_vector(theta, theta_0, min(tokens, len(theta)))
        return task_vector(theta, theta_0)

    return _Side(config.get_text_config(), shapes, tau)


def _merged(folder: Path, trust_remote_code: bool) -> _Side:
    merged = MergedFolder(folder)
    shapes = {
        name.removeprefix(PREFIX): tuple(tensor.shape)
        for name, tensor in merged.expected.items()
        if name.startswith((PREFIX, f"{HEAD}.")) and _is_the_base_s(name)
    }
    return _Side(
        merged.config.text_config,
        shapes,
        lambda name, theta_0, _: task_vector(merged.read(stored_name(name)), theta_0),
    )


def _is_the_base_s(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    parts = ("delta", "masks", "scales", "correction_a", "correction_b")
    return leaf not in parts and not leaf.startswith(("expert_", "merged_"))


_SIDES = {"multimodal checkpoint": _multimodal, "language model": _bare, "merged": _merged}


# reasons


def _differing_fields(text: PreTrainedConfig, base: PreTrainedConfig) -> list[str]:
    found = []
    for key in SAME_FIELDS:
        own, wanted = getattr(text, key, None), getattr(base, key, None)
        if own != wanted:
            found.append(f"{key} is {own!r}, the base has {wanted!r}")
    return found


def _differing_names(shapes: dict[str, tuple[int, ...]], base: Base) -> list[str]:
    theirs = set(shapes) - ({f"{HEAD}.weight"} if base.tied else set())
    ours, found = set(base.names), []
    if only := ours - theirs:
        found.append(f"{len(only)} tensors of the base are not in it: {listing(only)}")
    if only := theirs - ours:
        found.append(f"{len(only)} tensors of its language model are not in the base: {listing(only)}")
    differing = [
        f"{name} {shapes[name]} instead of {base.shapes[name]}"
        for name in base.names
        if name in shapes and name not in base.vocabulary_names and shapes[name] != base.shapes[name]
    ]
    if differing:
        found.append(f"{len(differing)} tensors have another shape: {listing(differing)}")
    widths = {n: shapes[n][1:] for n in base.vocabulary_names if n in shapes and shapes[n][1:] != base.shapes[n][1:]}
    return found + [f"{name} has width {width}, the base {base.shapes[name][1:]}" for name, width in widths.items()]


def _differing_vocabulary(
    folder: Path, kind: str, base: Base, expert: Expert | None, trust_remote_code: bool
) -> list[str]:
    """Why the merge would refuse its tokenizer, or the first token that differs of a bare language model."""
    ours = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    try:
        if kind == "multimodal checkpoint" or expert is not None:
            if expert is None:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
                processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
            else:
                config, processor = expert.config, expert.load_processor(trust_remote_code)
            merge_vocabulary(ours, {_NAME: processor}, {_NAME: config})
            return []
        if kind == "adapter":
            return []
        theirs = MergedFolder(folder).tokenizer if kind == "merged" else AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        return [f"tokenizer: {_anonymous(error)}"]
    own = theirs.get_vocab()
    for token, token_id in sorted(ours.get_vocab().items(), key=lambda entry: entry[1]):
        if own.get(token) != token_id:
            return [f"tokenizer: {token!r} has id {own.get(token)}, the base has it at {token_id}"]
    return []


# distances


def _measure(fit: Fit, side: _Side, base: Base, tokens: int, every: bool):
    """‖τ‖, the cosine and equal entries over matrices; small tensors only say whether they changed."""
    small = [name for name in base.names if len(base.shapes[name]) < 2]
    wanted = base.names if every else [*sampled_matrices(base), *small]
    distance, entries, equal = Distance(), 0, 0
    for name in wanted:
        theta_0 = base.tensor(name)
        if name not in side.shapes or (name not in base.vocabulary_names and side.shapes[name] != base.shapes[name]):
            continue
        if name in base.vocabulary_names and side.shapes[name][1:] != base.shapes[name][1:]:
            continue
        try:
            tau = side.tau(name, theta_0, tokens)
        except ValueError as error:
            fit.reasons.append(str(error))
            continue
        fit.tensors += 1
        if bool(tau.any()):
            fit.changed.append(name)
        if theta_0.ndim > 1:
            fit.compared.append(name)
            distance.add(tau, theta_0)
            entries += tau.numel()
            equal += int((tau == 0).sum())
    if entries:
        fit.distance, fit.cosine, fit.equal = distance.relative, distance.cosine, equal / entries
    if distance.relative > LARGEST_DISTANCE and not any("norm away" in reason for reason in fit.reasons):
        fit.reasons.append(
            f"its language model is {distance.relative:.2f} of the base's norm away (cosine {distance.cosine:.2f}): "
            f"fine-tunes lie below {LARGEST_DISTANCE}, unrelated models near 1.41"
        )


__all__ = ["Fit", "compare"]
