"""push_to_hub and back: what users of the Hub see of a model that was pushed by its own methods.

Everything runs against the Hub of local_hub.py, in child processes: huggingface_hub reads HF_ENDPOINT once.
"""

import json
from pathlib import Path

import pytest

from configuration_mmer.export_mmer import AUTO_MAP, shipped_files
from merging_mmer import Recipe, merge
from tests import tiny_world
from tests.hub_storage import front_matter
from tests.hub_world import World
from tests.local_hub import LocalHub

CLIENT = Path(__file__).with_name("hub_client.py")
REPO, SHARDED, AGAIN = "org/mmer-tiny", "org/mmer-sharded", "org/mmer-again"
CODE = {path.name for path in shipped_files()}
PROCESSOR_FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def before_the_other(hub: LocalHub) -> str:
    """The commit of the sharded repository before another model was pushed over it."""
    repository = hub.repos[SHARDED]
    return repository.history(repository.resolve("main"))[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    merge(Recipe.from_dict(tiny_world.make(folder / "world")), folder / "mmer-tiny", progress=False)
    with LocalHub(lfs=lambda repo, path: repo == REPO and path.endswith(".safetensors")) as hub:
        # a storage that fails once does not stop a push
        hub.fail("PUT", "/lfs/", 503)
        made = World(hub, folder, CLIENT)
        made.run("publish", folder / "mmer-tiny", "publisher-home", rooms=True)
        yield made


@pytest.fixture(scope="module")
def consumed(world):
    world.run("consume", before_the_other(world.hub), "consumer-home")
    return world


# what lies on the Hub


def test_model_and_processor_make_a_whole_repository(world):
    files = world.hub.files(REPO)
    assert CODE | PROCESSOR_FILES <= set(files)
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= set(files)
    assert json.loads(files["config.json"].content)["auto_map"] == AUTO_MAP
    processor = json.loads(files["processor_config.json"].content)
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    assert set(processor["expert_templates"]) == {"image", "audio"}
    assert {path for path, stored in files.items() if stored.lfs} == {"model.safetensors"}
    assert world.hub.titles(REPO) == ["initial commit", "first", "Upload processor"]


def test_the_code_on_the_hub_is_the_code_of_the_merged_folder(world):
    files = world.hub.files(REPO)
    for name in CODE:
        assert files[name].content == (world.folder / "mmer-tiny" / name).read_bytes(), name


def test_a_card_is_written_once_and_tags_are_added(world):
    card = front_matter(world.hub.files(REPO)["README.md"].content.decode())
    assert (card["library_name"], card["pipeline_tag"], card["tags"]) == (
        "transformers",
        "any-to-any",
        ["mmer", "tiny"],
    )
    ours = (world.folder / "publish0/out/README.md").read_bytes()
    assert world.hub.files(SHARDED)["README.md"].content == ours
    assert ours.endswith(b"by hand\n")


def test_save_and_push_uploads_what_was_saved_and_nothing_else(world):
    assert world.facts["publish"]["returned"] == ["processor_config.json"]
    files = world.hub.files(SHARDED, before_the_other(world.hub))
    assert CODE | PROCESSOR_FILES <= set(files)
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert "optimizer.pt" not in files
    assert not [path for path, stored in files.items() if stored.lfs]
    assert world.hub.repos[SHARDED].private


def test_no_weights_of_an_earlier_push_stay(world):
    """transformers takes `model.safetensors` before shards, so whichever is left behind would be loaded by someone."""
    before, after = set(world.hub.files(SHARDED, before_the_other(world.hub))), set(world.hub.files(SHARDED))
    assert after - before == {"model.safetensors"}
    gone = before - after
    assert "model.safetensors.index.json" in gone and len(gone) > 2
    assert all(path.startswith("model") and "safetensors" in path for path in gone)


def test_pull_requests_and_branches_leave_main_alone(world):
    assert world.facts["publish"]["pull_request"].endswith(f"/{REPO}/discussions/1")
    for revision, tag in (("refs/pr/1", "proposed"), ("next", "next")):
        card = front_matter(world.hub.files(REPO, revision)["README.md"].content.decode())
        assert card["tags"] == ["mmer", "tiny", tag]
        assert set(world.hub.files(REPO, revision)) == set(world.hub.files(REPO))


def test_who_may_not_write_learns_it_before_anything_is_saved(world):
    assert world.facts["publish"]["refused"] == 401
    assert "org/mmer-else" not in world.hub.repos


# what users load


def test_a_user_loads_it_by_its_name(consumed):
    published, seen = consumed.facts["publish"], consumed.facts["consume"]
    assert seen["answers"] == published["answers"]
    assert len({tuple(answer) for answer in seen["answers"]}) == 3
    assert seen["module"].startswith("transformers_modules.org.mmer_hyphen_tiny.")
    for pipe in (seen["named"], seen["inferred"]):
        assert pipe["task"] == "any-to-any"
        assert [text.strip() for text in pipe["texts"]] == [text.strip() for text in published["texts"]]


def test_a_pinned_revision_stays_what_it_was(consumed):
    seen = consumed.facts["consume"]
    assert seen["pinned"] == consumed.facts["publish"]["answers"]
    assert seen["moved"] != seen["pinned"]


def test_what_came_from_the_hub_goes_back_to_it(consumed):
    seen = consumed.facts["consume"]
    assert seen["again"] == seen["answers"]
    assert seen["again_module"].startswith("transformers_modules.org.mmer_hyphen_again.")
    first, second = consumed.hub.files(REPO), consumed.hub.files(AGAIN)
    assert set(first) == set(second)
    # the tokenizer notes whether it came from a folder
    for path in set(first) - {"README.md", "config.json", "tokenizer_config.json"}:
        assert first[path].content == second[path].content, path
    assert b"auto_map" not in second["tokenizer_config.json"].content


def test_without_the_hub_everything_loads_from_the_cache(consumed):
    consumed.hub.close()
    seen = consumed.run("reload", before_the_other(consumed.hub), "consumer-home", HF_HUB_OFFLINE="1")
    before = consumed.facts["consume"]
    assert seen == {key: before[key] for key in ("answers", "named", "pinned", "again")}
