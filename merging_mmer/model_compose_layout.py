"""ModelCompose (THUNLP-MT/ModelCompose): what its training changed of a Vicuna, and nothing else.

Enters: a folder with config.json (model_type "multimodal") and `adapter_model.bin`: low-rank factors by kind of token
(`lora_A.{default|vision|audio|video|point}.weight`), one modality's projector, and its soft tokens; or the first
stage's `mm_projector.bin`. Leaves: a `Reading` of a composed class whose language model is the base's.

`lora_strategy` says which tokens the factors are for. `same` (a NaiveMC expert): `default` for all tokens, an ordinary
LoRA. `modal`: the modality's own for its tokens, text on the base's parameters. `modal+language` (a DAMC expert): the
modality's own, and `default` for text. An expert here has one task vector, so of the two the recipe names one
(`lora_key`); the same folder given twice, once with each, brings both. Invariants: the kind comes from config.json,
never from the folder's name (the authors' own scripts for point clouds have the names swapped); what was merged
already is refused.
"""

import re
from typing import Any

from .checkpoints import Checkpoint
from .encoder_sources import (
    Encoder,
    Sense,
    beats,
    clip_vision,
    composed,
    find_encoder,
    language_bind_video,
    point_bert,
)
from .layout_parts import Layout, Order, Reading, Seen, llama_config, projector_rules, projector_widths
from .llava_layout import select
from .point_llm_layout import POINT_BERTS, VERSION_1_2
from .renaming import Part, RenamedCheckpoint, Rule, leave_out, rename

# their name of a modality -> (ours, its encoder's fields in config.json)
_MODALITIES = {
    "vision": ("image", ("mm_vision_encoder", "mm_vision_tower")),
    "audio": ("audio", ("mm_audio_encoder",)),
    "video": ("video", ("mm_video_encoder",)),
    "point": ("point_cloud", ("mm_point_encoder",)),
}
_FACTOR = re.compile(r".+\.lora_[AB]\.([^.]+)\.weight")
_STRATEGIES = ("same", "modal", "modal+language")
_DEFAULT = "default"


def matches(seen: Seen) -> bool:
    return seen.model_type == "multimodal" or seen.some("model.modal_projectors.", "prefix_tokens.", "suffix_tokens.")


def read(seen: Seen, order: Order) -> Reading:
    checkpoint = seen.weights
    if checkpoint is None:
        raise ValueError(f"{seen.folder}: no weights, found {seen.files[:12]}")
    modal = _one_modality(seen)
    modality, fields = _MODALITIES[modal]
    text_config = llama_config(seen)
    said = next(((field, seen.config[field]) for field in fields if seen.config.get(field)), (fields[0], None))
    encoder = _encoder(seen, order, modality, said)
    projector = rf"model\.modal_projectors\.{modal}"
    sense = Sense(encoder, _connector(checkpoint, modal, encoder), _soft_tokens(checkpoint, modal))
    made, make_processor = composed(seen, order, text_config, {modality: sense})
    lora, rules, notes = _lora(seen, order, checkpoint, modal)
    rules += (
        rename(rf"prefix_tokens\.{modal}", f"model.soft_tokens.{modality}.prefix", flatten=True),
        rename(rf"suffix_tokens\.{modal}", f"model.soft_tokens.{modality}.suffix", flatten=True),
        leave_out(r"(prefix|suffix)_tokens\.default", "written around no medium: their code reads a modality's alone"),
        *projector_rules(projector, f"model.connectors.{modality}"),
        rename(rf"{projector}\.(audio_.+)", rf"model.connectors.{modality}.\1"),
    )
    parts = [Part(checkpoint, rules)]
    if encoder.part is not None:
        parts.append(encoder.part)
    inputs = [seen.folder / "config.json", *encoder.inputs]
    weights = RenamedCheckpoint(seen.folder, parts)
    return Reading(LAYOUT.name, made, weights, make_processor, lora, inputs, notes)


def _one_modality(seen: Seen) -> str:
    """The one that the folder brings. Raises ValueError for a folder that ModelCompose merged."""
    config = seen.config
    configured = {
        modal for modal, (_, fields) in _MODALITIES.items() if any(isinstance(config.get(f), str) for f in fields)
    }
    there = {found[1] for key in seen.keys if (found := re.match(r"model\.modal_projectors\.([^.]+)\.", key))}
    factors = {found[1] for key in seen.keys if (found := _FACTOR.fullmatch(key))}
    signs = [key for key in ("reset_scaling_weights", "merge_default_weights") if config.get(key)]
    signs += [f"{modal}_lora_r" for modal in _MODALITIES if f"{modal}_lora_r" in config]
    signs += sorted(f"lora_A.{key}" for key in factors if key.startswith(f"{_DEFAULT}-"))
    if signs or len(there | configured) > 1:
        raise ValueError(
            f"{seen.folder}: a merged ModelCompose folder, of {sorted(there | configured)} "
            f"({', '.join(signs) or 'several modalities'}); give the unimodal experts that it was merged from"
        )
    if there != configured or not there <= set(_MODALITIES) or not there:
        raise ValueError(
            f"{seen.folder}: config.json has the encoder of {sorted(configured) or 'no modality'}, the weights have "
            f"the projector of {sorted(there) or 'none'}; expected one and the same of {sorted(_MODALITIES)}"
        )
    return there.pop()


def _encoder(seen: Seen, order: Order, modality: str, said: tuple[str, Any]) -> Encoder:
    field, found = said
    path, where = find_encoder(order, modality, found, field), f"{order.where}.encoder"
    config = seen.config
    if modality == "image":
        layer, feature = select(config, "mm_vision_select_layer", "mm_vision_select_feature")
        pad = config.get("image_aspect_ratio") == "pad"
        return clip_vision(path, modality, where, layer, feature == "cls_patch", pad, own=False)
    if modality == "video":
        layer, _ = select(config, "mm_video_select_layer", "mm_video_select_feature")
        return language_bind_video(path, where, layer, own=False)
    if modality == "audio":
        return beats(path)
    # their processor loads the points as they are
    return point_bert(path, POINT_BERTS[VERSION_1_2], normalise=False)


def _connector(checkpoint: Checkpoint, modal: str, encoder: Encoder) -> dict[str, Any]:
    prefix = f"model.modal_projectors.{modal}."
    names = {key.removeprefix(prefix) for key in checkpoint.keys() if key.startswith(prefix)}
    if "audio_query_tokens" not in names:
        return {"widths": projector_widths(checkpoint, rf"model\.modal_projectors\.{modal}")}
    layers = {place[1] for name in names if (place := re.match(r"audio_Qformer\.bert\.encoder\.layer\.(\d+)\.", name))}

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise ValueError(f"{checkpoint.folder}: no tensor {prefix}{name}, which a Q-Former has")
        return checkpoint.shape(f"{prefix}{name}")

    queries, positions = shape("audio_query_tokens"), shape("audio_position_embedding.weight")
    return {
        "kind": "qformer",
        "widths": [positions[1], shape("audio_llama_proj.weight")[0]],
        "queries": queries[1],
        "layers": len(layers),
        "hidden_size": queries[2],
        "intermediate_size": shape("audio_Qformer.bert.encoder.layer.0.intermediate_query.dense.weight")[0],
        "positions": positions[0],
    }


def _soft_tokens(checkpoint: Checkpoint, modal: str) -> dict[str, int] | None:
    found = {}
    for kind in ("prefix", "suffix"):
        name = f"{kind}_tokens.{modal}"
        if name in checkpoint.keys():
            found[kind] = checkpoint.shape(name)[1]
    if len(found) == 1:
        raise ValueError(f"{checkpoint.folder}: soft tokens {sorted(found)} of {modal}; expected prefix and suffix")
    return found or None


def _lora(
    seen: Seen, order: Order, checkpoint: Checkpoint, modal: str
) -> tuple[tuple[dict[str, Any], Checkpoint] | None, tuple[Rule, ...], list[str]]:
    """(settings and tensors of the factors that are the expert's, rules that keep all factors apart, notes)."""
    there = {found[1] for key in checkpoint.keys() if (found := _FACTOR.fullmatch(key))}
    strategy, asked = seen.config.get("lora_strategy"), order.recipe.lora_key
    if not there:
        if asked is not None:
            raise ValueError(f"{order.where}.lora_key: found {asked!r}, but {seen.folder} holds no LoRA")
        return None, (), []
    expected = {"same": {_DEFAULT}, "modal": {modal}, "modal+language": {modal, _DEFAULT}}.get(str(strategy))
    if expected != there:
        raise ValueError(
            f"{seen.folder}: lora_strategy {strategy!r} in config.json, and factors for {sorted(there)}; expected one "
            f"of {list(_STRATEGIES)} and factors for {sorted(expected or ())}"
        )
    if len(there) > 1 and asked is None:
        raise ValueError(
            f"{order.where}.lora_key: {seen.folder} is a DAMC expert (lora_strategy {strategy!r}): it has one LoRA "
            f"for {modal} tokens and another, {_DEFAULT!r}, for text, and an expert here has one task vector. Set "
            f"lora_key: {modal} or lora_key: {_DEFAULT}, or give the folder twice, as two experts with one each"
        )
    key = asked or next(iter(there))
    if key not in there:
        raise ValueError(f"{order.where}.lora_key: found {asked!r}, expected one of {sorted(there)}, which it holds")
    settings = {"r": seen.config.get("lora_r"), "lora_alpha": seen.config.get("lora_alpha")}
    if not all(isinstance(value, int | float) for value in settings.values()):
        raise ValueError(
            f"{seen.folder}/config.json: lora_r and lora_alpha are {list(settings.values())}, expected numbers"
        )
    factors = (
        rename(rf"(.+\.lora_[AB])\.{key}\.weight", r"\1.weight"),
        leave_out(r".*", "no factor of this LoRA"),
    )
    notes = []
    if strategy == "modal":
        notes = [
            f"was trained with text on the base's parameters: ask it with text_route='base' (lora_strategy {strategy})"
        ]
    elif len(there) > 1:
        notes = [f"a DAMC expert with the factors {key!r} alone, of {sorted(there)}: a recipe may name it twice"]
    kept = leave_out(r".+\.lora_[AB]\.[^.]+\.weight", "factors of a LoRA")
    return (settings, RenamedCheckpoint(seen.folder, [Part(checkpoint, factors)])), (kept,), notes


LAYOUT = Layout(
    "ModelCompose",
    "config.json with model_type multimodal, tensors model.modal_projectors.… and lora_A.{default|vision|…}",
    matches,
    read,
)
