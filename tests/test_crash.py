"""A merge that is killed, or stopped by a full disk or a bad input: nothing is half done, and no byte differs."""

import errno
import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import crash  # noqa: E402
from synthetic_models import SCALES, make  # noqa: E402

import merging_mmer  # noqa: E402
from merging_mmer import Recipe  # noqa: E402
from merging_mmer.journal import Journal  # noqa: E402
from merging_mmer.naming import stored_name  # noqa: E402
from mmer import merge  # noqa: E402

SHARD = "60KB"  # the merged folder is several of them
DECOUPLING = {"kind": "mask", "scale": "row", "rank": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), SCALES["tiny"], experts=2)


@pytest.fixture(scope="module")
def starter(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(models.recipe(decoupling=DECOUPLING)))
    (folder / "place").mkdir()
    with crash.Merges(recipe, folder / "place" / "out", SHARD) as made:
        yield made


@pytest.fixture(scope="module")
def whole(starter):
    """File -> sha256 of an undisturbed merge."""
    starter.finish()
    found = crash.contents(starter.out)
    shutil.rmtree(starter.out)
    return found


@pytest.fixture
def merges(starter):
    """Merges into a place that is empty before and after."""
    yield starter
    for path in starter.out.parent.iterdir():
        shutil.rmtree(path)


def beside(merges) -> set[str]:
    return {path.name for path in merges.out.parent.iterdir()}


# killed


def test_thirty_kills_change_no_byte(merges):
    done = crash.campaign(merges, kills=30, seed=0)
    assert not done.failures
    hit = [kill for kill in done.kills if kill.in_time]
    assert len(done.kills) == 30 and len(hit) >= 15
    # some before there was anything to go on from, some after
    assert any(not kill.journal for kill in hit) and any(kill.parts for kill in hit)


def test_a_merge_goes_on_where_it_was(merges, whole):
    """Parts that a killed merge wrote are not done again: their bytes are spoilt here, and come out spoilt."""
    parts = stop_in_the_middle(merges)
    shards = sorted((merges.workplace / merges.out.name).glob("*.safetensors"))
    assert len(shards) > 1
    spoilt = spoil(shards, next(part for part in parts if part != "added_rows"))
    merges.finish()
    differing = [line.split()[0] for line in crash.differences(crash.contents(merges.out), whole)]
    assert differing == [spoilt.name]


def test_another_recipe_starts_afresh(merges, whole, models):
    assert stop_in_the_middle(merges)
    other = models.recipe(decoupling={**DECOUPLING, "lambda": 0.5})
    merge(other, merges.out, progress=False, max_shard_size=SHARD)
    found = crash.contents(merges.out)
    shutil.rmtree(merges.out)
    merge(other, merges.out, progress=False, max_shard_size=SHARD)
    assert crash.contents(merges.out) == found != whole


def test_a_journal_never_speaks_of_another_merges_files(merges, whole, models, monkeypatch):
    """Killed, begun with another recipe and stopped before that had a journal, and begun again with the first."""
    stop_in_the_middle(merges)

    def stopped(self):
        raise KeyboardInterrupt

    other = models.recipe(decoupling={**DECOUPLING, "lambda": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "begin", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge(other, merges.out, progress=False, max_shard_size=SHARD)
    merges.finish()
    assert crash.contents(merges.out) == whole


def stop_in_the_middle(merges) -> list[str]:
    """Kill a merge as soon as some of its parts are done; those."""
    process = merges.start()
    last = time.monotonic() + 60
    while len(crash.parts_done(merges.workplace) or []) < 3 and time.monotonic() < last:
        time.sleep(crash.LOOK)
    os.kill(process, signal.SIGKILL)
    assert merges.status() == -signal.SIGKILL
    assert not merges.out.exists()
    return crash.parts_done(merges.workplace) or []


def spoil(shards: list[Path], part: str) -> Path:
    """Turn the last byte of θ₀, or of the tower's tensor, that is this part's; the file it lies in."""
    expert, _, tensor = part.partition(":")
    wanted = f"model.experts.{expert}.{tensor}" if tensor else stored_name(part)
    for path in shards:
        data = bytearray(path.read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        if wanted in header:
            data[8 + size + header[wanted]["data_offsets"][1] - 1] ^= 1
            path.write_bytes(data)
            return path
    raise AssertionError(f"no shard holds {wanted}")


# refused


def test_a_full_disk_is_told_and_leaves_nothing(merges, whole):
    merges.start(file_limit=16_000)  # less than a shard: the kernel refuses the write, as a full disk does
    assert merges.status() == 1
    said = merges.said()
    assert "error:" in said and "Traceback" not in said
    assert beside(merges) == set()
    merges.finish()
    assert crash.contents(merges.out) == whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_an_older_folder_as_it_was(merges, whole, overwrite):
    merges.finish()
    merges.start(*(["--overwrite"] if overwrite else []), file_limit=16_000)
    assert merges.status() == 1
    assert crash.contents(merges.out) == whole and beside(merges) == {merges.out.name}


@pytest.mark.parametrize("writes", [0, 5, 40])
def test_a_disk_that_fills_up_on_the_way(models, tmp_path, monkeypatch, writes):
    """Room was there when the files were made, and is not when their parts are written."""
    left, write = [writes], os.pwrite

    def pwrite(file, values, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, values, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left|no room"):
        merge(models.recipe(decoupling=DECOUPLING), tmp_path / "out", progress=False, max_shard_size=SHARD)
    assert left[0] < 0 and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_for_the_card(models, tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recipe = Recipe.from_dict(models.recipe(decoupling=DECOUPLING))
    with pytest.raises(OSError, match="No space left"):
        merging_mmer.merge(recipe, tmp_path / "out", progress=False, finish=full)
    assert list(tmp_path.iterdir()) == []


def test_two_merges_into_one_folder(merges, whole, models):
    """The second is refused while the first is at work, and does not disturb it."""
    merges.start()
    last = time.monotonic() + 60
    while crash.parts_done(merges.workplace) is None and time.monotonic() < last:
        time.sleep(crash.LOOK)
    try:
        with pytest.raises(ValueError, match="another process is merging"):
            merge(models.recipe(decoupling=DECOUPLING), merges.out, progress=False, max_shard_size=SHARD)
    finally:
        assert merges.status() == 0
    assert crash.contents(merges.out) == whole


@pytest.fixture
def copy(models, tmp_path):
    """Base and experts of one's own, to be spoilt; the recipe."""
    folder = Path(shutil.copytree(models.base.parent, tmp_path / "models"))
    sources = {f"expert{place}": str(folder / f"expert-{place}") for place in (1, 2)}
    return folder, {"base": str(folder / "base"), "experts": sources, "decoupling": DECOUPLING}


def truncated(folder: Path):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def no_file(folder: Path):
    (folder / "model.safetensors").unlink()


def a_folder_in_its_place(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def not_a_header(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def no_config(folder: Path):
    (folder / "config.json").unlink()


def broken_config(folder: Path):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize("whose", ["base", "expert-2"])
@pytest.mark.parametrize(
    "damage",
    [truncated, no_file, a_folder_in_its_place, not_a_header, no_config, broken_config],
    ids=lambda f: f.__name__,
)
def test_unreadable_inputs_are_named_and_leave_nothing(copy, tmp_path, whose, damage):
    folder, recipe = copy
    damage(folder / whose)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises((ValueError, OSError), match=whose):
        merge(recipe, place / "not" / "there" / "out", progress=False)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("whose", "tensor"),
    [
        ("base", "model.layers.1.mlp.down_proj.weight"),
        ("expert-1", "model.language_model.layers.1.mlp.down_proj.weight"),
        ("expert-2", "lm_head.weight"),
        ("expert-2", "model.language_model.norm.weight"),
        ("expert-2", "model.multi_modal_projector.linear_2.weight"),
    ],
)
def test_values_that_are_no_numbers_are_named_and_leave_nothing(copy, tmp_path, whose, tensor, value):
    folder, recipe = copy
    spoil_value(folder / whose / "model.safetensors", tensor, value)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(ValueError, match="NaN or infinite") as refused:
        merge(recipe, place / "out", progress=False)
    assert str(folder / whose / "model.safetensors") in str(refused.value) and tensor in str(refused.value)
    assert list(place.iterdir()) == []


def spoil_value(path: Path, tensor: str, value: float):
    """Put one value in the middle of a tensor of a bf16 file."""
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    first, end = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    place = 8 + size + (first + end) // 4 * 2
    data[place : place + 2] = torch.tensor([value], dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    path.write_bytes(data)


def test_the_comparison_sees_a_difference(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
        (tmp_path / name / crash.REPORT).write_text(json.dumps({"seconds": hash(text), "x": 1}))
    (tmp_path / "b" / "more").write_text("")
    a, b = crash.contents(tmp_path / "a"), crash.contents(tmp_path / "b")
    assert crash.differences(a, b) == ["more is missing", "file differs"]
    assert crash.differences(b, a) == ["more is left over", "file differs"]
