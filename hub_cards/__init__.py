"""What the world sees of a merged model."""

from .card import write_card
from .publish import Published, push_folder

__all__ = ["Published", "push_folder", "write_card"]
