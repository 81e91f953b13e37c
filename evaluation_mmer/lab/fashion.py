"""Fashion-MNIST (Zalando, MIT licence): in goes a folder with the four idx files, out come 28x28 grey pictures.

The folder is /usr/share/datasets/fashion-mnist where Debian's package dataset-fashion-mnist is installed, else one in
the cache, with the files of that package.
"""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np

from .cache import LabError, Progress, lab_root, publish, say
from .debian import unpacked

CLASSES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "validation": "train", "test": "t10k"}
VALIDATION = 2_000  # the last of the training pictures


def read_idx(path: Path) -> np.ndarray:
    """An array from a gzipped idx file: 0, 0, type 8 (bytes), rank, then each dimension as a big-endian u32."""
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise LabError(f"{path.name} starts with {data[:4].hex()}, expected 000008..: not an idx file of bytes")
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise LabError(f"{path.name} holds {body.size} values, expected {shape}: truncated file")
    return body.reshape(shape)


def folder_of(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    if INSTALLED.is_dir():
        return INSTALLED
    return publish(lab_root(cache) / "datasets" / "fashion-mnist", lambda folder: download(folder, progress))


def download(folder: Path, progress: Progress = say) -> None:
    """The package's idx files, moved into `folder`."""
    with unpacked(DEBIAN_PACKAGE, INSTALLED, 31, "MIT", folder.parent, progress) as data:
        for file in sorted(data.glob("*.gz")):
            shutil.move(file, folder / file.name)


def pictures(
    split: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say
) -> list[tuple[np.ndarray, str]]:
    """(28x28 uint8, class name) for every picture of the split."""
    folder = folder_of(cache, progress)
    images = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise LabError(f"{folder}: {len(images)} pictures but {len(labels)} labels for {split}")
    held = {"train": slice(0, -VALIDATION), "validation": slice(-VALIDATION, None), "test": slice(None)}[split]
    return [(image, CLASSES[label]) for image, label in zip(images[held], labels[held])]
