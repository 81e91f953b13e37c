"""The lab's data sets: splits that do not meet, items that are the same each time, damaged files that are refused."""

import gzip
import itertools
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from evaluation_mmer.lab import clips, datasets, debian, digits, experts, fashion, furniture, speech
from evaluation_mmer.lab.cache import LabError


def quiet(_: str) -> None:
    """A progress that shows nothing."""


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def tiny_fashion(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 256, (30, 28, 28), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(30, dtype=np.uint8) % 10)
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path)
    monkeypatch.setattr(fashion, "VALIDATION", 5)
    return tmp_path


def test_items_are_the_same_each_time_and_the_splits_do_not_meet(tiny_fashion):
    first, again = (datasets.load_items("image", "test", 12, seed=3) for _ in range(2))
    assert [item.answer for item in first] == [item.answer for item in again]
    assert all((np.array(a.media) == np.array(b.media)).all() for a, b in zip(first, again))
    assert [item.answer for item in first] != [i.answer for i in datasets.load_items("image", "test", 12, seed=4)]
    splits = {split: datasets.load_items("image", split) for split in datasets.SPLITS}
    assert {split: len(items) for split, items in splits.items()} == {"train": 25, "validation": 5, "test": 30}
    pictures = [item.media.tobytes() for items in splits.values() for item in items]
    assert len(set(pictures)) == len(pictures)
    assert first[0].media.mode == "RGB" and first[0].question == datasets.QUESTIONS["image"]


def test_wrong_requests_and_damaged_files_are_refused(tiny_fashion):
    with pytest.raises(ValueError, match="31 items asked for.*30"):
        datasets.load_items("image", "test", 31)
    with pytest.raises(ValueError, match="no items 'smell'"):
        datasets.load_items("smell", "test")
    with pytest.raises(ValueError, match="no lab expert 'smell'; there are image, digits"):
        experts.build_expert("smell")
    labels = tiny_fashion / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1]))
    with pytest.raises(RuntimeError, match="29 values.*truncated"):
        datasets.load_items("image", "test")
    labels.write_bytes(gzip.compress(b"PNG?"))
    with pytest.raises(RuntimeError, match="not an idx file"):
        datasets.load_items("image", "test")


def test_the_words_of_a_name_tell_its_class():
    told = {
        "Rattan armchair": "chair", "Chair with cushion": "chair", "Armchair ottoman": None,
        "Table on trestles": "table",
        "Table fan": None, "Tablet": None, "Sofa 3 seats": "sofa", "Double French window small panes": "window",
        "Window blind": None, "Glass door cabinet": "cabinet", "Doormat": None, "Lying down female": "person",
        "Woman shoes": None, "Bended coconut tree": "plant", "Track lights": "lamp",
    }  # fmt: skip
    assert {name: furniture.class_of(name) for name in told} == told


def box_library(folder: Path, boxes: int) -> Path:
    """A library of Sweet Home 3D with `boxes` meshes of each class, and one thing that has none."""
    words = {kind: pattern.split("|")[0].capitalize() for kind, pattern in furniture.WORDS.items()}
    names = [words[kind] for kind in furniture.CLASSES for _ in range(boxes)] + ["Orange"]
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "Tiny.sh3f", "w") as archive:
        lines = [f"name#{n}={name}\nmodel#{n}=/tiny/{n}.obj" for n, name in enumerate(names, 1)]
        archive.writestr("PluginFurnitureCatalog.properties", "id=tiny\n" + "\n".join(lines))
        for n in range(1, len(names) + 1):
            corners = generator.uniform(1, 90, 3) * np.array(list(itertools.product((0, 1), repeat=3)))
            faces = ["1 2 4 3", "5 6 8 7", "1 2 6 5", "3 4 8 7", "1 3 7 5", "2 4 8 6"]
            text = "".join(f"v {x} {y} {z}\n" for x, y, z in corners) + "".join(f"f {face}\n" for face in faces)
            archive.writestr(f"tiny/{n}.obj", text)
    return folder


def test_each_mesh_is_in_one_split_and_its_clouds_stand_upright(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    monkeypatch.setattr(furniture, "INSTALLED", box_library(library, boxes=10))
    with pytest.raises(RuntimeError, match="list of 100 meshes has sha256 .*version 1.8"):
        furniture.clouds("test", tmp_path / "cache", quiet)
    known = re.findall(
        r"sha256 (\w{64}), expected", str(pytest.raises(LabError, furniture.build, tmp_path, quiet).value)
    )
    monkeypatch.setattr(furniture, "LIST_SHA256", known[0])
    splits = {split: furniture.clouds(split, tmp_path / "cache", quiet) for split in furniture.SPLITS}
    assert {split: len(clouds) // clouds.views for split, clouds in splits.items()} == {
        "train": 60, "validation": 10, "test": 30,
    }  # fmt: skip
    places = [place for clouds in splits.values() for place in clouds.places]
    assert len(set(places)) == len(places) == 100
    for split, clouds in splits.items():
        assert len(clouds) == len(clouds.places) * furniture.VIEWS[split]
        points, kind = clouds[1]
        again, _ = clouds[1]
        assert points.shape == (furniture.POINTS, 3) and (points == again).all() and kind == clouds.kinds[0]
    mesh = splits["test"].points[0].astype(np.float64)
    seen = furniture.view(mesh, np.random.default_rng(5))
    # y stays up: heights are those of the mesh, stretched by one number; the floor plan is turned
    chosen = np.random.default_rng(5).choice(len(mesh), size=furniture.POINTS, replace=False)
    ratio = seen[:, 1] / mesh[chosen, 1]
    assert 0.9 <= ratio.min() and ratio.max() <= 1.1 and np.ptp(ratio) < 1e-4


def test_digits_are_split_by_place_and_damaged_rows_refused(tmp_path, monkeypatch):
    rows = np.zeros((1797, 65), dtype=int)
    rows[:, 0], rows[:, -1] = np.arange(1797) % 17, np.arange(1797) % 10
    folder = tmp_path / "lab" / "datasets" / "digits"
    folder.mkdir(parents=True)

    def store(rows: np.ndarray) -> None:
        text = "\n".join(",".join(map(str, row)) for row in rows)
        (folder / digits.FILE).write_bytes(gzip.compress(text.encode()))

    store(rows)
    found = {split: digits.pictures(split, tmp_path, quiet) for split in ("train", "validation", "test")}
    assert [len(pictures) for pictures in found.values()] == [1197, 200, 400]
    picture, name = found["test"][0]
    assert picture.shape == (8, 8) and picture[0, 0] == rows[1397, 0] * 255 // 16
    assert name == digits.CLASSES[rows[1397, -1]]
    rows[3, 7] = 17
    store(rows)
    with pytest.raises(RuntimeError, match="pixels 0..16"):
        digits.pictures("test", tmp_path, quiet)


def centre(frame: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of the light in a frame (height, width, 3)."""
    light = frame[..., 0].astype(float)
    y, x = np.mgrid[: light.shape[0], : light.shape[1]]
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


@pytest.mark.parametrize("movement", clips.MOVEMENTS)
def test_a_clip_moves_as_it_says(movement):
    picture = np.zeros((28, 28), np.uint8)
    picture[6:22, 10:18] = 200  # a bar, of which a turn can be seen
    picture[6:10, 10:26] = 200
    made = clips.frames(picture, movement, np.random.default_rng(3))
    assert made.shape == (clips.FRAMES, clips.SIDE, clips.SIDE, 3) and made.dtype == np.uint8
    x, y = centre(made[-1]) - centre(made[0])
    light = [float((frame[..., 0] > 100).sum()) for frame in (made[0], made[-1])]
    if movement in ("left", "right", "up", "down"):
        along, across = (x, y) if movement in ("left", "right") else (y, x)
        assert abs(along) > 12 and abs(across) < 2 and (along > 0) == (movement in ("right", "down"))
    elif movement in ("closer", "away"):
        assert (light[1] > 1.5 * light[0]) if movement == "closer" else (light[0] > 1.5 * light[1])
    else:
        angles = []
        for frame in (made[0], made[1]):
            lit = np.argwhere(frame[..., 0] > 100)[:, ::-1] - centre(frame)
            corner = lit[np.linalg.norm(lit, axis=1).argmax()]
            angles.append(np.degrees(np.arctan2(corner[1], corner[0])))  # y points down: growing is clockwise
        turned = (angles[1] - angles[0] + 180) % 360 - 180
        assert 3 < abs(turned) < 40 and (turned > 0) == (movement == "clockwise")
    with pytest.raises(ValueError, match="movement.*'sideways'"):
        clips.frames(picture, "sideways", np.random.default_rng(0))


def test_clips_of_a_split_are_the_same_each_time(tiny_fashion):
    first, again = clips.clips("test"), clips.clips("test")
    assert len(first) == 30 and (first[3][0] == again[3][0]).all() and first[3][1] == again[3][1]
    assert {movement for _, movement in first} <= set(clips.MOVEMENTS)


def test_no_voice_of_a_split_is_heard_in_another():
    heard = {split: {(voice.program, voice.name) for voice in voices} for split, voices in speech.VOICES.items()}
    for split, names in heard.items():
        others = set().union(*(names for other, names in heard.items() if other != split))
        assert not names & others, split
    assert len(speech.VOICES["test"]) * len(speech.WORDS) >= 400
    assert len(set(speech.WORDS)) == len(speech.WORDS)


def test_a_dressed_word_is_deterministic_and_fits_one_second():
    wave = np.sin(np.arange(2 * speech.RATE) / 20).astype(np.float32)
    for length in (100, speech.RATE // 2, 2 * speech.RATE):
        first, again = (speech.dress(wave[:length], 5, noise=True) for _ in range(2))
        assert (first == again).all() and first.dtype == np.float32
        assert min(length, speech.RATE) <= len(first) <= speech.RATE


def test_missing_programs_are_named(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="espeak-ng is not on PATH.*apt-get install"):
        speech.synthesise(speech.Voice("espeak-ng", "en-us"), "one", tmp_path)
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="dataset-fashion-mnist"):
        fashion.pictures("test", tmp_path, quiet)
    with (
        pytest.raises(RuntimeError, match="apt-get is not here.*apt-get install some-data"),
        debian.unpacked("some-data", tmp_path / "nowhere", 1, "MIT", tmp_path, quiet),
    ):
        raise AssertionError("a package that cannot be had came through")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("ankle boot", True), (" Ankle  boot.\n", True), ("ankle boots", False), ("boot", False), ("", False)],
)
def test_score(prediction, right):
    assert datasets.score(prediction, "ankle boot") is right
