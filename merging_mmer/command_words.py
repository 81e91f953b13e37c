"""Words of the command line, as the functions take them.

Enters: options that were given several times, as NAME=SOURCE. Leaves: mappings as recipes have them. Invariant:
nothing is given twice, or ValueError says what.
"""

from collections.abc import Mapping
from typing import Any

from configuration_mmer.route_names_mmer import MODALITIES


def asked_experts(experts: list[str], more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """NAME=SOURCE and the options beside it -> the experts as a recipe has them."""
    if more and len(experts) != 1:
        raise ValueError(
            f"{', '.join(f'--{key}' for key in more)} speak of one --expert, found {len(experts)}: give one, or write "
            "the experts into a file for --recipe"
        )
    asked = {}
    for entry in experts:
        name, _, source = entry.partition("=")
        if name in asked:
            raise ValueError(f"--expert {name} is there twice")
        asked[name] = {**({"model": source} if source else {}), **more}
    return asked


def together(of_file: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    if twice := sorted(set(of_file) & set(asked)):
        raise ValueError(f"experts {twice} are in the file of --recipe and in --expert: give each once")
    if not of_file and not asked:
        raise ValueError("no expert to add: give --expert NAME=SOURCE, or --recipe FILE with `experts:`")
    return {**of_file, **asked}


def encoders(given: list[str] | None) -> str | dict[str, str] | None:
    """--encoder SOURCE, or several --encoder MODALITY=SOURCE."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [one.split("=", 1) for one in given]
    if wrong := [pair[0] for pair in pairs if len(pair) == 1 or pair[0] not in MODALITIES]:
        raise ValueError(f"--encoder: found {wrong}, expected one SOURCE, or MODALITY=SOURCE of {list(MODALITIES)}")
    return dict(pairs)


__all__ = ["asked_experts", "encoders", "together"]
