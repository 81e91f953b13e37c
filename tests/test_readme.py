"""The README says what is so: its map, its recipe, its commands, its numbers, and the demo whose output it shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from evaluation_mmer.demo import EXPERTS, samples
from merging_mmer import Recipe
from mmer import app

from .tiny_misfits import REFUSED
from .tiny_stock import STOCK

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "benchmarks/RESULTS.md").read_text()
RESULTS = ROOT / "benchmarks/results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def page_section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_map_is_the_tree():
    listed, room = set(), ""
    for line in re.search(r"```text\n(.*?)```", section("Map"), re.DOTALL)[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            room = name.rstrip("/")
            listed.add(room)
        else:
            listed.add(f"{room}/{name.rstrip('/')}")
    for path in listed:
        assert (ROOT / path).exists(), f"{path} is in the map and not in the tree"
    rooms = {path.parent.name for path in ROOT.glob("*_mmer/__init__.py")} | {"hub_cards"}
    there = {f"{room}/{path.name}" for room in rooms for path in (ROOT / room).iterdir()}
    there = {path for path in there if not path.endswith(("__init__.py", "__pycache__"))}
    assert there <= listed, f"not in the map: {sorted(there - listed)}"


def test_the_recipe_is_the_default_one():
    (text,) = blocks("yaml")
    recipe = Recipe.from_dict(yaml.safe_load(text))
    plain = Recipe.from_dict({"base": recipe.base, "experts": {"image": "llava-hf/llava-1.5-7b-hf"}})
    assert recipe.method == plain.method and recipe.decoupling == plain.decoupling
    assert recipe.text_route == plain.text_route
    assert list(recipe.experts) == ["image", "audio", "medical", "video"]


def test_every_command_is_one():
    commands = re.findall(r"^(?:pip install \. && )?mmer (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, f"mmer {command}: {result.output}"


def test_the_test_command_is_what_ci_runs():
    steps = (ROOT / ".ci/run").read_text()
    assert 'pip install -e ".[test]" && python -m pytest' in README
    assert '-e ".[test]"' in steps and "python -m pytest\n" in steps


@pytest.mark.parametrize(
    ("text", "file", "experts"),
    [
        (section("What is retained"), "retention.json", EXPERTS),
        (page_section("Every way of decoupling"), "retention-two-experts.json", ("image", "audio")),
    ],
    ids=["five experts", "two experts"],
)
def test_a_table_is_what_was_measured(text, file, experts):
    rows = {(row["expert"], row["parameters"]): row for row in json.loads((RESULTS / file).read_text())}
    cells = r" ([^|]+) \|" * 5
    shown = re.findall(rf"^\| ({'|'.join(experts)}) \|{cells}", text, re.MULTILINE)
    assert len(shown) == len(rows) >= 8 and {expert for expert, *_ in shown} == set(experts)
    for expert, parameters, accuracy, retention, same, bits in shown:
        row = rows[expert, parameters.strip()]
        low, high = row["interval"]
        assert accuracy.strip() == f"{row['accuracy']:.1%} ({low:.1%} – {high:.1%})"
        assert retention.strip() == f"{row['retention']:.1%}"
        assert same.strip() == f"{row['agreement']:.1%}"
        cost = row["bits_per_parameter"]
        assert bits.strip() == ("–" if cost is None else f"{cost:.2f}")
        assert row["n"] >= 400 and row["merged"] == list(experts)


def test_what_was_forgotten_is_what_was_measured():
    rows = json.loads((RESULTS / "forgetting.json").read_text())
    assert len(rows) >= 8 and all(row["n"] >= 400 for row in rows)
    for row in rows:
        low, high = row["interval"]
        line = f"| {row['task']} | {row['stage']} | {row['accuracy']:.1%} ({low:.1%} – {high:.1%}) | "
        assert f"{line}{row['retention']:.1%} | {row['agreement']:.1%} |" in section("What is forgotten")


def test_how_fast_a_merge_is_is_what_was_measured():
    rows = json.loads((RESULTS / "merge_speed.json").read_text())["rows"]
    rows = {(row["tool"], row["density"], row["rank"]): row for row in rows if row["experts"] == 3}
    merges = section("How fast").split("The merged lab model", 1)[0]
    shown = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", merges, re.MULTILINE)[1:]
    lines = {what: (seconds, ratio) for what, seconds, ratio in shown if "---" not in what}
    ways = {"copy": "a plain copy of base and experts", "mergekit": "mergekit 0.1.5, `ties --lazy-unpickle`, no masks"}
    for (tool, density, rank), row in rows.items():
        if tool not in ("copy", "ours", "mergekit"):
            continue
        what = ways.get(tool, "`mmer merge`, masks and row scales" + f" and corrections of rank {rank}" * bool(rank))
        what += "" if density is None else f", density {density:g}"
        assert lines[what] == (f"{row['seconds']:.1f}", f"{row['over_copy'][0]:.1f}"), what
    assert len(lines) == 7


def test_the_classes_that_fit_and_that_do_not_are_those_that_are_tested():
    fits, misfits = section("Merge your own").split("What does not fit")
    listed = {
        row: set(re.findall(r"[a-z0-9_-]+", classes))
        for text in (fits, misfits)
        for row, classes in re.findall(r"^\| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    }
    assert set().union(*(names for row, names in listed.items() if row.startswith("transformers, "))) == set(STOCK)
    assert set().union(*(names for row, names in listed.items() if row in misfits and "---" not in row)) - {
        "classes"
    } == set(REFUSED)


def test_user_mistakes_are_one_line():
    result = CliRunner().invoke(app, ["merge", "no-such-recipe.yaml", "out"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows_and_its_folder_loads(tmp_path):
    """`mmer demo`, then the README's own snippet on the folder it made."""
    done = subprocess.run(
        [sys.executable, "-m", "mmer", "demo"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.search(r"```text\n(.*?)```", section("Two commands"), re.DOTALL)[1]
    # times and tables differ from machine to machine; questions, answers and routes do not
    lines = [line.strip() for line in shown.splitlines() if line.startswith(("a ", "all four", "text alone", "  "))]
    assert len(lines) >= 40
    printed = " ".join(done.stdout.split())
    for line in lines:
        assert " ".join(line.split()) in printed, f"the README shows {line!r}, the demo printed:\n{done.stdout}"
    snippet = next(block for block in blocks("python") if "AutoModel" in block)
    first = samples()["image"][0]
    shutil.copyfile(first["file"], tmp_path / "picture.png")
    (tmp_path / "ask.py").write_text(snippet)
    asked = subprocess.run([sys.executable, "ask.py"], cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert asked.stdout.strip() == first["answer"]


def test_how_fast_the_merged_model_is_is_what_was_measured():
    rows = json.loads((RESULTS / "inference.json").read_text())["rows"]
    shown = dict(re.findall(r"^\| ([^|]+) \| (\d\.\d\d \([^|]+\)) \|$", section("How fast"), re.MULTILINE))
    expected = {
        "decoding, text alone, beside the base": ("decode", "text", "base", 64),
        "decoding behind a picture, beside the base": ("decode", "image, text", "base", 53),
        "decoding behind several media, beside the base": ("decode", "several media, text", "base", 74),
        "prefill of 512 tokens, weights kept, beside the original expert": ("prefill", "kept", "original", 512),
        "prefill of 512 tokens, packed, beside the original expert": ("prefill", "packed", "original", 512),
        "memory, packed, beside base and five originals": ("memory", "packed", "base and originals", None),
        "loading, for each byte, beside the base": ("load", "load, per byte", "base", None),
    }
    assert set(shown) == set(expected)
    for what, key in expected.items():
        (row,) = (
            row for row in rows
            if (row["section"], row["what"], row["against"], row["prompt"]) == key and row["batch"] in (1, None)
        )  # fmt: skip
        middle, least, largest = row["ratio"]
        assert shown[what] == f"{middle:.2f} ({least:.2f} – {largest:.2f})", what
        rounds = 1 if row["section"] == "memory" else 3  # bytes are the same each time
        assert row["experts"] == 5 and row["rounds"] == rounds and row["dtype"] == "float32"
    (packed,) = (
        row for row in rows if row["section"] == "prefill" and (row["what"], row["prompt"]) == ("packed", 128)
    )
    assert f"(128 tokens: {packed['ratio'][0]:.2f})" in section("How fast")
