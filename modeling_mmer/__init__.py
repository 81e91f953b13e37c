"""Media and text to logits: towers, routed LLM, generation."""

from .modeling_mmer import MMERForConditionalGeneration, MMERModel, MMERPreTrainedModel
from .route_plan_mmer import RoutePlan, route_scope
from .routed_weights_mmer import pack_bits, unpack_bits
from .towers_mmer import build_tower, language_model_name, tower_features

__all__ = [
    "MMERForConditionalGeneration",
    "MMERModel",
    "MMERPreTrainedModel",
    "RoutePlan",
    "build_tower",
    "language_model_name",
    "pack_bits",
    "route_scope",
    "tower_features",
    "unpack_bits",
]
