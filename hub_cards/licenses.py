"""Under which licences the base and the experts are, and what that means for a model merged from them.

Enters: the sources of a recipe, folders or Hub ids. Leaves: a `Licence` for each, the strictest of them, and pairs
that no single work can be under. Invariant: a licence that could not be read is `unknown`, and unknown is the
strictest: without a licence nothing is permitted. None of this is legal advice; the tables say what the licences'
own texts and the Free Software Foundation's list say of changed works as a whole, and nobody tested in court whether
merged weights are one.

Sources: the ids are those of https://huggingface.co/docs/hub/repositories-licenses; GPL, LGPL, AGPL, Apache, MPL:
https://www.gnu.org/licenses/license-list.html; Creative Commons:
https://creativecommons.org/share-your-work/licensing-considerations/compatible-licenses/ and the deeds of each;
the communities' terms: https://ai.meta.com/llama/license, https://ai.google.dev/gemma/terms, https://www.licenses.ai.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

UNKNOWN = "unknown"
# from what asks for least to what asks for most; within a class the later one counts as stricter
_IDS = {
    "permissive": (
        "cc0-1.0 unlicense wtfpl pddl zlib isc postgresql ncsa bsl-1.0 mit bsd bsd-2-clause bsd-3-clause "
        "bsd-3-clause-clear ms-pl artistic-2.0 ecl-2.0 afl-3.0 cdla-permissive-1.0 cdla-permissive-2.0 openmdw-1.0 "
        "openmdw-1.1 apple-ascl etalab-2.0 apache-2.0"
    ),
    "attribution": "odc-by cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0",
    "copyleft": (
        "mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 osl-3.0 ofl-1.1 cdla-sharing-1.0 odbl gfdl cc-by-sa-3.0 "
        "cc-by-sa-4.0 lgpl lgpl-2.1 lgpl-3.0 gpl gpl-2.0 gpl-3.0 agpl-3.0"
    ),
    "use limits": (
        "openrail openrail++ bigscience-bloom-rail-1.0 bigscience-openrail-m bigcode-openrail-m "
        "creativeml-openrail-m tongyi-qianwen qwen deepseek gemma grok2-community llama2 llama3 llama3.1 llama3.2 "
        "llama3.3 llama4"
    ),
    "non-commercial": (
        "apple-amlr intel-research h-research deepfloyd-if-license mrl mnpl qwen-research "
        "fair-noncommercial-research-license cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
        "cc-by-nc-sa-4.0"
    ),
    "no changes": "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
}
CLASSES = (*_IDS, UNKNOWN)
_CLASS = {name: kind for kind, names in _IDS.items() for name in names.split()}
_RANK = {name: place for place, name in enumerate(_CLASS)}
# what the Hub knows by name; all else is `other` there, with a name of its own
_NOT_ON_THE_HUB = {"tongyi-qianwen", "qwen", "deepseek", "mrl", "mnpl", "qwen-research"}
# a changed work as a whole is to be under the same licence, with no terms beside it
_SHARE_ALIKE = {name for name in _CLASS if re.match(r"(a|l)?gpl|gfdl|cc-by(-nc)?-sa|osl", name)}
# what a work under the first may be passed on as
_MAY_BECOME = {
    ("cc-by-sa-3.0", "cc-by-sa-4.0"), ("cc-by-sa-4.0", "gpl-3.0"), ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0"), ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"), ("gpl-3.0", "agpl-3.0"),
    ("lgpl-2.1", "gpl-2.0"), ("lgpl-2.1", "gpl-3.0"), ("lgpl-3.0", "gpl-3.0"), ("lgpl-3.0", "agpl-3.0"),
}  # fmt: skip
_ALONE = {("apache-2.0", "gpl-2.0"): "the Free Software Foundation lists Apache-2.0 as incompatible with GPL 2 alone"}
# the first words of the texts that lie beside weights, most telling first
_TEXTS = (
    (r"llama ([234](?:\.[123])?) community license", "llama{}"),
    (r"gemma terms of use", "gemma"),
    (r"tongyi qianwen license", "tongyi-qianwen"),
    (r"qwen research license", "qwen-research"),
    (r"mistral ai (?:non-production|research) license", "mrl"),
    (r"(?:creative commons )?attribution-noncommercial-sharealike ([234]\.0)", "cc-by-nc-sa-{}"),
    (r"(?:creative commons )?attribution-noncommercial-noderivatives ([34]\.0)", "cc-by-nc-nd-{}"),
    (r"(?:creative commons )?attribution-noncommercial ([234]\.0)", "cc-by-nc-{}"),
    (r"(?:creative commons )?attribution-sharealike ([34]\.0)", "cc-by-sa-{}"),
    (r"(?:creative commons )?attribution-noderivatives (4\.0)", "cc-by-nd-{}"),
    (r"(?:creative commons )?attribution ([234]\.0) international", "cc-by-{}"),
    (r"gnu affero general public license version (3)", "agpl-{}.0"),
    (r"gnu lesser general public license version (3|2\.1)", "lgpl-{}"),
    (r"gnu general public license version ([23])", "gpl-{}.0"),
    (r"apache license,? version (2\.0)", "apache-{}"),
    (r"mozilla public license version (2\.0)", "mpl-{}"),
    (r"permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"redistribution and use in source and binary forms.*neither the name", "bsd-3-clause"),
    (r"redistribution and use in source and binary forms", "bsd-2-clause"),
)  # fmt: skip
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_HEAD = 6000  # letters of a licence's text that are looked at


@dataclass(frozen=True)
class Licence:
    """`id` as on the Hub, or `other` with a `name`; `read_in`: the file that says so, "" where none does."""

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None
    read_in: str = ""

    @property
    def key(self) -> str:
        """What the tables know it by."""
        named = (self.name or "").lower()
        if self.id != "other" or not named:
            return self.id
        short = re.sub(r"-(license|licence)(-agreement)?$", "", named)
        return short if short in _CLASS else named

    @property
    def kind(self) -> str:
        return _CLASS.get(self.key, UNKNOWN)

    @property
    def words(self) -> str:
        shown = self.name if self.id == "other" and self.name else self.id
        return f"[{shown}]({self.link})" if self.link and self.link.startswith("https://") else shown

    def front_matter(self) -> dict[str, str]:
        """The fields of a card."""
        if self.key in _CLASS and self.key not in _NOT_ON_THE_HUB:
            return {"license": self.key}
        if self.id == UNKNOWN:
            return {"license": UNKNOWN}
        fields = {"license": "other", "license_name": self.name or self.id, "license_link": self.link}
        return {key: value for key, value in fields.items() if value}


def read_license(source: str) -> Licence:
    """The licence of a folder, or of a Hub repository `id` or `id@revision`: its card's, else its LICENSE file's.

    `unknown` where neither says so, and where they cannot be read.
    """
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            return _of_files({path.name: path for path in folder.iterdir() if path.is_file()})
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None:
            return _of_repository(*source.partition("@")[::2])
    except (OSError, ValueError, HTTPError):  # not there, not for us, or nothing to be reached from here
        return Licence()
    return Licence()


def _of_repository(repo_id: str, revision: str) -> Licence:
    for name in ("README.md", *_FILES[:3]):  # one at a time: most repositories say it in their card
        try:
            found = Path(hf_hub_download(repo_id, name, revision=revision or None))
        except RemoteEntryNotFoundError:
            continue
        if (licence := _of_files({name: found})).id != UNKNOWN:
            return licence
    return Licence()


def _of_files(files: dict[str, Path]) -> Licence:
    if "README.md" in files:
        values = _front_matter(files["README.md"])
        if (licence := of_fields(values, "README.md")).id != UNKNOWN:
            return licence
    for name in _FILES:
        if name in files:
            text = files[name].read_text(encoding="utf-8", errors="replace")
            if (found := of_text(text)) != UNKNOWN:
                return Licence(found, read_in=name)
    return Licence()


def _front_matter(card: Path) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)^---\s*$", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL | re.M)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def of_fields(values: dict[str, Any], read_in: str = "") -> Licence:
    """The licence that `license`, `license_name` and `license_link` of a card name; of several the strictest."""
    given = values.get("license")
    ids = [one.strip().lower() for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)]
    name, link = (_text(values.get(key)) for key in ("license_name", "license_link"))
    # a link relative to the repository means nothing in another one
    link = link if link and link.startswith("https://") else None
    return strictest([Licence(one, name, link, read_in) for one in ids if one]) if any(ids) else Licence()


def _text(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) and value.strip() and value.isprintable() else None


def of_text(text: str) -> str:
    """The id of the licence whose text this is; `unknown` where it is none that is known here."""
    words = " ".join(re.sub(r"[^\w.,-]+", " ", text[:_HEAD]).lower().split())
    for pattern, name in _TEXTS:
        if found := re.search(pattern, words):
            made = name.format(*found.groups())
            return made if made in _CLASS else f"{made}.0" if f"{made}.0" in _CLASS else UNKNOWN
    return UNKNOWN


def strictest(licences: Iterable[Licence]) -> Licence:
    """The one that asks for most; an unknown one before all. Raises ValueError without any."""
    every = list(licences)
    if not every:
        raise ValueError("no licences to compare: expected those of a base and its experts")
    return max(every, key=lambda licence: (CLASSES.index(licence.kind), _RANK.get(licence.key, -1)))


def clashes(licences: dict[str, Licence]) -> list[str]:
    """What forbids to pass on a model made of all these sources, one sentence each; source -> its licence."""
    found = [
        f"{source} is under {of.key}, which forbids to pass on changed works"
        for source, of in licences.items()
        if of.kind == "no changes"
    ]
    for (one, first), (other, second) in combinations(licences.items(), 2):
        if reason := _clash(first.key, second.key):
            found.append(f"{one} is under {first.key} and {other} under {second.key}: {reason}")
    return found


def _clash(first: str, second: str) -> str | None:
    pair = (first, second) if first <= second else (second, first)
    if first == second or not {first, second} <= set(_CLASS):
        return None
    if pair in _ALONE:
        return _ALONE[pair]
    if (first, second) in _MAY_BECOME or (second, first) in _MAY_BECOME:
        return None
    if {"gpl", "lgpl"} & {first, second} and "gpl" in first and "gpl" in second:  # of which version, nobody said
        return None
    for alike, other in ((first, second), (second, first)):
        if alike in _SHARE_ALIKE and _CLASS[other] not in ("permissive", "attribution"):
            if other.startswith("mpl"):  # which names the GPL's family as one that it may become
                continue
            return f"{alike} wants the whole under its own terms alone, and {other} adds others"
    return None
