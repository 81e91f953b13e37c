"""What test_space.py does in a process of its own: pushes with a Space, and with its faults, to a Hub.

usage: python -m tests.space_client FACTS.json FOLDER. huggingface_hub reads HF_ENDPOINT once, so the Hub is there
before anything else is imported. What was seen is written into FACTS.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.hub_world import run_client
from tests.local_hub import LocalHub

TOKEN = "hf_averysecrettokenofthetest"
SPACE = "spaces/org/new-space"


def main(hub: LocalHub, merged: Path) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi
    from typer.testing import CliRunner

    from hub_cards import publish
    from mmer import app

    publish.WAITS = (0.0, 0.0)
    facts: dict[str, Any] = {}

    def command(name: str, *words: str, space: str = SPACE, revision: str = "main"):
        asked = len(hub.log)
        done = CliRunner().invoke(app, ["push", str(folder), *words])
        facts[name] = {
            "code": done.exit_code, "output": " ".join(done.output.split()), "asked": len(hub.log) - asked,
            "crash": "Traceback" in done.output, "head": None, "titles": None, "repos": sorted(hub.repos),
        }  # fmt: skip
        if (model := words[0]) in hub.repos:
            facts[name]["head"] = hub.repos[model].resolve(revision)
        if space in hub.repos:
            files = {path: stored.content.decode() for path, stored in hub.files(space).items()}
            facts[name] |= {"files": files, "titles": hub.titles(space), "private": hub.repos[space].private}
        hub.faults.clear()

    folder = Path(shutil.copytree(merged, "mmer-tiny"))
    command("alone", "org/new")
    command("new", "org/new", "--space", "--private")
    command("again", "org/new", "--space")
    (folder / "NOTICE").write_text("a notice")
    command("changed", "org/new", "--space")
    command("branch", "org/new", "--space", "--revision", "next", revision="next")
    command("named", "org/new", "--space-repo", "org/other", space="spaces/org/other")
    command("private", "org/secret", "--space", "--private", space="spaces/org/secret-space")

    # what is in the Space already: a page of an earlier time, and a card by hand
    older = [CommitOperationAdd("chat_page/older.py", b"older"), CommitOperationAdd("examples/a.txt", b"theirs")]
    HfApi().create_commit("org/new-space", older, commit_message="older", repo_type="space")
    command("older", "org/new", "--space")
    own = [CommitOperationAdd("README.md", b"---\nsdk: gradio\ntitle: mine\n---\nby hand\n")]
    HfApi().create_commit("org/new-space", own, commit_message="by hand", repo_type="space")
    command("by hand", "org/new", "--space")

    # faults
    command("pull request", "org/pr", "--space", "--create-pr", space="spaces/org/pr-space")
    command("bad name", "org/bad", "--space-repo", "org/two/many", space="spaces/org/bad-space")
    hub.fail("POST", "api/spaces/.*/commit/main", 503)
    command("fails once", "org/flaky", "--space", space="spaces/org/flaky-space")
    hub.fail("POST", "api/spaces/.*/commit/main", 403)
    command("forbidden", "org/refused", "--space", space="spaces/org/refused-space")
    facts["token seen"] = TOKEN in json.dumps(facts)
    return facts


if __name__ == "__main__":
    run_client(main, TOKEN)
