"""Text and media to the tensors that a merged model takes."""

from transformers import AutoConfig, AutoProcessor

from configuration_mmer.composed_config_mmer import ComposedConfig

from .composed_processor_mmer import ComposedProcessor
from .expert_processors_mmer import ExpertProcessor
from .processing_mmer import MMERProcessor

# at home, checkpoints of our own class are told by their config, like any other; the shipped code registers nothing
AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoProcessor.register(ComposedConfig, ComposedProcessor, exist_ok=True)

__all__ = ["ComposedProcessor", "ExpertProcessor", "MMERProcessor"]
