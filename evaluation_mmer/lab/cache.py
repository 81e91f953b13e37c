"""Where the lab keeps what it builds, and how a folder appears there.

`cache_root()` is `$MMER_CACHE`, else `$XDG_CACHE_HOME/mmer`, else `~/.cache/mmer`. `publish(target, write)` calls
`write(folder)` on a temporary folder beside `target` and renames it, so that a folder that exists is complete and a
second process building the same one cannot spoil it: the first rename wins, the loser throws its copy away.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str], None]


class LabError(RuntimeError):
    """What whoever builds the lab can mend: no network, a missing program, a damaged download."""


def say(line: str) -> None:
    """The default progress: one line on stderr."""
    print(line, file=sys.stderr, flush=True)


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    chosen = cache or os.environ.get("MMER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmer"


def lab_root(cache: str | os.PathLike[str] | None = None) -> Path:
    return cache_root(cache) / "lab"


def publish(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, written by `write(folder)` unless it is there already. Never leaves half a folder."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(folder)
        folder.chmod(0o755)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors and mkdtemp keep theirs to the owner
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # not lost to another process: a real failure
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def tensors_sha256(path: Path) -> str:
    """One hash of names, dtypes, shapes and bytes of a safetensors file; the header's layout does not matter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
        header.pop("__metadata__", None)
        for name in sorted(header):
            entry = header[name]
            begin, end = entry["data_offsets"]
            digest.update(f"{name}|{entry['dtype']}|{entry['shape']}|".encode())
            file.seek(8 + start + begin)
            digest.update(file.read(end - begin))
    return digest.hexdigest()


def check_tensors(path: Path, expected: str, what: str) -> None:
    """Raises unless the tensors in `path` are the ones this package was tested with."""
    found = tensors_sha256(path)
    if found != expected:
        raise LabError(
            f"{what}: the converted tensors have sha256 {found}, expected {expected}. The conversion gave other "
            "numbers than the experts were trained on; please report it with your versions of torch, transformers, "
            "gguf and onnx."
        )
