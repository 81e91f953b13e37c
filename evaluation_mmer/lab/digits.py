"""Handwritten digits (Alpaydin and Kaynak, UCI; CC BY 4.0): in go scikit-learn's 1797 rows, out come 8x8 pictures.

Rows of one writer stand together, so a split by position holds writers back: the first 1197 rows train, 200 validate,
the last 400 test. Only the data file is taken out of the wheel; nothing of it is installed or run.
"""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np

from .cache import LabError, Progress, lab_root, publish, say
from .packages import DIGITS, fetched

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = {"train": slice(0, 1197), "validation": slice(1197, 1397), "test": slice(1397, 1797)}
FILE = "digits.csv.gz"
SIDE = 8
INK = 16  # the largest value of a pixel


def build(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    """The folder that holds the data file."""

    def write(folder: Path) -> None:
        with fetched(DIGITS, folder.parent, progress) as package:
            (inside,) = DIGITS.files
            shutil.copyfile(package / inside, folder / FILE)

    return publish(lab_root(cache) / "datasets" / "digits", write)


def read_rows(path: Path) -> np.ndarray:
    """(rows, 65) int64: 64 pixels of 0 to 16, then the digit. Raises LabError for anything else."""
    rows = np.loadtxt(gzip.decompress(path.read_bytes()).decode("ascii").splitlines(), delimiter=",", dtype=np.int64)
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE + 1 or rows[:, :-1].max() > INK or rows[:, -1].max() > 9:
        raise LabError(f"{path.name} holds an array {rows.shape}, expected (n, 65) of pixels 0..16 and digits 0..9")
    return rows


def pictures(
    split: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say
) -> list[tuple[np.ndarray, str]]:
    """(8x8 uint8, the digit's name) for every picture of the split."""
    rows = read_rows(build(cache, progress) / FILE)[ROWS[split]]
    images = (rows[:, :-1].reshape(-1, SIDE, SIDE) * 255 // INK).astype(np.uint8)
    return [(image, CLASSES[digit]) for image, digit in zip(images, rows[:, -1])]
