"""RESULTS.md is what the results files say, all of them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import results_page  # noqa: E402


def test_the_page_is_made_of_the_results_that_are_there():
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()


def test_no_results_file_is_left_out():
    there = {path.name for path in results_page.RESULTS.glob("*.json")}
    assert there <= {section.file for section in results_page.SECTIONS}


def test_a_number_that_changes_changes_the_page(tmp_path):
    for path in results_page.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    rows = json.loads((tmp_path / "retention.json").read_text())
    rows[0]["accuracy"] = 0.123
    (tmp_path / "retention.json").write_text(json.dumps(rows))
    assert "| image | original expert | 12.3% (" in results_page.page(results=tmp_path)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([{"versions": "mmer 0.1.0"}, {"versions": "mmer 0.1.0"}], "mmer 0.1.0"),
        ({"rows": [{"n": 1}]}, "versions were not kept"),
        ({"machine": {"cores": 2, "processor": "X", "torch": "2"}, "rows": []}, "2 cores of X, torch 2"),
        ({"machine": {"cores": 2, "processor": "X"}, "mergekit": "0.1.5"}, "2 cores of X, mergekit 0.1.5"),
    ],
)
def test_versions_are_those_of_the_rows(found, words):
    assert results_page.versions_of(found) == words


def test_times_have_their_spread():
    row = {
        "section": "decode", "what": "text", "against": "base", "experts": 5, "batch": 1, "prompt": None,
        "unit": "tokens/s",
        "ours": [14.0, 13.0, 15.0], "plain": [15.0, 14.0, 16.0], "ratio": [0.93, 0.9, 0.97], "aim": "≥ 0.97",
    }  # fmt: skip
    line = results_page.inference({"rows": [row]}).splitlines()[-1]
    assert line == "| decode | text | base | 5 | 1 |  | 14 tokens/s | 15 tokens/s | 0.93 (0.90 – 0.97) | ≥ 0.97 |"
