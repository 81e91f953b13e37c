"""Imported by scripts that play a user without our packages: after `block()` none of the rooms can be imported."""

import sys

ROOMS = (
    "configuration_mmer",
    "processing_mmer",
    "modeling_mmer",
    "merging_mmer",
    "evaluation_mmer",
    "hub_cards",
    "mmer",
)


def block():
    for room in ROOMS:
        sys.modules[room] = None  # type: ignore[assignment]


def still_blocked() -> bool:
    return all(sys.modules[room] is None for room in ROOMS)
