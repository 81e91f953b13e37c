"""What `trust_remote_code` runs: which files ship, what their code may do, and what it does when it is run.

Shipped code touches no network, writes no file and starts no process. What comes near to that is named below, with its
reason; everything else fails here.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configuration_mmer.export_mmer import shipped_files, write_hub_code
from merging_mmer import Recipe, merge
from tests import tiny_world

# a file that is added, renamed or taken away changes what users of every merged repository run: say so here
SHIPPED = {
    "adapters_mmer.py", "attention_mmer.py", "beats_mmer.py", "cache_mmer.py", "chat_templates_mmer.py",
    "composed_config_mmer.py", "composed_mmer.py", "composed_processor_mmer.py", "configuration_mmer.py",
    "conversations_mmer.py", "encoding_mmer.py", "expert_processors_mmer.py", "export_mmer.py", "fbank_mmer.py",
    "fewer_routes_mmer.py", "generation_mmer.py", "head_scales_mmer.py", "language_bind_mmer.py",
    "loading_mmer.py", "media_features_mmer.py", "media_mmer.py", "modeling_mmer.py", "parallel_mmer.py",
    "point_bert_mmer.py", "point_clouds_mmer.py", "processing_mmer.py", "processor_classes_mmer.py",
    "qformer_mmer.py", "route_names_mmer.py", "route_plan_mmer.py", "routed_kernels_mmer.py",
    "routed_triton_mmer.py", "routed_weights_mmer.py", "routes_mmer.py", "routing_mmer.py", "tokens_mmer.py",
    "towers_mmer.py", "video_frames_mmer.py",
}  # fmt: skip

# what shipped code may do although its kind is refused: (file, what, in which function) -> why
REASONS = {
    ("export_mmer.py", "huggingface_hub", "_save_and_upload"): "push_to_hub, when the user calls it",
    ("export_mmer.py", "huggingface_hub", "_card"): "push_to_hub: tags are added to the card's text; asks nobody",
    ("export_mmer.py", "hf_hub_download", "_save_and_upload"): "push_to_hub with tags: the card that is there",
    ("export_mmer.py", "tempfile", ""): "push_to_hub saves into a folder that goes afterwards, as transformers does",
    ("export_mmer.py", "mkdir", "write_hub_code"): "save_pretrained makes the folder that the user names",
    ("export_mmer.py", "write_text", "write_hub_code"): "save_pretrained writes this code beside the weights",
    ("point_clouds_mmer.py", "dump", "_read_mesh"): "trimesh calls so what gives the meshes of a scene",
    ("media_mmer.py", "load_image", "read_image"): "a URL that the user gives as a picture; transformers fetches it",
    ("media_mmer.py", "load_audio", "read_audio"): "the same for a sound",
    ("media_mmer.py", "load_video", "read_video"): "the same for a clip",
}

_NETWORK = {
    "socket", "ssl", "socketserver", "urllib", "urllib3", "http", "requests", "httpx", "httpx2", "aiohttp", "ftplib",
    "smtplib", "telnetlib", "xmlrpc", "asyncio", "huggingface_hub", "webbrowser",
}  # fmt: skip
_PROCESSES = {"subprocess", "multiprocessing", "concurrent", "pty", "ctypes", "cffi", "signal"}
_CODE = {"pickle", "cPickle", "dill", "marshal", "shelve", "importlib", "runpy", "imp", "code", "codeop", "builtins"}
_WRITERS = {"shutil", "tempfile", "zipfile", "tarfile", "sqlite3", "dbm"}
MODULES = _NETWORK | _PROCESSES | _CODE | _WRITERS
# called by their bare name
FUNCTIONS = {"exec", "eval", "compile", "__import__", "globals", "input", "breakpoint"}
# called as a method or function of a module, whatever it belongs to
METHODS = {
    "write", "write_text", "write_bytes", "writelines", "mkdir", "makedirs", "touch", "unlink", "rmdir", "rmtree",
    "removedirs", "rename", "renames", "symlink_to", "hardlink_to", "chmod", "chown", "system", "popen", "fork",
    "posix_spawn", "execv", "execve", "spawnv", "kill", "putenv", "savez", "tofile", "dump", "memmap", "import_module",
    "from_pretrained", "load_state_dict_from_url", "hf_hub_download", "snapshot_download", "urlopen",
}  # fmt: skip
# of these modules alone, since others have harmless ones of the name
OF_MODULES = {
    ("torch", "load"), ("torch", "save"), ("np", "save"), ("np", "savetxt"), ("os", "remove"), ("os", "replace"),
    ("os", "open"), ("os", "environ"), ("os", "write"), ("torch", "hub"), ("sys", "modules"), ("sys", "path"),
}  # fmt: skip
# transformers' own loaders, which fetch what is a URL
LOADERS = {"load_image", "load_audio", "load_video", "cached_file"}


def findings(source: str) -> list[tuple[str, str]]:
    """(what, in which function) of everything in a source that could reach beyond its own process."""
    found: list[tuple[str, str]] = []

    def look(node: ast.AST, function: str):
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], function) for alias in node.names if in_modules(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and in_modules(node.module or ""):
            found.append(((node.module or "").split(".")[0], function))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FUNCTIONS | LOADERS:
            found.append((node.id, function))
        elif isinstance(node, ast.Attribute):
            place = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in METHODS | LOADERS or (place, node.attr) in OF_MODULES:
                found.append((node.attr, function))
        elif isinstance(node, ast.Call) and opens_to_write(node):
            found.append(("open", function))
        elif isinstance(node, ast.keyword) and pickles(node):
            found.append(("allow_pickle", function))
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        for child in ast.iter_child_nodes(node):
            look(child, inner)

    look(ast.parse(source), "")
    return found


def in_modules(name: str) -> bool:
    return name.split(".")[0] in MODULES


def opens_to_write(call: ast.Call) -> bool:
    """An `open` whose mode is not plainly one of reading; `av.open` and `Path.open` have the mode elsewhere."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name not in ("open", "fdopen"):
        return False
    place = 0 if isinstance(call.func, ast.Attribute) and not of_module(call.func, "av", "io", "os") else 1
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[place : place + 1]
    return any(not (isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rbt")) for mode in modes)


def of_module(function: ast.Attribute, *names: str) -> bool:
    return isinstance(function.value, ast.Name) and function.value.id in names


def pickles(word: ast.keyword) -> bool:
    return word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)


# which files


def test_exactly_these_files_ship(tmp_path):
    assert {path.name for path in shipped_files()} == SHIPPED
    assert {path.name for path in write_hub_code(tmp_path)} == SHIPPED == {path.name for path in tmp_path.iterdir()}


def test_the_readme_counts_them():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert f"The {len(SHIPPED)} files `*_mmer.py` of the repository" in readme


# what their code may do


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.name)
def test_shipped_code_reaches_no_further_than_its_process(path):
    unnamed = [one for one in findings(path.read_text()) if (path.name, *one) not in REASONS]
    assert not unnamed, f"{path.name}: {unnamed} (what, function)"


def test_every_reason_is_needed():
    needed = {(path.name, *one) for path in shipped_files() for one in findings(path.read_text())}
    assert set(REASONS) == needed & set(REASONS)


def test_what_is_read_by_numpy_is_no_pickle():
    """np.load takes pickles only where it is told to; it is told not to, so that no later default changes that."""
    (call,) = [
        node for path in shipped_files() for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and of_module(node.func, "np", "numpy") and node.func.attr == "load"
    ]  # fmt: skip
    assert ast.unparse(call).endswith("allow_pickle=False)")


BAD = {
    "import socket": "socket",
    "import urllib.request as u": "urllib",
    "from http import client": "http",
    "def f():\n    import requests": "requests",
    "from httpx import get": "httpx",
    "import aiohttp": "aiohttp",
    "import subprocess as s": "subprocess",
    "from multiprocessing import Process": "multiprocessing",
    "import ctypes": "ctypes",
    "import pickle": "pickle",
    "from importlib import import_module": "importlib",
    "import os\nos.system('x')": "system",
    "from os import path\npath.os.popen('x')": "popen",
    "import os\nrun = os.system": "system",
    "exec('x')": "exec",
    "f = eval": "eval",
    "compile('x', 'y', 'exec')": "compile",
    "__import__('socket')": "__import__",
    "import sys\nsys.modules['socket']": "modules",
    "import os\nos.environ['X'] = 'y'": "environ",
    "open('x', 'w')": "open",
    "open('x', mode='ab')": "open",
    "open('x', mode)": "open",
    "import os\nos.open('x', 1)": "open",
    "path.open('x')": "open",
    "import io\nio.open('x', 'r+')": "open",
    "path.write_text('x')": "write_text",
    "path.write_bytes(b'x')": "write_bytes",
    "file.write('x')": "write",
    "path.unlink()": "unlink",
    "import os\nos.remove('x')": "remove",
    "import shutil": "shutil",
    "torch.save(x, 'y')": "save",
    "torch.load('y')": "load",
    "np.save('y', x)": "save",
    "np.load('y', allow_pickle=True)": "allow_pickle",
    "np.load('y', allow_pickle=some)": "allow_pickle",
    "from transformers.image_utils import load_image\nload_image('http://x')": "load_image",
    "AutoModel.from_pretrained('org/x')": "from_pretrained",
}
HARMLESS = [
    "open('x')", "open('x', 'rb')", "path.open()", "path.open('rb')", "import re\nre.compile('x')", "model.eval()",
    "torch.compile(model)", "import av\nav.open('x')", "np.load('y', allow_pickle=False)", "text.replace('a', 'b')",
    "from .media_mmer import read_image",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_bad_sources_are_found(source):
    assert BAD[source] in [what for what, _ in findings(source)]


@pytest.mark.parametrize("source", HARMLESS)
def test_harmless_sources_are_not(source):
    assert findings(source) == []


# what it does when it is run


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What a process did that loaded a merged folder and generated; see watched_load.py."""
    folder = tmp_path_factory.mktemp("watched")
    merge(Recipe.from_dict(tiny_world.make(folder / "world")), folder / "mmer-tiny", progress=False)
    (folder / "scratch").mkdir()
    script = Path(__file__).with_name("watched_load.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, folder / "mmer-tiny", folder / "facts.json"]
    done = subprocess.run(command, cwd=folder / "scratch", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "facts.json").read_text()), folder


def test_loading_and_generating_connects_to_nothing_and_starts_nothing(watched):
    seen, _ = watched
    assert seen["answers"] == 3 and not [one for one in seen["seen"] if one[0] != "write"]


def test_loading_and_generating_writes_into_the_cache_of_modules_alone(watched):
    seen, folder = watched
    written = [Path(path) for kind, path in seen["seen"] if kind == "write"]
    assert written and not [path for path in written if not path.is_relative_to(folder / "modules")]
    assert list((folder / "scratch").iterdir()) == []


def test_the_watch_sees_what_it_watches_for(watched):
    seen, _ = watched
    kinds = {kind for kind, _ in seen["provoked"]}
    assert kinds >= {"write", "socket.connect", "subprocess.Popen", "os.system", "os.remove"}
