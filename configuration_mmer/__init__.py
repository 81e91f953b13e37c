"""What a merged model is: its configuration, its routes, and the files that travel to the Hub."""

from typing import TYPE_CHECKING, Any

from .route_names_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE, MODALITIES

if TYPE_CHECKING:
    from .configuration_mmer import MMERConfig

__all__ = ["BASE_ROUTE", "FIRST_EXPERT_ROUTE", "MERGED_ROUTE", "MODALITIES", "MMERConfig"]


def __getattr__(name: str) -> Any:
    # the class needs transformers, which takes seconds to import; who asks for a name alone does not wait for it
    if name != "MMERConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .configuration_mmer import MMERConfig

    return MMERConfig


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
