"""The hashes of what a merge reads: begun with a guess, ended with the files that were opened."""

import hashlib
import mmap
import os
from threading import Event

import pytest

from merging_mmer import Recipe, input_hashes
from merging_mmer.input_hashes import Cancelled, InputHashes, hashes, likely_files, sha256


def write(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes((seed + 7 * n + n // 251) % 256 for n in range(size)))
    return path


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_file_of_several_windows(tmp_path, monkeypatch, windows, more):
    monkeypatch.setattr(input_hashes, "_WINDOW", mmap.ALLOCATIONGRANULARITY)
    file = write(tmp_path / "x", windows * mmap.ALLOCATIONGRANULARITY + more)
    calls = []
    assert sha256(file, lambda: calls.append(1)) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(calls) == windows + (more > 0)


def test_an_empty_file(tmp_path):
    assert sha256(write(tmp_path / "x", 0)) == hashlib.sha256(b"").hexdigest()


def test_the_window_is_one_that_every_system_maps():
    assert input_hashes._WINDOW % mmap.ALLOCATIONGRANULARITY == 0


def test_two_files_of_one_name(tmp_path):
    files = [write(tmp_path / folder / "x", 9, seed) for seed, folder in enumerate("ab")]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert hashes(files) == {"x": digests[0], "x (1)": digests[1]}
    assert hashes(files[:1], {str(files[0]): "known"}) == {"x": "known"}


def test_the_guess_is_the_weight_files_of_the_folders(tmp_path):
    taken = [write(tmp_path / "base" / f"model-0000{n}-of-00002.safetensors", 5) for n in (1, 2)]
    write(tmp_path / "base" / "pytorch_model.bin", 5)  # not read where there are safetensors
    write(tmp_path / "base" / "config.json", 5)
    taken.append(write(tmp_path / "one" / "pytorch_model.bin", 5))
    taken.append(write(tmp_path / "two" / "adapter_model.safetensors", 5))
    write(tmp_path / "two" / "optimizer.bin", 5)
    (tmp_path / "one" / "model.safetensors.index.json").write_text("{}")
    os.mkfifo(tmp_path / "one" / "model.safetensors")  # to read it would take for ever
    (tmp_path / "two" / "model.bin").symlink_to(tmp_path / "nowhere")
    experts = {
        "one": {"model": str(tmp_path / "one"), "modality": "image"},
        "two": {"lora": str(tmp_path / "two"), "tower": "org/on-the-hub", "modality": "audio"},
        "three": {"model": str(tmp_path / "not-there"), "modality": "video"},
    }
    recipe = Recipe.from_dict({"base": str(tmp_path / "base"), "experts": experts})
    assert likely_files(recipe) == taken


def test_a_wrong_guess_is_dropped_and_a_lack_made_up(tmp_path):
    one, two, wrong = (write(tmp_path / name, 100, seed) for seed, name in enumerate(("one", "two", "wrong")))
    with InputHashes(1) as hashed:
        hashed.start([wrong, one])
        hashed.need([two, one, two])
        assert hashed.result() == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in (two, one)}
        wrong.unlink()  # nobody asks for it
        hashed.check()
        assert list(hashed.result()) == [str(two), str(one)] and set(hashed.stats) == {one, two}


def test_who_waits_helps(tmp_path, monkeypatch):
    """The only thread hangs in one file; the others are hashed by the one who wants the result."""
    first, second = write(tmp_path / "first", 200), write(tmp_path / "second", 100)
    begun, released, real = Event(), Event(), input_hashes.sha256

    def slow(file, before):
        if file == first:
            begun.set()
            assert released.wait(60)
        else:
            released.set()
        return real(file, before)

    monkeypatch.setattr(input_hashes, "sha256", slow)
    with InputHashes(1) as hashed:
        hashed.start([second, first])
        assert begun.wait(60)  # the larger one first
        hashed.need([first, second])
        assert set(hashed.result()) == {str(first), str(second)}


def test_the_end_does_not_wait_for_what_nobody_needs(tmp_path, monkeypatch):
    file, begun, ended = write(tmp_path / "x", 10), Event(), []

    def endless(path, before):
        begun.set()
        while True:
            try:
                before()
            except Cancelled:
                ended.append(path)
                raise

    monkeypatch.setattr(input_hashes, "sha256", endless)
    with InputHashes(1) as hashed:
        hashed.start([file])
        assert begun.wait(60)
    assert ended == [file]
    ended.clear()
    with InputHashes(1) as hashed:
        hashed.start([file])
        hashed.need([])
        assert hashed.result() == {}
    assert ended == [file]


@pytest.mark.parametrize("when", ["before it is opened", "behind it"])
def test_a_file_that_changes(tmp_path, when):
    file = write(tmp_path / "x", 10)
    with InputHashes(2) as hashed:
        hashed.start([file])
        if when == "before it is opened":
            os.utime(file, ns=(1, 1))
        hashed.need([file])
        hashed.result()
        if when == "behind it":
            write(file, 11)
        with pytest.raises(ValueError, match="x was changed while it was being merged"):
            hashed.check()


def test_a_file_that_cannot_be_read(tmp_path):
    with InputHashes(1) as hashed, pytest.raises(FileNotFoundError):
        hashed.need([tmp_path / "nowhere"])
    with InputHashes(1) as hashed:
        hashed.start([tmp_path])  # a folder
        hashed.need([tmp_path])
        with pytest.raises(IsADirectoryError):
            hashed.result()
