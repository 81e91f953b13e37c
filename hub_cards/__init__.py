"""What the world sees of a merged model."""

from .card import write_card

__all__ = ["write_card"]
