"""What is imported, and when: the command line starts without the libraries that take seconds."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mmer

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "torchvision", "numba", "gradio", "ray", "datasets", "matplotlib", "peft", "numpy")


def loaded(code: str, *names: str) -> set[str]:
    """Which of `names` a fresh process has imported behind `code`."""
    ask = f"import sys, json\n{code}\nprint('\\n' + json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_question_sees_what_is_imported():
    assert loaded("import numpy, typer", *HEAVY, "typer") == {"numpy", "typer"}


@pytest.mark.parametrize(
    "code",
    [
        "import mmer",
        "from mmer import app; app(['--help'], standalone_mode=False)",
        "from mmer import app; app(['merge', '--help'], standalone_mode=False)",
        "from mmer import Recipe, merge, add, remove; Recipe.from_dict({'base': 'b', 'experts': {'image': 'e'}})",
        "from configuration_mmer import MODALITIES",
        "import merging_mmer.input_hashes, merging_mmer.merge",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    assert loaded(code, *HEAVY) == set()


def test_a_refusal_of_the_recipe_comes_before_the_libraries(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: 7\n")
    words = ["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    code = f"import mmer\ntry:\n    mmer.app({words!r})\nexcept SystemExit as end:\n    assert end.code == 1"
    assert loaded(code, *HEAVY) == set()


def test_a_merge_imports_nothing_of_the_demo_and_of_clusters(tmp_path):
    """Also where it ends early: what it needs is imported before base and experts are opened."""
    for name in ("base", "eye"):
        (tmp_path / name).mkdir()
    recipe = {"base": str(tmp_path / "base"), "experts": {"eye": str(tmp_path / "eye")}}
    code = f"import mmer\ntry:\n    mmer.merge({recipe!r}, {str(tmp_path / 'out')!r})\nexcept ValueError:\n    pass"
    unused = (
        "gradio",
        "ray",
        "datasets",
        "matplotlib",
        "peft",
        "onnx",
        "gguf",
        "evaluation_mmer.lab",
        "hub_cards.card",
    )
    assert loaded(code, "merging_mmer.opened_merge", "torch", *unused) == {"merging_mmer.opened_merge", "torch"}


@pytest.mark.parametrize("module", ["mmer", "merging_mmer", "configuration_mmer"])
def test_every_public_name_is_there(module):
    room, found = import_module(module), {}
    exec(f"from {module} import *", found)
    for name in room.__all__:
        assert found[name] is getattr(room, name) and name in dir(room), name
        assert found[name].__name__ == name if hasattr(found[name], "__name__") else name.isupper()
    assert mmer.MMERConfig.model_type == "mmer" and mmer.__version__


@pytest.mark.parametrize("module", ["mmer", "merging_mmer", "configuration_mmer"])
def test_a_name_that_is_not_there(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        __import__(module).nothing


def test_the_rooms_merge_is_the_function_whatever_was_imported_first():
    code = "import merging_mmer.merge, merging_mmer\nassert callable(merging_mmer.merge)"
    assert loaded(code, "torch") == set()


def test_the_collector_is_put_back():
    code = """
import gc
from merging_mmer.start import collector_paused, own_process
for on in (True, False):
    (gc.enable if on else gc.disable)()
    try:
        with collector_paused():
            assert not gc.isenabled()
            raise KeyError
    except KeyError:
        assert gc.isenabled() is on and gc.get_freeze_count() == 0
own_process()
with collector_paused():
    pass
assert gc.get_freeze_count() > 0
"""
    assert loaded(code, "torch") == set()
