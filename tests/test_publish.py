"""`mmer push` and back: what lies on the Hub after it, what it does not send, and what it says when it cannot.

Everything runs in one child process with a Hub of its own; see publish_client.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_cards.publish import repository_files
from mmer import merge
from tests import tiny_world

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"journal.jsonl", ".env", "optimizer.pt", ".cache/huggingface/upload"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    merge(tiny_world.make(folder / "world"), folder / "merged", progress=False)
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.publish_client", folder / "facts.json", folder / "merged"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


def test_a_new_repository_holds_what_the_folder_holds(facts):
    new = facts["new"]
    assert new["code"] == 0, new["output"]
    assert new["titles"] == ["initial commit", "the first"] and new["private"]
    assert set(new["here"]) - set(new["there"]) == LEFT_OUT
    assert all(new["here"][path] == digest for path, digest in new["there"].items())
    assert {"README.md", "LICENSE.txt", "licenses.json", "merge_report.json", "modeling_mmer.py"} <= set(new["there"])
    assert {path for path in new["there"] if path.startswith("plots/")}
    assert "left out: .cache/, .env, journal.jsonl, optimizer.pt" in new["output"]
    assert "names 3 folders of this machine" in new["output"]


def test_what_is_there_already_makes_no_commit(facts):
    assert facts["again"]["titles"] == facts["new"]["titles"]
    assert "nothing has changed" in facts["again"]["output"] and "nothing has changed" not in facts["new"]["output"]


def test_a_download_gives_the_same_bytes(facts):
    snapshot = {path: digest for path, digest in facts["snapshot"].items() if not path.startswith(".cache/")}
    assert snapshot == facts["new"]["there"]


def test_an_evaluation_gets_into_the_card(facts):
    evaluated, new = facts["evaluated"], facts["new"]
    assert evaluated["titles"] == [*new["titles"], "Upload mmer-tiny"]
    assert evaluated["results"] == [0.8, 0.9975]
    differing = {path for path, digest in evaluated["there"].items() if new["there"].get(path) != digest}
    assert differing == {"README.md", "evaluation.json", "plots/retention.png"}


def test_what_a_push_has_written_goes_and_what_people_added_stays(facts):
    gone = set(facts["evaluated"]["there"]) - set(facts["less"]["there"])
    assert gone == {"evaluation.json", "plots/retention.png"}
    assert "LICENSE.txt" in facts["less"]["there"] and facts["less"]["titles"][-1] == "less"


def test_pull_requests_and_branches_leave_main_alone(facts):
    titles = facts["less"]["titles"]
    assert not facts["pull request unchanged"]["changed"] and facts["pull request unchanged"]["titles"] == titles
    assert facts["pull request"]["pull_request"].endswith("/org/new/discussions/1")
    assert facts["pull request"]["titles"] == titles and "NOTICE" in facts["pull request"]["there"]
    assert facts["branch"]["code"] == 0 and facts["branch"]["titles"] == titles
    assert "NOTICE" in facts["branch"]["there"] and facts["branch"]["main"] == facts["less"]["there"]
    assert "pull request goes against main" in facts["both"]["message"]


@pytest.mark.parametrize(("case", "status"), [("wrong token", 401), ("forbidden", 403)])
def test_who_may_not_write_is_told_what_to_do(facts, case, status):
    found = facts[case]
    assert found["error"] == "ValueError" and found["titles"] is None
    assert f"the Hub answered {status}" in found["message"] and "hf auth login" in found["message"]
    assert "\n" not in found["message"]


@pytest.mark.parametrize("case", ["fails once", "cut once"])
def test_what_passes_is_tried_again_and_committed_once(facts, case):
    assert facts[case].get("changed"), facts[case]
    assert facts[case]["titles"] == ["initial commit", "Upload mmer-tiny"]


def test_what_does_not_pass_is_one_line(facts):
    always, broken = facts["fails always"], facts["cut always"]
    assert always["error"] == "ValueError" and "the Hub answered 503" in always["message"]
    assert "tried several times" in always["message"] and always["titles"] == ["initial commit"]
    assert broken["error"] == "OSError" and "push again, and only the rest is sent" in broken["message"]
    assert "\n" not in always["message"] + broken["message"]


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(facts):
    assert facts["pull request cut"]["error"] == "OSError"
    assert facts["pull request cut"]["refs"] == ["main", "refs/pr/1"]


def test_the_large_way_gives_the_same_repository(facts):
    assert facts["large"]["changed"] and set(facts["large"]["there"]) == {*facts["less"]["there"], "NOTICE"} - {
        "LICENSE.txt"
    }
    assert "expected name or org/name" in facts["name"]["message"]


def test_licences_that_clash_stop_a_push_until_one_is_named(facts):
    clash = facts["clash"]
    assert clash["code"] == 1 and clash["titles"] is None and clash["asked"] == 0 and not clash["crash"]
    assert "base is under gpl-3.0 and experts.image.model under llama2" in clash["output"]
    assert facts["overridden"]["code"] == 0 and facts["overridden"]["license"] == "mit"
    assert facts["settled"]["code"] == 0 and facts["settled"]["license"] == "mit"
    assert facts["settled"]["titles"] == facts["overridden"]["titles"]


def test_a_card_by_hand_goes_up_as_it_is(facts):
    assert facts["by hand"]["card"] == "---\nlicense: apache-2.0\n---\nby hand\n"
    assert "README.md was edited by hand" in facts["by hand"]["output"]
    other = facts["by hand, other license"]
    assert other["code"] == 1 and "names the license 'apache-2.0', found --license 'mit'" in other["output"]


def test_a_folder_that_is_not_sound_is_not_sent(facts):
    broken = facts["broken"]
    assert broken["code"] == 1 and broken["asked"] == 0 and broken["titles"] is None and not broken["crash"]
    assert "fails the checks" in broken["output"] and "Nothing was pushed" in broken["output"]
    assert facts["no folder"]["code"] == 1 and facts["no folder"]["asked"] == 0


def test_the_token_is_nowhere(facts):
    assert not facts["token seen"]


def test_what_belongs_to_a_repository(tmp_path):
    inside = ["config.json", "model-00001-of-00002.safetensors", "plots/a.png", "x_mmer.py", "README.md", "LICENSE"]
    outside = ["model.safetensors.tmp", "plots/deep/a.png", "sub/config.json", ".git/config.json", "merge.py", "a.bin"]
    for path in inside + outside:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    kept, out = repository_files(tmp_path)
    assert kept == sorted(inside)
    assert out == sorted([".git/", "a.bin", "merge.py", "model.safetensors.tmp", "plots/", "sub/"])
