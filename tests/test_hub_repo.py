"""The Hub form: a merged folder works in a process where none of our packages can be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configuration_mmer.export_mmer import AUTO_MAP, shipped_files
from merging_mmer import Recipe, merge
from modeling_mmer import MMERForConditionalGeneration
from tests import tiny_world

CONSUMER = "consume_repo.py"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    recipe = tiny_world.make(folder / "world")
    merge(Recipe.from_dict(recipe), folder / "mmer-tiny", progress=False)
    return folder / "mmer-tiny", folder / "world"


def run_consumer(script: str, repo: Path, scratch: Path) -> subprocess.CompletedProcess:
    """One of the scripts beside this file, in a process of its own; what it saw is in SCRATCH/facts.json."""
    scratch.mkdir()
    command = [sys.executable, Path(__file__).with_name(script), repo, scratch, scratch / "facts.json"]
    # a folder that is not the checkout, and no path that leads to it
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=scratch, env=clean, capture_output=True, text=True)


def test_a_user_can_do_everything_without_our_packages(merged, tmp_path):
    repo, _ = merged
    done = run_consumer(CONSUMER, repo, tmp_path / "scratch")
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads((tmp_path / "scratch/facts.json").read_text())
    assert facts["experts"] == ["image", "audio"]
    assert facts["text_route"] == [0, 2, 3, 1]
    assert facts["module"].startswith("transformers_modules.")
    assert not [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if key in facts["loading"]]
    assert {path.name for path in shipped_files()} <= set(facts["saved"])
    assert facts["auto_map"] == AUTO_MAP
    assert len({tuple(answer) for answer in facts["answers"]}) > 1


def test_a_repo_that_lacks_a_file_fails_there(merged, tmp_path):
    """The test above can fail: without the routing file nothing loads."""
    repo, _ = merged
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in repo.iterdir():
        if path.name != "routing_mmer.py":
            (broken / path.name).symlink_to(path)
    done = run_consumer(CONSUMER, broken, tmp_path / "scratch")
    assert done.returncode != 0 and "routing_mmer" in done.stderr


def test_what_the_rooms_load_is_what_was_stored(merged):
    repo, world = merged
    model = MMERForConditionalGeneration.from_pretrained(repo).eval()
    base = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    ids = torch.randint(7, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
