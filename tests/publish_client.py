"""What test_publish.py does in a process of its own: a Hub, and pushes to it.

usage: python -m tests.publish_client FACTS.json FOLDER. huggingface_hub reads HF_ENDPOINT once, so the Hub is there
before anything else is imported. What was seen is written into FACTS.json.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tests.evaluation_rows import ROW
from tests.hub_world import run_client
from tests.local_hub import LocalHub

TOKEN = "hf_averysecrettokenofthetest"


def hashes(contents: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in sorted(contents.items())}


def main(hub: LocalHub, merged: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard, snapshot_download
    from typer.testing import CliRunner

    from hub_cards import publish
    from mmer import app

    publish.WAITS = (0.0, 0.0)
    facts: dict[str, Any] = {}

    def there(repo: str, revision: str = "main") -> dict[str, str]:
        return hashes({path: stored.content for path, stored in hub.files(repo, revision).items()})

    def here(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return hashes({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def command(name: str, folder: Path, *words: str):
        asked = len(hub.log)
        done = CliRunner().invoke(app, ["push", str(folder), *words])
        facts[name] = {
            "code": done.exit_code, "output": " ".join(done.output.split()), "asked": len(hub.log) - asked,
            "titles": hub.titles(words[0]) if words[0] in hub.repos else None, "crash": "Traceback" in done.output,
        }  # fmt: skip

    def call(name: str, folder: Path, repo: str, **options: Any):
        facts[name] = {}
        try:
            made = publish.push_folder(folder, repo, **options)
            facts[name] = {"changed": made.changed, "commit": made.commit, "pull_request": made.pull_request}
        except Exception as error:
            facts[name] = {"error": type(error).__name__, "message": str(error)}
        facts[name]["titles"] = hub.titles(repo) if repo in hub.repos else None
        facts[name]["refs"] = sorted(hub.repos[repo].refs) if repo in hub.repos else None
        hub.faults.clear()

    folder = Path(shutil.copytree(merged, "mmer-tiny"))
    (folder / "journal.jsonl").write_text("{}")
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / "optimizer.pt").write_bytes(b"not for the Hub")
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/upload").write_text("cache")
    (folder / "LICENSE.txt").write_text("the base's terms")

    # a whole life: made, unchanged, changed, with less in it
    command("new", folder, "org/new", "--private", "--message", "the first")
    facts["new"] |= {"private": hub.repos["org/new"].private, "there": there("org/new"), "here": here(folder)}
    command("again", folder, "org/new")
    facts["snapshot"] = here(Path(snapshot_download("org/new", local_dir="snapshot")))
    (folder / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW]}))
    command("evaluated", folder, "org/new")
    facts["evaluated"]["there"] = there("org/new")
    card = ModelCard(hub.files("org/new")["README.md"].content.decode())
    facts["evaluated"]["results"] = [result.metric_value for result in card.data.eval_results or []]
    (folder / "evaluation.json").unlink()
    (folder / "LICENSE.txt").unlink()
    command("less", folder, "org/new", "--message", "less")
    facts["less"]["there"] = there("org/new")

    # elsewhere than on main
    call("pull request unchanged", folder, "org/new", create_pr=True)
    (folder / "NOTICE").write_text("a notice")
    call("pull request", folder, "org/new", create_pr=True)
    facts["pull request"]["there"] = there("org/new", "refs/pr/1")
    command("branch", folder, "org/new", "--revision", "next")
    facts["branch"] |= {"there": there("org/new", "next"), "main": there("org/new")}
    call("both", folder, "org/new", create_pr=True, revision="next")

    # a Hub that refuses or fails
    call("wrong token", folder, "org/refused", token="hf_wrong")
    hub.fail("POST", "repos/create", 403)
    call("forbidden", folder, "org/refused")
    hub.fail("POST", "/commit/main", 500)
    call("fails once", folder, "org/flaky")
    hub.fail("POST", "/commit/main", 503, times=9)
    call("fails always", folder, "org/down")
    hub.fail("POST", "/commit/main", None)
    call("cut once", folder, "org/cut")
    hub.fail("POST", "repos/create", None, times=9)
    call("cut always", folder, "org/broken")
    (folder / "NOTICE").write_text("another notice")
    hub.fail("POST", "/commit/main", None)
    call("pull request cut", folder, "org/flaky", create_pr=True)
    call("large", folder, "org/large", large=True)
    facts["large"]["there"] = there("org/large")
    call("name", folder, "org/two/many")

    # what is wrong with the folder, or its licences
    recorded = json.loads((folder / "licenses.json").read_text())
    before = json.dumps(recorded)
    recorded["sources"]["base"]["id"], recorded["sources"]["experts.image.model"]["id"] = "gpl-3.0", "llama2"
    (folder / "licenses.json").write_text(json.dumps(recorded))
    command("clash", folder, "org/licences")
    command("overridden", folder, "org/licences", "--license", "mit")
    command("settled", folder, "org/licences")
    for name in ("overridden", "settled"):
        facts[name]["license"] = ModelCard(hub.files("org/licences")["README.md"].content.decode()).data.license
    (folder / "licenses.json").write_text(before)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nby hand\n")
    command("by hand", folder, "org/by-hand")
    facts["by hand"]["card"] = hub.files("org/by-hand")["README.md"].content.decode()
    command("by hand, other license", folder, "org/by-hand", "--license", "mit")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-64])
    command("broken", folder, "org/broken-folder")
    command("no folder", Path("nowhere"), "org/nowhere")

    content = [
        stored.content for repo in hub.repos.values() for c in repo.commits.values() for stored in c.files.values()
    ]
    facts["token seen"] = TOKEN in json.dumps(facts) or any(TOKEN.encode() in one for one in content)
    return facts


if __name__ == "__main__":
    run_client(main, TOKEN)
