"""The Space's folder: what a chat becomes, what stands on the page, what goes to the Hub. The page itself is asked in
test_chat_page.py and, in a browser, in test_browser.py.
"""

import ast
import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from typer.testing import CliRunner

from hub_cards import serving
from hub_cards.mask_counts import count_masks
from hub_cards.space.chat_page import chats, clouds, mask_shares, starting
from hub_cards.spaces import FOLDER, SETTINGS, space_files
from mmer import app, merge
from modeling_mmer import MMERForConditionalGeneration
from tests import tiny_world
from tests.hub_storage import front_matter
from tests.test_layout import ORDER

ROOT = Path(__file__).resolve().parent.parent
TAKES = {"image": ["image", "digits"], "audio": ["audio"]}
LEFT_TO_MODEL = {"image": None}


# what a chat becomes


def test_media_stand_before_the_text_in_their_order():
    turn = chats.user_turn(" What? ", ["b.wav", "a.PNG"], TAKES, LEFT_TO_MODEL)
    assert turn == {
        "role": "user",
        "content": [
            {"type": "audio", "path": "b.wav"},
            {"type": "image", "path": "a.PNG"},
            {"type": "text", "text": "What?"},
        ],
    }


def test_an_expert_is_named_where_one_was_chosen():
    (block,) = chats.user_turn("", ["a.png"], TAKES, {"image": "digits"})["content"]
    assert block == {"type": "image", "path": "a.png", "expert": "digits"}
    with pytest.raises(chats.Refused, match="no expert 'audio' takes pictures: expected one of"):
        chats.user_turn("", ["a.png"], TAKES, {"image": "audio"})


@pytest.mark.parametrize("file", ["a.zip", "a", "a.mp4", "a.npy"])
def test_a_file_that_nobody_takes_is_refused_by_its_name(file):
    with pytest.raises(chats.Refused, match=rf"^{file} cannot be attached: expected pictures .*\.png.*sounds .*\.wav"):
        chats.user_turn("What?", [f"/somewhere/{file}"], TAKES, LEFT_TO_MODEL)


def test_nothing_is_no_question():
    with pytest.raises(chats.Refused, match="write a question, or attach a file"):
        chats.user_turn("  \n", [], TAKES, LEFT_TO_MODEL)


def test_every_ending_belongs_to_one_modality():
    endings = [ending for of in chats.ENDINGS.values() for ending in of]
    assert len(set(endings)) == len(endings)
    assert all(chats.modality_of(f"x{ending.upper()}") == m for m, of in chats.ENDINGS.items() for ending in of)


def test_spans_by_hand():
    names = ["base", "merged", "image", "audio"]
    found = chats.spans([5, 6, 9, 9, 9, 7], [1, 1, 2, 2, 2, 1], [0, 0, 1, 1, 1, 0], names, repr)
    assert found == [("[5, 6]", "merged"), ("[image × 3]", "image"), ("[7]", "merged")]
    # a route's change within text, and media of two kinds side by side, are spans of their own
    assert len(chats.spans([1, 2], [0, 1], [0, 0], names, repr)) == 2
    assert chats.spans([1, 2], [3, 3], [3, 4], names, repr) == [
        ("[audio × 1]", "audio"),
        ("[point cloud × 1]", "audio"),
    ]


def test_a_message_names_files_and_no_folders():
    chat = [chats.user_turn("", ["/tmp/x/a.png", "/tmp/x/a.png.wav"], TAKES, LEFT_TO_MODEL)]
    said = chats.without_folders("cannot read /tmp/x/a.png.wav, nor /tmp/x/a.png: broken", chat)
    assert said == "cannot read a.png.wav, nor a.png: broken"


# mask densities


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    recipe = {**tiny_world.make(folder / "world"), "decoupling": {"kind": "mask", "rank": 0}}
    merge(recipe, folder / "merged", progress=False)
    return folder / "merged"


def test_shares_of_the_report_of_the_model_and_of_the_files_are_the_same(merged):
    report = mask_shares.reported(mask_shares.stored_report(str(merged)))
    model = MMERForConditionalGeneration.from_pretrained(merged)
    counted = mask_shares.counted(model)
    files = count_masks(merged, model.config.expert_names, model.config.delta_modules)
    assert list(report) == list(counted) == ["image", "audio"]
    for place, name in enumerate(counted):
        assert counted[name].keys() == report[name].keys() and len(counted[name]) >= 8
        for kind, share in counted[name].items():
            assert share == pytest.approx(report[name][kind], abs=1e-9) and 0 < share < 1
        for kind in files.kinds:
            of = [key for key in files.entries if key[0] == kind]
            wanted = sum(files.by_matrix[key][place] for key in of) / sum(files.entries[key] for key in of)
            assert counted[name][kind] == pytest.approx(wanted)


def test_bits_are_counted_as_numpy_unpacks_them():
    bits = torch.randint(0, 256, (7, 5), dtype=torch.uint8)
    assert mask_shares._ones(bits) == int(np.unpackbits(bits.numpy()).sum())


def test_a_table_shows_shares_and_escapes_names():
    shown = mask_shares.table({"<b>": {"self_attn.q_proj": 0.25, "all": 0.5}}, {"<b>": "#123456"})
    assert "&lt;b&gt;" in shown and "<b>" not in shown
    assert ">q_proj<" in shown and "25.0%" in shown and "width:50.0%;background:#123456" in shown
    assert "No masks" in mask_shares.table({}, {})


def test_a_folder_without_a_report_or_masks(tmp_path):
    assert mask_shares.stored_report(str(tmp_path)) is None
    report = {"experts": {"image": {"tensors": {"a.weight": {"mask_density": None}}, "total": {"mask_density": None}}}}
    assert mask_shares.reported(report) == {}


# point clouds


@pytest.mark.parametrize("count", [1, 50, clouds.SHOWN + 1, 5 * clouds.SHOWN])
def test_a_cloud_is_shown_as_beads_where_its_points_are(tmp_path, count):
    points = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", points)
    made = Path(clouds.shown(tmp_path / "a.npy"))
    vertices = np.concatenate([mesh.vertices for mesh in trimesh.load(made).dump()])
    centres = vertices.reshape(-1, 6, 3).mean(1)
    step = -(-count // clouds.SHOWN)
    np.testing.assert_allclose(centres, points[::step, :3], atol=1e-4)
    assert made.suffix == ".glb" and made.parent == tmp_path and len(centres) <= clouds.SHOWN


def test_meshes_are_shown_as_they_are(tmp_path):
    assert clouds.shown(tmp_path / "a.obj") == str(tmp_path / "a.obj")
    ply = tmp_path / "a.ply"
    trimesh.PointCloud(np.eye(3)).export(ply)
    assert clouds.shown(ply) == str(tmp_path / "a-shown.glb")


# mmer serve


def served(monkeypatch, *words: str):
    """(the command's result, what the page was started with)."""
    seen: dict = {}
    monkeypatch.setattr(starting, "serve", lambda *given, **classes: seen.update(given=given, classes=classes))
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    return CliRunner().invoke(app, ["serve", *words]), seen


def test_serve_runs_the_installed_code_unless_told_otherwise(merged, monkeypatch):
    done, seen = served(monkeypatch, str(merged), "--port", "80", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert seen["given"] == (str(merged), None, "127.0.0.1", 80, "auto", "bfloat16")
    assert seen["classes"]["model_class"] is MMERForConditionalGeneration
    assert seen["classes"]["trust_remote_code"] is False
    assert served(monkeypatch, str(merged), "--trust-remote-code")[1]["classes"] == {}
    assert served(monkeypatch, "org/name", "--revision", "abc")[1]["given"][:2] == ("org/name", "abc")


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("merged", ["--revision", "abc"], "a revision is of the Hub"),
        ("world/base", [], "found a model of type 'llama', expected a folder that `mmer merge` made"),
        ("world", [], "found no config.json"),
        ("nowhere/at/all", [], "expected a merged folder, or org/name on the Hub"),
    ],
)
def test_serve_refuses_what_is_no_merged_model(merged, monkeypatch, model, more, words):
    done, seen = served(monkeypatch, str(merged.parent / model) if model[0] != "n" else model, *more)
    assert done.exit_code == 1 and not seen and words in " ".join(done.output.split())


def test_serve_without_gradio_says_what_to_install(merged, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve", str(merged)])
    assert done.exit_code == 1 and "pip install 'mmer[space]'" in " ".join(done.output.split())


# the folder


def test_the_space_imports_nothing_of_ours():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & {*ORDER, "hub_cards"}, path
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), path


def test_the_requirements_are_those_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    known = config["options"]["install_requires"].split("\n") + config["options.extras_require"]["space"].split("\n")
    (gradio, *others) = (FOLDER / "requirements.txt").read_text().split()
    assert set(others) <= set(known)
    card = front_matter((FOLDER / "README.md").read_text())
    assert gradio == f"gradio=={card['sdk_version']}"
    assert f"gradio>={card['sdk_version'].rpartition('.')[0]},<7" in known
    assert card["sdk"] == "gradio" and (FOLDER / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60


def test_the_files_of_a_space_name_its_model():
    files = space_files("org/mmer-x", "abc")
    assert set(files) >= {"app.py", "requirements.txt", "README.md", SETTINGS, "chat_page/page.py"}
    assert json.loads(files[SETTINGS]) == {"model": "org/mmer-x", "revision": "abc"}
    card = front_matter(files["README.md"].decode())
    assert card["models"] == ["org/mmer-x"] and card["title"] == "mmer-x"
    assert b"org/name" not in files["README.md"] and not [path for path in files if path.endswith(".png")]


# the push


@pytest.fixture(scope="module")
def facts(merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.space_client", folder / "facts.json", merged]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


def test_a_push_makes_a_space_only_when_asked(facts):
    assert facts["alone"]["code"] == 0 and facts["alone"]["repos"] == ["org/new"]
    assert facts["new"]["code"] == 0, facts["new"]["output"]
    assert facts["new"]["repos"] == ["org/new", "spaces/org/new-space"] and facts["new"]["private"]
    assert "/spaces/org/new-space" in facts["new"]["output"]


def test_a_space_shows_the_commit_that_was_pushed(facts):
    for case in ("new", "changed", "branch", "named"):
        found = facts[case]
        wanted = {path: content.decode() for path, content in space_files("org/new", found["head"]).items()}
        assert {path: found["files"][path] for path in wanted} == wanted, case
    assert len({facts[case]["head"] for case in ("new", "changed")}) == 2
    assert facts["branch"]["head"] in facts["branch"]["files"][SETTINGS]


def test_a_space_that_is_there_already_makes_no_commit(facts):
    new, again, changed = (facts[case]["titles"] for case in ("new", "again", "changed"))
    assert new == again and len(new) == 2 and len(changed) == 3
    assert facts["again"]["output"].count("nothing has changed") == 2


def test_older_code_goes_and_what_people_added_stays(facts):
    assert "chat_page/older.py" not in facts["older"]["files"]
    assert facts["older"]["files"]["examples/a.txt"] == "theirs"
    assert facts["by hand"]["files"]["README.md"].endswith("by hand\n")
    assert "edited by hand, and stays as it is" in facts["by hand"]["output"]
    assert "edited by hand" not in facts["older"]["output"]


def test_a_private_model_needs_a_secret(facts):
    assert "give the Space a secret HF_TOKEN" not in facts["new"]["output"]
    assert "give the Space a secret HF_TOKEN" in facts["private"]["output"]
    assert not facts["token seen"]


def test_what_cannot_be_shown_is_said_before_anything_is_pushed(facts):
    for case, words in (("pull request", "--space and --create-pr"), ("bad name", "expected name or org/name")):
        assert facts[case]["code"] == 1 and facts[case]["asked"] == 0 and not facts[case]["crash"]
        assert words in facts[case]["output"]


def test_what_the_hub_refuses_of_a_space(facts):
    assert facts["fails once"]["code"] == 0 and len(facts["fails once"]["titles"]) == 2
    assert facts["forbidden"]["code"] == 1 and not facts["forbidden"]["crash"]
    assert "org/refused-space: the Hub answered 403" in facts["forbidden"]["output"]
