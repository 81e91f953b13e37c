"""What a source is: language model, tower, vocabulary, adapter or merged folder; and whether it fits a base.

Enters: a folder or a Hub id, and if wanted a base. Leaves: `Inspection`, plain numbers and words. Invariants: without
a base only headers are read, never a value; a comparison reads the small tensors, some matrices, and no more unless
every tensor is asked for; what does not fit is listed whole, not just its first reason.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig

from .checkpoints import ADAPTER_FILES, MODEL_FILES, Checkpoint, fetch
from .comparison import compare
from .experts import Base
from .findings import LLM, MERGED_PARTS, ORDER, UNKNOWN, VOCABULARY, Group, Inspection, Words
from .folder_checks import REPORT, MergedFolder
from .layout_parts import Layout, Order, Seen
from .layouts import find_layout
from .lora import CONFIG_FILE, LoraAdapter, is_adapter
from .naming import HEAD, NamedCheckpoint, class_on_meta, split_names
from .recipe import ExpertRecipe
from .vocabulary import find_placeholders


def inspect(
    source: str | Path,
    base: str | None = None,
    tower: str | None = None,
    every: bool = False,
    trust_remote_code: bool = False,
    encoder: str | dict[str, str] | None = None,
    lora_key: str | None = None,
) -> Inspection:
    """Look into `source`: a folder, or a Hub id with an optional @revision.

    With `base` it is compared with that LLM: some matrices and every small tensor, or with `every` all tensors.
    `tower` is the multimodal checkpoint that an adapter belongs to, where its own config does not say so; `encoder`
    and `lora_key` are those of a recipe, for checkpoints of other code than transformers'. Raises
    ValueError when there is no such source, or the base itself cannot be opened; what is wrong with the source is in
    `problems`.
    """
    folder = fetch(str(source))
    opened = Base(base, trust_remote_code) if base is not None else None
    has_model = any((folder / name).is_file() for name in MODEL_FILES)
    if is_adapter(folder) and not has_model:
        found = _adapter(str(source), folder, trust_remote_code)
    elif not (folder / "config.json").is_file():
        there = sorted(path.name for path in folder.iterdir())[:12]
        raise ValueError(f"{folder}: neither config.json nor {CONFIG_FILE} is there, found {there}")
    else:
        asked = {"model": str(folder), "encoder": encoder, "lora_key": lora_key}
        base_folder = opened.folder if opened else None
        order = Order("recipe", ExpertRecipe.model_validate(asked), base_folder, trust_remote_code)
        found = _checkpoint(str(source), folder, order)
    if opened is not None:
        found.notes += opened.notes
        found.fit = compare(folder, found.kind, opened, tower, every, trust_remote_code, encoder, lora_key)
    return found


def _attempt(found: Inspection, look: Callable[[], None]):
    """Run one look; what it raises becomes a problem, and the others go on."""
    try:
        look()
    except (ValueError, OSError, KeyError) as error:
        found.problems.append(str(error))


def _checkpoint(source: str, folder: Path, order: Order) -> Inspection:
    found, trust_remote_code = Inspection(source, UNKNOWN), order.trust_remote_code
    try:
        layout = None if _is_merged(folder) else find_layout(folder)
    except ValueError as error:
        found.problems.append(str(error))
        _attempt(found, lambda: _raw_groups(found, Checkpoint(folder)))
        return found
    if layout is not None:
        return _foreign(found, folder, layout, order)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        merged = MergedFolder(folder)
        try:
            merged.config
        except (ValueError, OSError, KeyError):
            found.problems.append(f"config.json: {error}")
            _attempt(found, lambda: _raw_groups(found, Checkpoint(folder)))
            return found
        return _merged(found, merged)
    if config.model_type == "mmer":
        return _merged(found, MergedFolder(folder))
    found.model_type = config.model_type
    for kind in ("multimodal checkpoint", LLM):
        try:
            model = class_on_meta(config, kind != LLM, trust_remote_code)
        except ValueError as error:
            found.problems = [str(error)]
            continue
        found.kind, found.architecture, found.problems = kind, type(model).__name__, []
        break
    else:
        _attempt(found, lambda: _raw_groups(found, Checkpoint(folder)))
        return found
    _attempt(found, lambda: _name_tensors(found, Checkpoint(folder), model))
    _attempt(found, lambda: _words(found, folder, config, model, trust_remote_code))
    if is_adapter(folder):
        found.notes.append(f"{CONFIG_FILE} lies beside the weights and is not used: the checkpoint is whole")
    return found


def _is_merged(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "mmer"


def _foreign(found: Inspection, folder: Path, layout: Layout, order: Order) -> Inspection:
    """A checkpoint of other code, as the class of today that its reader gives it."""
    found.kind, found.architecture = "multimodal checkpoint", layout.name
    found.model_type = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))

    def look():
        reading = layout.read(Seen(folder), order)
        model = class_on_meta(reading.config, True)
        found.architecture = f"{layout.name}, as {type(model).__name__}"
        _name_tensors(found, reading.weights, model)
        for reason in dict.fromkeys(reading.weights.left_out.values()):
            names = [name for name, why in reading.weights.left_out.items() if why == reason]
            found.notes.append(f"{len(names)} tensors are left out, such as {names[0]}: {reason}")
        found.notes += reading.notes
        if reading.lora is not None:
            settings, factors = reading.lora
            found.adapter = {"rank": settings["r"], "alpha": settings["lora_alpha"], "tensors": len(factors.keys())}
        found.words = _words_of(reading.make_processor(), found, reading.config, model)

    _attempt(found, look)
    return found


def _raw_groups(found: Inspection, checkpoint: Checkpoint):
    """Tensors by the first part of their saved names, where no class is known."""
    for key in checkpoint.keys():
        found.group(f"{UNKNOWN}: {key.split('.')[0]}").add(checkpoint.shape(key), checkpoint.dtype(key))


def _name_tensors(found: Inspection, checkpoint: Checkpoint, model: Any):
    """Groups by what a tensor is in the class, sizes as it is saved."""
    try:
        weights = NamedCheckpoint(checkpoint, model, strict=False)
    except ValueError:
        _raw_groups(found, checkpoint)
        raise
    llm, tower = split_names(model)
    inside, outside = {full: name for name, full in llm.items()}, {full: name for name, full in tower.items()}
    words = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    vocabulary = {f"{name}.weight" for name, module in model.named_modules() if id(module) in words}
    for key in checkpoint.keys():
        name = weights.rename(key)[0]
        if name in vocabulary or inside.get(name, "").startswith(f"{HEAD}."):
            group = VOCABULARY
        elif name in inside:
            group = LLM
        elif name in outside:
            group = f"tower: {outside[name].split('.')[0]}"
        else:
            group = UNKNOWN if name in weights.unknown else "left out by its class"
        found.group(group).add(checkpoint.shape(key), checkpoint.dtype(key))
    found.groups.sort(key=_place)
    found.unknown = sorted(weights.unknown)
    found.missing = sorted(weights.missing)
    if found.unknown:
        found.problems.append(f"{len(found.unknown)} tensors are unknown to {found.architecture}")
    if set(found.missing) == set(llm.values()) and found.kind != LLM:
        found.notes.append("it has no language model of its own: the base's is taken, with an adapter or without")
        found.missing = []
    if found.missing:
        found.problems.append(f"{len(found.missing)} tensors of {found.architecture} are missing")


def _place(group: Group) -> int:
    return ORDER.index(group.name) if group.name in ORDER else len(ORDER)


def _words(found: Inspection, folder: Path, config: PreTrainedConfig, model: Any, trust_remote_code: bool):
    if found.kind == LLM:
        rows = model.get_input_embeddings().weight.shape[0]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        found.words = Words(rows, len(tokenizer), max(0, rows - len(tokenizer)), _added(tokenizer))
    else:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        found.words = _words_of(processor, found, config, model)


def _words_of(processor: Any, found: Inspection, config: PreTrainedConfig, model: Any) -> Words:
    rows, tokenizer = model.get_input_embeddings().weight.shape[0], processor.tokenizer
    entries = find_placeholders(found.source, processor, config)
    placeholders = {modality: {"token": token, "id": own_id} for modality, (token, own_id, _) in entries.items()}
    return Words(rows, len(tokenizer), max(0, rows - len(tokenizer)), _added(tokenizer), placeholders)


def _added(tokenizer: Any) -> list[str]:
    """Tokens behind the ordinary vocabulary, in the order of their ids."""
    return [
        str(token) for place, token in sorted(tokenizer.added_tokens_decoder.items()) if place >= tokenizer.vocab_size
    ]


# adapters


def _adapter(source: str, folder: Path, trust_remote_code: bool) -> Inspection:
    found = Inspection(source, "adapter", "LoRA")

    def tensors():
        checkpoint = Checkpoint(folder, ADAPTER_FILES)
        for key in checkpoint.keys():
            found.group("adapter").add(checkpoint.shape(key), checkpoint.dtype(key))

    def config():
        found.adapter = _lora_facts(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))

    def changes():
        adapter = LoraAdapter(folder, lambda path: path)  # refuses what cannot be merged, by its name
        ranks = Counter(adapter.ranks.values())
        found.adapter["ranks"] = {str(rank): ranks[rank] for rank in sorted(ranks)}
        found.adapter["replaced"] = sorted(adapter.changed - set(adapter.ranks))

    for look in (tensors, config, changes):
        _attempt(found, look)
    trained_on = found.adapter.get("trained_on")
    if trained_on and Path(trained_on).expanduser().is_dir():
        order = Order("recipe", ExpertRecipe(model=trained_on), None, trust_remote_code)
        tower = _checkpoint(trained_on, Path(trained_on).expanduser(), order)
        found.model_type, found.words = tower.model_type, tower.words
        found.notes.append(
            f"trained on {trained_on}, a {tower.kind} of class {tower.architecture or tower.model_type}"
        )
    return found


def _lora_facts(config: dict[str, Any]) -> dict[str, Any]:
    targets = config.get("target_modules")
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora")),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "targets": targets if isinstance(targets, str) else sorted(targets or []),
        "modules_to_save": sorted(config.get("modules_to_save") or []),
        "trained_tokens": config.get("trainable_token_indices"),
        "trained_on": config.get("base_model_name_or_path"),
    }


# merged folders


def _merged(found: Inspection, merged: MergedFolder) -> Inspection:
    found.kind, found.model_type, found.architecture = "merged", "mmer", "MMERForConditionalGeneration"
    _attempt(found, lambda: _merged_groups(found, merged))

    def words():
        config, tokenizer = merged.config, merged.tokenizer
        rows, added = config.text_config.vocab_size, [token["token"] for token in config.added_tokens]
        tokens = len(tokenizer) - len(added)
        placeholders = {
            f"{modality} ({name})": dict(entry)
            for name in config.expert_names
            for modality, entry in config.experts[name]["placeholders"].items()
        }
        found.words = Words(rows, tokens, max(0, rows - tokens), added, placeholders)

    def facts():
        config = merged.config
        reported = merged.report["experts"] if (merged.folder / REPORT).is_file() else {}
        found.merged = {
            "decoupling": dict(config.decoupling),
            "text_route": config.text_route,
            "default_experts": dict(config.default_experts),
            "matrices": len(config.delta_modules),
            "expert_tensors": len(config.expert_tensors),
            "experts": {
                name: {
                    "modalities": config.modalities(name),
                    "model_type": config.experts[name]["config"]["model_type"],
                    **_kept(reported.get(name)),
                }
                for name in config.expert_names
            },
        }
        if not reported:
            found.notes.append(f"there is no {REPORT}: densities and residuals are not known")

    _attempt(found, words)
    _attempt(found, facts)
    return found


def _kept(reported: dict[str, Any] | None) -> dict[str, Any]:
    if reported is None:
        return {}
    total = reported["total"]
    return {
        "mask_density": total["mask_density"],
        "kept_energy": total["kept_energy"],
        "residual": total["residual"],
        "bits_per_parameter": reported["bits_per_parameter"],
    }


def _merged_groups(found: Inspection, merged: MergedFolder):
    checkpoint = merged.checkpoint
    for key in checkpoint.keys():
        found.group(_part_of(key)).add(checkpoint.shape(key), checkpoint.dtype(key))
    found.groups.sort(key=_place)
    found.unknown = sorted(set(checkpoint.keys()) - set(merged.expected))
    found.missing = sorted(set(merged.expected) - set(checkpoint.keys()))
    if found.unknown:
        found.problems.append(f"{len(found.unknown)} tensors are not of this config")
    if found.missing:
        found.problems.append(f"{len(found.missing)} tensors that config.json demands are missing")


def _part_of(key: str) -> str:
    if key.startswith("model.experts."):
        _, _, expert, child, *_ = key.split(".")
        return f"tower of {expert}: {child}"
    if key in ("model.added_embeddings.weight", "added_head.weight"):
        return "added tokens"
    leaf = key.rpartition(".")[2]
    if leaf.startswith(("expert_", "merged_")):
        return "norms and biases of experts"
    return MERGED_PARTS.get(leaf, "base")
