"""Where tensors lie in the files of a merged folder: readable by safetensors, aligned, however they are filled."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from merging_mmer import placement as placing
from merging_mmer.placement import PlacedFiles, Placement, Stored

from .tiny_merges import run, world

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)


def random_tensor(stored: Stored, seed: int) -> torch.Tensor:
    bits = torch.randint(0, 2, (*stored.shape, stored.dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(stored.dtype).reshape(stored.shape)


@st.composite
def tensors(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=12))
    return [Stored(f"t{i}.é", draw(st.sampled_from(DTYPES)), tuple(shape)) for i, shape in enumerate(shapes)]


@settings(deadline=None, max_examples=60)
@given(tensors(), st.integers(1, 600), st.randoms())
def test_what_is_put_in_in_any_order_is_read_by_safetensors(tmp_path_factory, stored, limit, random):
    folder = tmp_path_factory.mktemp("files")
    placement = Placement(stored, limit)
    values = {tensor.name: random_tensor(tensor, seed) for seed, tensor in enumerate(stored)}
    files = PlacedFiles(folder, placement)
    for name in random.sample(list(values), len(values)):
        files.add(name, values[name])
    written = files.finish()
    assert {path.name for path in folder.iterdir()} == {path.name for path in written}
    found = {}
    for name in placement.files:
        assert (folder / name).stat().st_size == placement.sizes[placement.files.index(name)]
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found.update({key: file.get_tensor(key) for key in file.keys()})
    assert set(found) == set(values)
    for key, tensor in values.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    for tensor in stored:  # aligned to its type
        assert placement.places[tensor.name].offset % tensor.dtype.itemsize == 0
    if len(placement.files) > 1:
        index = json.loads((folder / placing.INDEX).read_text())
        assert set(index["weight_map"]) == set(values)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored)
        held = [sum(t.nbytes for t in stored if index["weight_map"][t.name] == name) for name in placement.files]
        assert all(size <= limit or sum(place.file == number for place in placement.places.values()) == 1
                   for number, size in enumerate(held))  # fmt: skip


def test_pieces_of_a_tensor(tmp_path):
    files = PlacedFiles(tmp_path, Placement([Stored("a", torch.uint8, (2, 3)), Stored("b", torch.uint8, (1,))], "1GB"))
    files.write("a", b"\x04\x05\x06", 3)
    files.write("a", b"\x01\x02\x03")
    for start, values in ((4, b"\x00\x00\x00"), (-1, b"\x00")):
        with pytest.raises(ValueError, match="of a tensor of 6"):
            files.write("a", values, start)
    with pytest.raises(ValueError, match="b: 2 bytes where 1 were planned"):
        files.add("b", torch.zeros(2, dtype=torch.uint8))
    files.finish()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("a").tolist() == [[1, 2, 3], [4, 5, 6]] and file.get_tensor("b").tolist() == [0]


def test_files_of_another_plan_are_not_gone_on_with(tmp_path):
    one = Placement([Stored("a", torch.uint8, (4,))], "1GB")
    other = Placement([Stored("a", torch.int64, (4,))], "1GB")
    with pytest.raises(ValueError, match="is not there as it was planned"):
        PlacedFiles(tmp_path, one, keep=True, make=False)
    files = PlacedFiles(tmp_path, one)
    files.write("a", b"abcd")
    files.close()
    assert PlacedFiles.there(tmp_path, one) and not PlacedFiles.there(tmp_path, other)
    PlacedFiles(tmp_path, one, keep=True).close()
    assert (tmp_path / "model.safetensors").read_bytes().endswith(b"abcd")
    PlacedFiles(tmp_path, other, keep=True).close()
    assert PlacedFiles.there(tmp_path, other)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    assert not PlacedFiles.there(tmp_path, other)


def test_a_name_twice():
    with pytest.raises(ValueError, match="'a' is to be written twice"):
        Placement([Stored("a", torch.uint8, (4,)), Stored("a", torch.uint8, (4,))], "1GB")


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, call):
    """At the start, where the file system takes the room, and in the middle, where it does not."""
    recipe = world(tmp_path)
    before = sorted(tmp_path.iterdir())
    real, writes = os.pwrite, []

    def some(*args):
        writes.append(args)
        return real(*args) if len(writes) < 30 else no_room()

    monkeypatch.setattr(placing.os, call, some if call == "pwrite" else no_room)
    with pytest.raises(OSError, match="No space left on device|no room for the 0.00 GB") as error:
        run(recipe, tmp_path / "out")
    assert error.value.errno == errno.ENOSPC and str(Path(".out.partial")) in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
