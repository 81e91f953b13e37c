"""What test_hub_flow.py does in processes of their own: people who merge and push, and people who load.

usage: python hub_flow_client.py merge FACTS.json PLAN.json | load FACTS.json PLAN.json | offline FACTS.json PLAN.json
Only `merge` can import the rooms. Faults are ordered from the Hub before each step. What was seen is written into
FACTS.json.
"""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import blocked_rooms
from hub_client import answers, load, piped
from huggingface_hub import constants, snapshot_download

REPO, DOWN = "org/mmer-tiny", "org/mmer-down"
PIECE = 1 << 12  # bytes that are written at once; huggingface_hub's own are 10 MB, more than a file has here

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.01))
constants.DOWNLOAD_CHUNK_SIZE = PIECE


def order(*faults: dict[str, Any]):
    """These faults from here on, and no others."""
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/faults", json.dumps(faults).encode())
    request.add_header("Authorization", f"Bearer {os.environ['MMER_TEST_TOKEN']}")
    urllib.request.urlopen(request).close()


def fault(method: str, path: str, status: int | None, times: int = 1, **more: Any) -> dict[str, Any]:
    return {"method": method, "path": path, "status": status, "times": times, **more}


def cached(repo: str) -> dict[str, list[str]]:
    """What the cache has of a repository: the files of its snapshots, and downloads that have no end."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    return {
        "snapshot": sorted(path.name for path in folder.glob("snapshots/*/*")),
        "incomplete": [path.name for path in folder.rglob("*.incomplete")],
    }


def merge(plan: dict[str, Any]) -> dict[str, Any]:
    import yaml
    from typer.testing import CliRunner

    from hub_cards import publish
    from merging_mmer import hub_access
    from mmer import app

    publish.WAITS = hub_access.WAITS = (0.0, 0.0)
    facts: dict[str, Any] = {}

    def command(name: str, *words: str):
        done = CliRunner().invoke(app, list(words))
        trace = repr(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
        facts[name] = {"code": done.exit_code, "output": " ".join(done.output.split()), "trace": trace}

    def merged(name: str, base: str, *faults: dict[str, Any], **experts: str):
        order(*faults)
        recipe = {"base": base, "experts": experts or {"image": plan["image"]}}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        command(name, "merge", "recipe.yaml", name.replace(" ", "-"))
        facts[name]["left"] = sorted(path.name for path in Path().iterdir() if path.name != "recipe.yaml")

    # what the Hub refuses, or cannot do now
    merged("no repository", "org/none")
    merged("no revision", "org/base@nowhere")
    merged("no such commit", f"org/base@{'0' * 40}")
    merged("gated", "org/base", fault("GET", "api/models/org/base/", 403, times=9, code="GatedRepo"))
    merged("forbidden", "org/base", fault("GET", "api/models/org/base/", 403, times=9))
    merged("too often", "org/base", fault("GET", "api/models/org/base/", 429, times=99))
    merged("down", "org/base", fault("GET", "api/models/org/base/", 500, times=99))
    token = os.environ.pop("HF_TOKEN")
    merged("no token", "org/secret")
    os.environ["HF_TOKEN"] = "wrong"
    merged("wrong token", "org/secret")
    os.environ["HF_TOKEN"] = token

    # a shard that never comes whole: nothing of it is there later, with and without the Hub
    merged("cut always", "org/base", fault("GET", plan["shard"], None, times=999))
    facts["cut always"]["cache"] = cached("org/base")
    order()
    try:
        facts["cut always"]["cache"]["taken"] = snapshot_download("org/base", local_files_only=True)
    except FileNotFoundError as error:
        facts["cut always"]["cache"]["refused"] = type(error).__name__

    # all goes wrong once, and then goes on
    merged(
        "merged", "org/base",
        fault("GET", "api/models/org/base/", 500), fault("GET", plan["shard"], None, skip=1),
        fault("GET", plan["shard"], 429), fault("GET", "org/ear/resolve/.*tokenizer.json", 503),
        image=plan["image"], audio=plan["audio"],
    )  # fmt: skip

    order(fault("PUT", "/lfs/", None, times=999, early=True))
    command("push down", "push", "merged", DOWN)
    order(
        fault("PUT", "/lfs/", None, early=True), fault("POST", "/preupload/", 429), fault("POST", "/commit/main", 500)
    )
    command("push", "push", "merged", REPO)
    order()
    return facts


def failing(repo: str, *faults: dict[str, Any], **how: Any) -> dict[str, str]:
    order(*faults)
    try:
        load(repo, **how)
    except Exception as error:  # of several libraries
        return {"error": type(error).__name__, "message": " ".join(str(error).split())}
    return {"error": "", "message": ""}


def load_it(plan: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    weights = plan["weights"]
    facts["no repository"] = failing("org/none")
    facts["gated"] = failing(REPO, fault("HEAD", f"{REPO}/resolve", 403, times=99, code="GatedRepo"))
    facts["no revision"] = failing(REPO, revision="nowhere")
    facts["down"] = failing(REPO, fault("HEAD", f"{REPO}/resolve", 500, times=999))

    # weights that never come whole, and what a later load makes of what is there
    facts["cut always"] = failing(REPO, fault("GET", weights, None, times=999))
    facts["cut always"] |= {"cache": cached(REPO)}
    order()
    facts["cut always"]["later"] = failing(REPO, local_files_only=True)

    order(fault("GET", weights, 429), fault("GET", weights, None, skip=1))
    model, processor = load(REPO)
    facts["answers"], facts["module"] = answers(model, processor), type(model).__module__
    facts["task"], facts["texts"] = piped(model=REPO).values()
    return facts | pinned(plan)


def pinned(plan: dict[str, Any]) -> dict[str, Any]:
    """Weights of one commit with the code of another; main's own code cannot be loaded."""
    how = {"revision": plan["next"], "code_revision": plan["first"]}
    model, processor = load(REPO, **how)
    facts: dict[str, Any] = {"pinned code": answers(model, processor), "pinned module": type(model).__module__}
    facts["pinned"] = answers(*load(REPO, revision=plan["first"]))
    try:
        load(REPO, revision=plan["next"])
    except RuntimeError as error:
        facts["new code"] = str(error)
    return facts


def offline(plan: dict[str, Any]) -> dict[str, Any]:
    # transformers asks the Hub for a task that is not named
    return {"answers": answers(*load(REPO)), "texts": piped("any-to-any", model=REPO)["texts"], **pinned(plan)}


if __name__ == "__main__":
    found = {"merge": merge, "load": load_it, "offline": offline}[sys.argv[1]](
        json.loads(Path(sys.argv[3]).read_text())
    )
    assert sys.argv[1] == "merge" or blocked_rooms.still_blocked()
    Path(sys.argv[2]).write_text(json.dumps(found))
