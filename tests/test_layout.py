"""The laws of the house: what ships, who may import whom, how long a file may be."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from configuration_mmer.export_mmer import AUTO_MAP, ROOMS, shipped_files, write_hub_code

ROOT = Path(__file__).resolve().parent.parent
# a room may import the rooms before it, never one behind it
ORDER = ("configuration_mmer", "processing_mmer", "modeling_mmer", "merging_mmer", "evaluation_mmer", "mmer")
HOME = [*ORDER[3:5], "hub_cards"]
SOURCES = sorted(path for room in [*ROOMS, *HOME] for path in (ROOT / room).rglob("*.py")) + [ROOT / "mmer.py"]
SHIPPED_MAY_IMPORT = {"torch", "transformers", "numpy", "safetensors", *sys.stdlib_module_names}
# read only when such a file is opened, inside a function, with a message that says what to install; huggingface_hub,
# which transformers itself depends on, only when something is pushed; triton only where its kernels can run
OPENED_LAZILY = {"PIL", "soundfile", "soxr", "av", "trimesh", "huggingface_hub", "triton"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, is at the top of the file) of a source file; relative ones are left out."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, id(node) in top))
    return found


def test_the_rooms_are_there():
    assert {room_of(path) for path in SOURCES} >= {*ORDER, "hub_cards"}


def test_only_the_shipped_rooms_hold_shipped_files():
    assert {room_of(path) for path in SOURCES if path.stem.endswith("_mmer")} == set(ROOMS)
    for room in ROOMS:
        assert {path.name for path in (ROOT / room).glob("*.py") if not path.stem.endswith("_mmer")} == {"__init__.py"}
    names = [path.name for path in shipped_files()]
    assert len(set(names)) == len(names), "two shipped files of one name can not lie in one flat folder"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stem.endswith("_mmer")], ids=lambda p: p.name)
def test_shipped_code_imports_what_every_user_has(path):
    for module, at_top in imports(path):
        first = module.split(".")[0]
        allowed = SHIPPED_MAY_IMPORT | set(ROOMS) | (set() if at_top else OPENED_LAZILY)
        assert first in allowed, f"{path.name} imports {module}"
        if first in ROOMS:
            assert module.count(".") == 1, (
                f"{path.name} imports {module}: name the file, the exporter rewrites only that"
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    room = room_of(path)
    allowed = {*ROOMS, room} if room == "hub_cards" else set(ORDER[: ORDER.index(room) + 1])
    if room == "mmer":
        allowed.add("hub_cards")
    for module, _ in imports(path):
        first = module.split(".")[0]
        if first in {*ORDER, "hub_cards"}:
            assert first in allowed, f"{room} imports {module}"


def test_no_file_is_long_and_none_has_a_name_that_tells_nothing():
    everything = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(p): n for p in everything if (n := len(p.read_text().splitlines())) > 400}
    assert not long
    assert not [p for p in everything if re.fullmatch(r"(utils?|helpers?|common|misc)", p.stem)]


# the Hub form


def test_the_flat_copy_is_what_transformers_can_load(tmp_path):
    written = write_hub_code(tmp_path)
    assert {path.name for path in written} == {path.name for path in shipped_files()}
    for path in written:
        text = path.read_text()
        assert not re.search(rf"^\s*(from|import) ({'|'.join(ROOMS)})\b", text, re.MULTILINE), path.name
        check_imports(path)
        for needed in get_relative_import_files(path):
            assert Path(needed).exists(), f"{path.name} needs {needed}"
    for entry in AUTO_MAP.values():
        module, _, name = entry.partition(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_a_flat_copy_writes_itself_back(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_hub_code(first)
    code = f"""
import sys
for room in {ROOMS!r}: sys.modules[room] = None
sys.path.insert(0, {str(tmp_path)!r})
from first.export_mmer import write_hub_code
write_hub_code({str(second)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert {p.name: p.read_text() for p in first.glob("*.py")} == {p.name: p.read_text() for p in second.glob("*.py")}


# the package


def test_a_wheel_holds_the_rooms_and_their_data(tmp_path):
    tree = tmp_path / "tree"  # not here: what an earlier build left behind would get into the wheel
    for name in [*ROOMS, *HOME]:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mmer.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mmer-*.whl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    source = {str(p.relative_to(ROOT)) for p in SOURCES}
    data = [path for place in ("evaluation_mmer/lab", "hub_cards") for path in (ROOT / place).rglob("*.*")]
    source |= {str(path.relative_to(ROOT)) for path in data if path.suffix not in (".py", ".pyc")}
    assert len(source) > len(SOURCES)
    assert source <= {str(path.relative_to(target)) for path in target.rglob("*.*")}
    command = [sys.executable, "-c", "import mmer, modeling_mmer; print(modeling_mmer.__file__, mmer.__version__)"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(target)), done.stderr
