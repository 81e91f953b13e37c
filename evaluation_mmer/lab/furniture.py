"""Things of Sweet Home 3D's library (eTeks and others; CC0, CC BY): in go its meshes, out come clouds with a name.

The library's entries are told apart by the words of their names ("Rattan armchair" is a chair); entries that fit no
class are left out. A class's meshes are dealt to train, validation and test once, so that a mesh is in one split only;
two variants of one design may be in two. A mesh gives the `VIEWS` of its split, each turned about the vertical axis,
stretched a little and thinned by a seed of its own.
"""

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from processing_mmer.point_clouds_mmer import read_point_cloud

from .cache import LabError, Progress, lab_root, publish, say
from .debian import unpacked

DEBIAN_PACKAGE = "sweethome3d-furniture"
INSTALLED = Path("/usr/share/sweethome3d/furniture")
# the words of a class, as they stand in the library's English names
WORDS = {
    "chair": r"chair|wheelchair|armchair|stool",
    "table": r"table|desk",
    "sofa": r"sofa|couch",
    "bed": r"bed|crib",
    "lamp": r"lamp|light|lights|lamppost|lantern|spotlight",
    "cabinet": r"cabinet|bookcase|wardrobe|shelves|dresser|cupboard",
    "door": r"door",
    "window": r"window",
    "plant": r"plant|tree|maple|cactus|ficus|bush|yucca|flowers",
    "person": r"male|female|boy|girl",
}
# what follows such a word without making another thing of it
_BEHIND = r"( with .*| [0-9] (seats|panes)| small panes| on trestles| artwork|)"
CLASSES = tuple(WORDS)
SPLITS = ("train", "validation", "test")
LIST_SHA256 = "35a72b3d4e05b0f95eedb1ef07d2ed093a4fc0c08c0c1da8f646c76b5beca361"  # of version 1.8
TEST, VALIDATION = 0.3, 0.1  # of a class's meshes
VIEWS = {"train": 64, "validation": 8, "test": 5}
STORED_POINTS, POINTS = 4096, 2048
_FILE = "clouds.npz"
_SEEDS = {"train": 21, "validation": 22, "test": 23}
_TURN_AROUND = 2 * np.pi


def class_of(name: str) -> str | None:
    """The class of a library entry, or None."""
    for kind, words in WORDS.items():
        if re.fullmatch(rf"(.* )?({words}){_BEHIND}", name.lower()):
            return kind
    return None


def catalogue(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """The entries of one .sh3f file: its PluginFurnitureCatalog.properties, one dict for each number."""
    rows: dict[int, dict[str, str]] = {}
    for line in archive.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines():
        if found := re.match(r"(\w+)#(\d+)=(.*)", line):
            key, number, value = found.groups()
            rows.setdefault(int(number), {})[key] = value.strip()
    return [rows[number] for number in sorted(rows)]


def meshes(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(where it lies, class, points (STORED_POINTS, 3)) of every mesh of the library that has a class."""
    archives = sorted(folder.glob("*.sh3f"))
    if not archives:
        raise LabError(f"{folder} holds no .sh3f file, expected those of Debian's {DEBIAN_PACKAGE}")
    for path in archives:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as scratch:
            for row in catalogue(archive):
                kind = class_of(row["name"])
                if kind is None:
                    continue
                # the geometry alone: materials and textures lie beside it and are not needed
                mesh = Path(scratch) / "mesh.obj"
                mesh.write_bytes(archive.read(row["model"].lstrip("/")))
                yield f"{path.name}{row['model']}", kind, read_point_cloud(mesh, STORED_POINTS)


def build(cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Path:
    """The folder with the points of all meshes, read once. Raises LabError where the package cannot be had."""

    def write(folder: Path) -> None:
        with unpacked(DEBIAN_PACKAGE, INSTALLED, 120, "CC0, CC BY", folder.parent, progress) as library:
            progress("sampling points from the meshes")
            places, kinds, points = zip(*meshes(library))
        check_list(places, kinds)
        clouds = np.stack(points).astype(np.float32)
        low, high = clouds.min(1, keepdims=True), clouds.max(1, keepdims=True)
        clouds = (clouds - (low + high) / 2) / (high - low).max(-1, keepdims=True)  # within ±0.5
        np.savez_compressed(folder / _FILE, places=places, kinds=kinds, points=clouds.astype(np.float16))

    return publish(lab_root(cache) / "datasets" / "furniture", write)


def check_list(places: Sequence[str], kinds: Sequence[str]) -> None:
    """Raises LabError for another list of meshes than the experts were trained on: it would be split otherwise."""
    lines = "\n".join(f"{place}\t{kind}" for place, kind in zip(places, kinds, strict=True))
    found = hashlib.sha256(lines.encode()).hexdigest()
    if found != LIST_SHA256:
        raise LabError(
            f"{DEBIAN_PACKAGE}: the list of {len(places)} meshes has sha256 {found}, expected {LIST_SHA256}. Another "
            "version of the library would put meshes that were trained on into the test split; version 1.8 is wanted"
        )


class Clouds(Sequence):
    """(points (2048, 3) float32, class) of every view of every mesh of a split, made when it is asked for."""

    def __init__(self, points: np.ndarray, kinds: Sequence[str], places: Sequence[str], views: int, seed: int):
        self.points, self.kinds, self.places, self.views, self.seed = points, kinds, places, views, seed

    def __len__(self) -> int:
        return len(self.points) * self.views

    def __getitem__(self, index: Any) -> Any:
        mesh = index // self.views
        return view(self.points[mesh], np.random.default_rng((self.seed, index))), str(self.kinds[mesh])


def view(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A cloud (N, 3) of which y is up -> 2048 of its points, turned about y and stretched by up to a tenth."""
    chosen = generator.choice(len(points), size=POINTS, replace=False)
    angle = generator.uniform(0, _TURN_AROUND)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    stretched = points[chosen].astype(np.float64) * generator.uniform(0.9, 1.1, 3)
    return (stretched @ turn.T).astype(np.float32)


def split_of(kinds: Sequence[str], split: str) -> list[int]:
    """The numbers of the meshes in a split: of each class the same share, drawn by a fixed seed."""
    chosen: list[int] = []
    for kind in CLASSES:
        order = np.random.default_rng(7).permutation([at for at, own in enumerate(kinds) if own == kind])
        test, validation = round(TEST * len(order)), round(VALIDATION * len(order))
        parts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation :],
        }
        chosen += sorted(parts[split].tolist())
    return chosen


def clouds(split: str, cache: str | os.PathLike[str] | None = None, progress: Progress = say) -> Clouds:
    """The clouds of a split; `len(...) // VIEWS[split]` meshes."""
    with np.load(build(cache, progress) / _FILE) as stored:
        kinds, places, points = stored["kinds"].tolist(), stored["places"].tolist(), stored["points"]
    chosen = split_of(kinds, split)
    own = [kinds[at] for at in chosen], [places[at] for at in chosen]
    return Clouds(points[chosen], *own, VIEWS[split], _SEEDS[split])
