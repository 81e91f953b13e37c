"""Text and media to the tensors that a merged model takes."""

from .expert_processors_mmer import ExpertProcessor
from .processing_mmer import MMERProcessor

__all__ = ["ExpertProcessor", "MMERProcessor"]
