"""A page to chat with a merged model in: pictures, sounds, clips, point clouds, and which parameters read which token.

It stands alone: it imports gradio, torch, transformers and what opens media, and nothing of the package that makes
merged models, so that the folder it lies in is a Hugging Face Space as it is.
"""

from .starting import start

__all__ = ["start"]
