"""From Hub ids to a repository that users load, with everything going wrong once on the way: merge, push, load.

One Hub of local_hub.py, and its clients in processes of their own; see hub_flow_client.py. The pieces of files are cut
smaller than huggingface_hub's own, since the files here are.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from merging_mmer import Recipe, merge
from tests import tiny_world
from tests.hub_world import World
from tests.local_hub import LocalHub

pytestmark = pytest.mark.slow  # five processes, each of which imports torch
CLIENT = Path(__file__).with_name("hub_flow_client.py")
REPO, DOWN = "org/mmer-tiny", "org/mmer-down"
PIECE = 1 << 12  # as hub_flow_client.py has it
CLI = "import sys; from mmer import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    recipe = tiny_world.make(folder / "world")
    merge(Recipe.from_dict(recipe), folder / "here", progress=False)
    with LocalHub(lfs=lambda repo, path: path.endswith(".safetensors")) as hub:
        hub.put("org/base", Path(recipe["base"]))
        hub.put("org/secret", Path(recipe["base"]))
        hub.repos["org/secret"].private = True
        # what the recipe names lies on a branch and at a commit; what main holds now is something else
        hub.put("org/eye", Path(recipe["experts"]["image"]), ref="v1")
        ear = hub.put("org/ear", Path(recipe["experts"]["audio"]))
        hub.put("org/ear", Path(recipe["base"]), title="another")
        shard = f"/lfs/{hub.files('org/base')['model.safetensors'].sha256}"
        plan = {"image": "org/eye@v1", "audio": f"org/ear@{ear}", "shard": shard}
        world = World(hub, folder, CLIENT)

        killed = kill_in_mid_download(world, plan)
        merged = world.run("merge", written(folder, plan), "maker-home", rooms=True, MMER_TEST_TOKEN=hub.token)
        yield SimpleNamespace(hub=hub, world=world, folder=folder, plan=plan, killed=killed, merged=merged)


def written(folder: Path, plan: dict) -> Path:
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder / "plan.json"


def whole(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("snapshots/*/*") if path.exists()}


def kill_in_mid_download(world: World, plan: dict) -> dict:
    """`mmer merge`, killed while half of the image expert's weights has come."""
    scratch = world.folder / "killed"
    scratch.mkdir()
    recipe = {"base": plan["image"], "experts": {"image": plan["image"]}}  # a YAML file may be JSON
    (scratch / "recipe.yaml").write_text(json.dumps(recipe))
    cache = world.folder / "maker-home/hub/models--org--eye"
    weights = world.hub.files("org/eye", "v1")["model.safetensors"]
    fault = world.hub.fail("GET", f"/lfs/{weights.sha256}", None, hold=True)
    command = [sys.executable, "-c", CLI, "merge", "recipe.yaml", "out"]
    env = world.environment("maker-home", rooms=True)
    running = subprocess.Popen(command, cwd=scratch, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # all the other files come whole
        others = set(world.hub.files("org/eye", "v1")) - {"model.safetensors"}
        while not (fault.struck.wait(0.2) and whole(cache) >= others):
            assert running.poll() is None, "it ended before it asked for the weights"
    finally:
        running.kill()
        running.wait()
    return {
        "asked": len(world.hub.log),
        "whole": whole(cache),
        "blobs": {path.name for path in cache.glob("blobs/*") if not path.name.endswith(".incomplete")},
        "weights": weights,
        "left": sorted(path.name for path in scratch.iterdir()),
    }


@pytest.fixture(scope="module")
def loaded(flow):
    repository = flow.hub.repos[REPO]
    flow.plan["first"] = repository.resolve("main")
    flow.plan["weights"] = f"/lfs/{flow.hub.files(REPO)['model.safetensors'].sha256}"
    # the next commit has code that does not load, on a branch of its own
    changed = flow.folder / "changed"
    for name, stored in flow.hub.files(REPO).items():
        path = changed / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored.content)
    with (changed / "modeling_mmer.py").open("a") as file:
        file.write('\nraise RuntimeError("the new code")\n')
    flow.plan["next"] = flow.hub.put(REPO, changed, ref="next")
    settings = {"MMER_TEST_TOKEN": flow.hub.token}
    seen = flow.world.run("load", written(flow.folder, flow.plan), "user-home", **settings)
    return flow, seen


# merging from ids


def test_a_killed_download_leaves_nothing_half_and_the_next_merge_takes_what_is_whole(flow):
    killed = flow.killed
    assert "config.json" in killed["whole"] and "model.safetensors" not in killed["whole"]
    assert killed["weights"].sha256 not in killed["blobs"]
    assert killed["left"] in (["recipe.yaml"], [".out.partial", "recipe.yaml"])
    later = [path for method, path in flow.hub.log[killed["asked"] :] if method == "GET"]
    again = {Path(path).name for path in later if "org/eye/resolve" in path}
    assert again & killed["whole"] == set() and f"/lfs/{killed['weights'].sha256}" in later


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "no repository",
            "'org/none' is no folder here.*answered 404.*no such repository, or the token that is set may",
        ),
        ("no revision", "'org/base@nowhere'.*answered 404.*no revision 'nowhere' of org/base"),
        ("no such commit", "'org/base@0{40}'.*answered 404.*no revision '0{40}' of org/base"),
        ("gated", "'org/base'.*answered 403.*is gated: ask for access on its page.*`hf auth login`"),
        ("forbidden", "'org/base'.*answered 403.*log in with `hf auth login`"),
        ("too often", "'org/base'.*answered 429.*tried several times. Wait, then start again"),
        ("down", "'org/base'.*answered 500.*tried several times. Start again later"),
        ("no token", "'org/secret'.*answered 401.*no token is set"),
        ("wrong token", "'org/secret'.*answered 401.*the token that is set may not see it"),
        ("cut always", "'org/base'.*connection broke. Start again: what was fetched whole is kept"),
    ],
)
def test_a_source_that_cannot_be_had_is_one_line(flow, case, words):
    found = flow.merged[case]
    assert found["code"] == 1 and not found["trace"], found
    assert "error: " in found["output"] and found["left"] == []
    assert re.search(words, found["output"]), found["output"]


def test_weights_that_never_come_whole_are_never_taken_for_whole(flow):
    cache = flow.merged["cut always"]["cache"]
    assert "config.json" in cache["snapshot"] and "model.safetensors" not in cache["snapshot"]
    assert cache["incomplete"] == [] and "taken" not in cache and cache["refused"] == "IncompleteSnapshotError"


def test_a_merge_from_ids_is_the_merge_of_the_folders(flow):
    assert flow.merged["merged"]["code"] == 0, flow.merged["merged"]
    made, here = flow.world.folder / "merge0/merged", flow.folder / "here"
    for path in here.iterdir():
        if path.suffix in (".safetensors", ".py", ".jinja") or path.name in (
            "tokenizer.json",
            "processor_config.json",
        ):
            assert path.read_bytes() == (made / path.name).read_bytes(), path.name
    recipe = (made / "merge_recipe.yaml").read_text()
    assert "base: org/base\n" in recipe and "org/eye@v1" in recipe and flow.plan["audio"] in recipe


def test_a_file_that_the_hub_failed_to_give_is_asked_for_again(flow):
    asked = [path for method, path in flow.hub.log if method == "GET" and "org/ear/resolve" in path]
    assert sum(path.endswith("/tokenizer.json") for path in asked) == 2
    assert sum(path.endswith("/config.json") for path in asked) == 1


def test_a_download_that_broke_off_goes_on_where_it_was(flow):
    """Half had come, of which whole pieces were written; then only the rest was asked for, and the bytes are right."""
    size = len(flow.hub.files("org/base")["model.safetensors"].content)
    asked = [part for path, part in flow.hub.ranges if path == flow.plan["shard"]]
    assert size > 4 * PIECE and f"bytes={size // 2 // PIECE * PIECE}-" in asked


# pushing


def test_a_push_goes_on_when_an_upload_breaks_off(flow):
    assert flow.merged["push"]["code"] == 0, flow.merged["push"]
    assert flow.hub.titles(REPO) == ["initial commit", "Upload merged"]
    made = flow.world.folder / "merge0/merged"
    assert all(stored.content == (made / path).read_bytes() for path, stored in flow.hub.files(REPO).items())


def test_a_push_whose_upload_never_ends_leaves_the_repository_as_it_was(flow):
    down = flow.merged["push down"]
    assert down["code"] == 1 and not down["trace"], down
    assert DOWN in down["output"] and "push again" in down["output"]
    assert flow.hub.titles(DOWN) == ["initial commit"] and flow.hub.files(DOWN) == {}


# loading


def test_a_user_gets_answers_after_all(loaded):
    _, seen = loaded
    assert len({tuple(answer) for answer in seen["answers"]}) == 3
    assert seen["module"].startswith("transformers_modules.org.mmer_hyphen_tiny.")
    assert seen["task"] == "any-to-any" and len(seen["texts"]) == 3


def test_weights_that_broke_off_while_loading_go_on(loaded):
    flow, _ = loaded
    asked = [part for path, part in flow.hub.ranges if path == flow.plan["weights"]]
    size = len(flow.hub.files(REPO)["model.safetensors"].content)
    assert f"bytes={size // 2 // PIECE * PIECE}-" in asked


@pytest.mark.parametrize("case", ["no repository", "gated", "no revision", "down", "cut always"])
def test_a_load_that_fails_names_the_repository(loaded, case):
    _, seen = loaded
    assert seen[case]["error"], case
    if case != "down":  # which transformers says without a name
        assert ("org/none" if case == "no repository" else REPO) in seen[case]["message"], seen[case]


def test_weights_that_never_came_are_not_loaded_later(loaded):
    _, seen = loaded
    cache = seen["cut always"]["cache"]
    assert "config.json" in cache["snapshot"] and "model.safetensors" not in cache["snapshot"]
    assert cache["incomplete"] == [] and seen["cut always"]["later"]["error"] == "OSError"


def test_code_is_pinned_by_itself(loaded):
    flow, seen = loaded
    assert seen["new code"] == "the new code"
    assert seen["pinned code"] == seen["pinned"] == seen["answers"]
    assert seen["pinned module"].endswith(f".{flow.plan['first']}.modeling_mmer")


def test_without_the_hub_all_of_it_comes_from_the_cache(loaded):
    flow, seen = loaded
    flow.hub.close()
    again = flow.world.run("offline", flow.folder / "plan.json", "user-home", HF_HUB_OFFLINE="1")
    assert again == {name: seen[name] for name in again} and len(again) == 6
