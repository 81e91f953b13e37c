"""PointLLM (OpenRobotLab/PointLLM): a LlamaForCausalLM's tensors, Point-BERT and its projector among them.

Enters: a folder of `PointLLMLlamaForCausalLM`, versions 1.1 and 1.2. Leaves: a `Reading` of a composed class. Sizes
come from the tensors where these tell them; the others are those of the file that `point_backbone_config_name` names.
Invariant: a backbone of another name is refused, since groups and heads are not in the checkpoint.
"""

from .encoder_sources import Sense, composed, point_bert_encoder, point_bert_shapes
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
from .renaming import Part, RenamedCheckpoint, rename

# what no tensor tells, by the name of PointLLM's own yaml file; without a name it is that of version 1.2
POINT_BERTS = {
    "PointTransformer_8192point_2layer": {"groups": 512, "group_size": 32, "heads": 6},
    "PointTransformer_base_8192point": {"groups": 512, "group_size": 48, "heads": 12},
}
VERSION_1_2 = "PointTransformer_8192point_2layer"
_BACKBONE, _PROJECTOR = "model.point_backbone.", r"model\.point_proj"


def matches(seen: Seen) -> bool:
    return seen.model_type == "pointllm" or seen.some(_BACKBONE)


def read(seen: Seen, order: Order) -> Reading:
    config, checkpoint = seen.config, seen.weights
    if checkpoint is None:
        raise ValueError(f"{seen.folder}: no weights, found {seen.files[:12]}")
    name = config.get("point_backbone_config_name", VERSION_1_2)
    if config.get("point_backbone", "PointBERT") != "PointBERT" or name not in POINT_BERTS:
        raise ValueError(
            f"{seen.folder}/config.json: point_backbone {config.get('point_backbone')!r} of {name!r}; expected "
            f"'PointBERT' of one of {sorted(POINT_BERTS)}"
        )
    text_config = llama_config(seen)
    settings = {**point_bert_shapes(checkpoint, _BACKBONE), **POINT_BERTS[name]}
    around = ("", "")
    if config.get("mm_use_point_start_end"):
        names = {"START": "<point_start>", "END": "<point_end>"}
        start, end = (config.get(f"DEFAULT_POINT_{place}_TOKEN", token) for place, token in names.items())
        around = (start, end)
    sense = Sense(
        point_bert_encoder(settings, normalise=True),
        {"widths": projector_widths(checkpoint, _PROJECTOR)},
        token=config.get("DEFAULT_POINT_PATCH_TOKEN", "<point_patch>"),
        around=around,
    )
    made, make_processor = composed(seen, order, text_config, {"point_cloud": sense})
    rules = (
        *language_model_rules(),
        rename(r"model\.point_backbone\.(.+)", r"model.encoders.point_cloud.\1"),
        *projector_rules(_PROJECTOR, "model.connectors.point_cloud"),
    )
    weights = RenamedCheckpoint(seen.folder, [Part(checkpoint, rules)])
    return Reading(LAYOUT.name, made, weights, make_processor, inputs=[seen.folder / "config.json"])


LAYOUT = Layout(
    "PointLLM",
    "config.json with model_type pointllm, tensors model.point_backbone.… and model.point_proj.…",
    matches,
    read,
)
