"""Original LLaVA (haotian-liu/LLaVA): a LlamaForCausalLM's tensors, and the projector among them.

Enters: a folder of `LlavaLlamaForCausalLM`: the whole model, a LoRA with `non_lora_trainables.bin`, or the first
training stage's `mm_projector.bin`. Leaves: a `Reading` of transformers' own Llava class where that has such a
projector, else of a composed one. The vision tower is CLIP, named by `mm_vision_tower`; where the folder holds its
tensors (`model.vision_tower.vision_tower.…`, which DeepSpeed saves), these are taken. Invariant: what the class cannot
do (tiles of a picture, as LLaVA-1.6 makes them) is refused.
"""

from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaProcessor, PreTrainedConfig

from .checkpoints import Checkpoint
from .encoder_sources import Encoder, Sense, clip_vision, composed, find_encoder
from .layout_parts import (
    PLACEHOLDERS,
    PROJECTOR_FILE,
    Layout,
    Order,
    Reading,
    Seen,
    language_model_rules,
    llama_config,
    load_tokenizer,
    projector_rules,
    projector_widths,
    vicuna_template,
)
from .lora import read_adapter_config
from .renaming import Part, RenamedCheckpoint, Rule, rename

# PEFT's names begin so
WRAPPER = r"(?:base_model\.model\.)?"
_PROJECTOR = rf"{WRAPPER}model\.mm_projector"
_NAMES = ("model.mm_projector.", "base_model.model.model.mm_projector.")
_TOWER = "model.vision_tower.vision_tower.vision_model."


def matches(seen: Seen) -> bool:
    config = seen.config
    if "text_config" in config or config.get("mm_image_tower") or config.get("mm_video_tower"):
        return False
    return bool(config.get("mm_vision_tower")) and (seen.model_type or "").startswith("llava") or seen.some(*_NAMES)


def read(seen: Seen, order: Order) -> Reading:
    config = seen.config
    refuse_tiles(seen)
    text_config = llama_config(seen)
    layer, feature = select(config, "mm_vision_select_layer", "mm_vision_select_feature")
    path = find_encoder(order, "image", config.get("mm_vision_tower"), "mm_vision_tower")
    own = seen.some(_TOWER)
    pad = config.get("image_aspect_ratio") == "pad"
    encoder = clip_vision(path, "image", f"{order.where}.encoder", layer, feature == "cls_patch", pad, own)
    checkpoints, notes = weights_of(seen)
    widths = projector_widths(checkpoints[-1], _PROJECTOR)
    hidden = text_config.hidden_size
    made: PreTrainedConfig
    if widths[1:] == [hidden, hidden]:
        tower, projector = "model.vision_tower", _stock_rules()
        made, make_processor = _stock(seen, order, text_config, encoder)
    else:
        tower, projector = "model.encoders.image.vision", projector_rules(_PROJECTOR, "model.connectors.image")
        sense = Sense(encoder, {"widths": widths}, around=marks(seen))
        made, make_processor = composed(seen, order, text_config, {"image": sense})
    rules = (
        *language_model_rules(WRAPPER),
        *projector,
        rename(rf"{WRAPPER}model\.vision_tower\.vision_tower\.vision_model\.(.+)", rf"{tower}.\1"),
    )
    parts = [Part(checkpoint, rules) for checkpoint in checkpoints]
    if encoder.part is not None:
        parts.append(_placed(encoder.part, tower))
    inputs = [seen.folder / "config.json", *encoder.inputs]
    return Reading(
        LAYOUT.name, made, RenamedCheckpoint(seen.folder, parts), make_processor, inputs=inputs, notes=notes
    )


def refuse_lora_on_llava(where: str, folder: Path):
    """Raises ValueError where a LoRA was trained on a multimodal model: its language model is not here, nor the base.

    Where the model it names is not to be had, its name has to do.
    """
    source = read_adapter_config(folder).get("base_model_name_or_path") or ""
    try:
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0] if source else {}
    except (OSError, ValueError):
        config = {}
    kind = str(config.get("model_type", "")) or Path(source).name.lower()
    if config.get("mm_vision_tower") or config.get("vision_config") or "llava" in kind:
        raise ValueError(
            f"{where}: the LoRA was trained on {source}, a multimodal model, and not on the base: what that model had "
            "learnt would be lost. Fold the LoRA into it and give the whole model"
        )


def refuse_tiles(seen: Seen):
    ratio, merge = seen.config.get("image_aspect_ratio"), seen.config.get("mm_patch_merge_type")
    if (isinstance(ratio, str) and "anyres" in ratio) or merge not in (None, "flat"):
        raise ValueError(
            f"{seen.folder}/config.json: image_aspect_ratio {ratio!r}, mm_patch_merge_type {merge!r}: LLaVA-1.6 cuts "
            "pictures into tiles. Give the checkpoint that transformers' own script made of it (llava-hf/…)"
        )


def select(config: dict[str, Any], layer: str, feature: str) -> tuple[int, str]:
    """(which hidden states are the features, patches alone or the class token too)."""
    chosen = config.get(feature, "patch")
    if chosen not in ("patch", "cls_patch"):
        raise ValueError(f"{feature}: found {chosen!r}, expected 'patch' or 'cls_patch'")
    if not isinstance(config.get(layer), int):
        raise ValueError(f"{layer}: found {config.get(layer)!r}, expected the index of a hidden state, such as -2")
    return config[layer], chosen


def weights_of(seen: Seen) -> tuple[list[Checkpoint], list[str]]:
    """(the folder's checkpoints, the one with the projector last; notes)."""
    if seen.weights is None:
        raise ValueError(f"{seen.folder}: no weights, found {seen.files[:12]}")
    beside = PROJECTOR_FILE in seen.files and PROJECTOR_FILE not in {path.name for path in seen.weights.files}
    if not beside:
        return [seen.weights], []
    if seen.some(*_NAMES):
        return [seen.weights], [
            f"{PROJECTOR_FILE} is not read: the weights beside it hold the projector, as LLaVA loads it"
        ]
    return [seen.weights, Checkpoint(seen.folder, (PROJECTOR_FILE,))], []


def marks(seen: Seen, kind: str = "im") -> tuple[str, str]:
    """The tokens around a picture (or a clip: vid), where the expert was trained with them."""
    return (f"<{kind}_start>", f"<{kind}_end>") if seen.config.get("mm_use_im_start_end") else ("", "")


def _stock_rules() -> tuple[Rule, ...]:
    place = "model.multi_modal_projector"
    return (
        rename(rf"{_PROJECTOR}\.0\.(weight|bias)", rf"{place}.linear_1.\1"),
        rename(rf"{_PROJECTOR}\.2\.(weight|bias)", rf"{place}.linear_2.\1"),
    )


def _placed(part: Part, tower: str) -> Part:
    """An encoder's part with its tensors below `tower` instead of a composed expert's."""
    composed_place = "model.encoders.image.vision"
    rules = tuple(
        Rule(
            rule.pattern, tuple(name.replace(composed_place, tower) for name in rule.names), rule.reason, rule.flatten
        )
        for rule in part.rules
    )
    return Part(part.checkpoint, rules)


def _stock(seen: Seen, order: Order, text_config: Any, encoder: Encoder) -> tuple[LlavaConfig, Any]:
    """transformers' Llava: its config, and what makes its processor."""
    token, around = PLACEHOLDERS["image"], marks(seen)
    tokenizer = load_tokenizer(seen, order, text_config, [token], [mark for mark in around if mark])
    own, full = encoder.settings["config"], encoder.settings["class_token"]
    strategy: Any = "full" if full else "default"
    config = LlavaConfig(
        text_config=text_config,
        vision_config={"model_type": "clip_vision_model", **own},
        image_token_index=tokenizer.get_vocab()[token],
        image_seq_length=encoder.tokens or 0,
        vision_feature_layer=encoder.settings["layer"],
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
    )
    written = token.join(around)

    def processor() -> LlavaProcessor:
        return LlavaProcessor(
            encoder.processor,
            tokenizer,
            patch_size=own["patch_size"],
            vision_feature_select_strategy=strategy,
            chat_template=vicuna_template({"image": written}),
            image_token=token,
            num_additional_image_tokens=1,
        )

    return config, processor


LAYOUT = Layout(
    "original LLaVA",
    "config.json with mm_vision_tower and model_type llava…, tensors model.mm_projector.…",
    matches,
    read,
)
