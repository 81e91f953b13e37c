"""What a merged model is: its configuration, its routes, and the files that travel to the Hub."""

from .configuration_mmer import MMERConfig
from .routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE, MODALITIES

__all__ = ["BASE_ROUTE", "FIRST_EXPERT_ROUTE", "MERGED_ROUTE", "MODALITIES", "MMERConfig"]
