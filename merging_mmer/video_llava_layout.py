"""Original Video-LLaVA (PKU-YuanGroup/Video-LLaVA): LLaVA's layout with a tower for pictures and one for clips.

Enters: a folder of Video-LLaVA's `LlavaLlamaForCausalLM`, whole, as a LoRA or as a projector alone. Leaves: a
`Reading` of a composed class with LanguageBind's encoders. The checkpoint on the Hub holds both towers
(`model.image_tower.image_tower.…`, `model.video_tower.video_tower.…`, with attention over time, which transformers'
VideoLlava class does not have); they are taken where they are there. Invariant: the one projector serves both
modalities, each has its copy.
"""

from .encoder_sources import Encoder, Sense, clip_vision, composed, find_encoder, language_bind_video
from .layout_parts import (
    Layout,
    Order,
    Reading,
    Seen,
    language_model_rules,
    llama_config,
    projector_rules,
    projector_widths,
)
from .llava_layout import WRAPPER, marks, select, weights_of
from .renaming import Part, RenamedCheckpoint, rename

_PROJECTOR = rf"{WRAPPER}model\.mm_projector"
# modality -> (its field in config.json, its tensors)
_TOWERS = {
    "image": ("mm_image_tower", "model.image_tower.image_tower."),
    "video": ("mm_video_tower", "model.video_tower.video_tower."),
}


def matches(seen: Seen) -> bool:
    fields = any(isinstance(seen.config.get(field), str) for field, _ in _TOWERS.values())
    return "text_config" not in seen.config and (fields or seen.some(*(prefix for _, prefix in _TOWERS.values())))


def read(seen: Seen, order: Order) -> Reading:
    config, text_config = seen.config, llama_config(seen)
    checkpoints, notes = weights_of(seen)
    widths = projector_widths(checkpoints[-1], _PROJECTOR)
    layer, feature = select(config, "mm_vision_select_layer", "mm_vision_select_feature")
    senses: dict[str, Sense] = {}
    for modality, (field, prefix) in _TOWERS.items():
        own = seen.some(prefix)
        if not config.get(field) and not own:
            continue
        path, where = find_encoder(order, modality, config.get(field), field), f"{order.where}.encoder"
        encoder: Encoder
        if modality == "image":
            pad = config.get("image_aspect_ratio") == "pad"
            encoder = clip_vision(path, modality, where, layer, feature == "cls_patch", pad, own)
        else:
            encoder = language_bind_video(path, where, layer, own)
        around = marks(seen, "im" if modality == "image" else "vid")
        senses[modality] = Sense(encoder, {"widths": widths}, around=around)
    made, make_processor = composed(seen, order, text_config, senses)
    rules = (
        *language_model_rules(WRAPPER),
        *projector_rules(_PROJECTOR, *(f"model.connectors.{modality}" for modality in senses)),
        *(
            rename(
                rf"{WRAPPER}model\.{modality}_tower\.{modality}_tower\.(.+)",
                rf"model.encoders.{modality}.vision.\1",
            )
            for modality in senses
        ),
    )
    parts = [Part(checkpoint, rules) for checkpoint in checkpoints]
    parts += [sense.encoder.part for sense in senses.values() if sense.encoder.part is not None]
    inputs = [seen.folder / "config.json", *(path for sense in senses.values() for path in sense.encoder.inputs)]
    return Reading(
        LAYOUT.name, made, RenamedCheckpoint(seen.folder, parts), make_processor, inputs=inputs, notes=notes
    )


LAYOUT = Layout(
    "original Video-LLaVA",
    "config.json with mm_image_tower or mm_video_tower, tensors model.video_tower.… or model.mm_projector.…",
    matches,
    read,
)
