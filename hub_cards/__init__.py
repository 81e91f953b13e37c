"""What the world sees of a merged model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import write_card
    from .publish import Published, push_folder
    from .serving import serve
    from .spaces import check_space, push_space

__all__ = ["Published", "check_space", "push_folder", "push_space", "serve", "write_card"]

# imported when they are asked for: transformers and the client of the Hub take seconds
_HOMES = {
    "Published": "publish", "check_space": "spaces", "push_folder": "publish", "push_space": "spaces",
    "serve": "serving", "write_card": "card",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
