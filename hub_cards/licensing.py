"""The licences behind one merged folder, and the one that its card names.

Enters: a merged folder and its recipe. Leaves: `Licensing`, and licenses.json, which keeps what was read: where the
folder goes, the originals need not be at hand. Invariant: what was read once of a source stays, as the merge took the
source at that time; only what is unknown is looked for again.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .licenses import UNKNOWN, Licence, clashes, read_license, strictest

FILE = "licenses.json"
_PARTS = ("model", "lora", "tower", "encoder")


@dataclass(frozen=True)
class Licensing:
    """`sources`: place in the recipe -> (source, licence); `chosen`: the id that a person has settled on."""

    sources: dict[str, tuple[str, Licence]]
    chosen: str | None

    @property
    def named(self) -> Licence:
        """The one that the card names."""
        return Licence(self.chosen) if self.chosen else strictest(of for _, of in self.sources.values())

    @property
    def clashes(self) -> list[str]:
        return clashes({place: of for place, (_, of) in self.sources.items()})

    @property
    def unknown(self) -> list[str]:
        return [place for place, (_, of) in self.sources.items() if of.id == UNKNOWN]


def sources_of(recipe: dict[str, Any]) -> dict[str, str]:
    """Place in the recipe -> folder or Hub id, of everything that a merged model is made of."""
    places = {"base": recipe["base"]}
    for name, expert in recipe["experts"].items():
        values = {"model": expert} if isinstance(expert, str) else expert
        for part in _PARTS:
            given = values.get(part)
            of = {f"{part}.{key}": one for key, one in given.items()} if isinstance(given, dict) else {part: given}
            places |= {f"experts.{name}.{key}": one for key, one in of.items() if one}
    return places


def read_licensing(folder: Path, recipe: dict[str, Any], chosen: str | None = None) -> Licensing:
    """What licenses.json has, and what can be read of the rest. Raises ValueError for a `chosen` that is no id."""
    if chosen is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", chosen) is None:
        raise ValueError(
            f"found the license {chosen!r}, expected an id of the Hub, such as apache-2.0, llama2 or other"
        )
    known = _recorded(folder / FILE)
    sources = {}
    for place, source in sources_of(recipe).items():
        entry = known["sources"].get(place, {})
        licence = Licence()
        if entry.get("source") == source:
            licence = Licence(**{key: entry[key] for key in ("id", "name", "link", "read_in") if key in entry})
        sources[place] = source, licence if licence.id != UNKNOWN else read_license(source)
    return Licensing(sources, chosen or known["chosen"])


def write_licensing(folder: Path, licensing: Licensing):
    sources = {place: {"source": source, **asdict(of)} for place, (source, of) in licensing.sources.items()}
    values = {"chosen": licensing.chosen, "sources": sources}
    (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _recorded(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"chosen": None, "sources": {}}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"chosen": values["chosen"], "sources": dict(values["sources"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has another form than `mmer card` writes ({type(error).__name__}: {error}): delete it, and the "
            "licences are read anew where the originals are at hand"
        ) from error
