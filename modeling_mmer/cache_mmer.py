"""The key-value cache under the name that the installed transformers gives it.

`cache` from 5.24 on, `past_key_values` before; callers may use either. Invariant: `CACHE` is the name that the stock
models' forward and outputs, and `generate`, use.
"""

import inspect
from typing import Any

from transformers.generation import GenerationMixin

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given under either name. Raises ValueError for two different ones."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one thing: give one of them")
    return past_key_values if cache is None else cache
