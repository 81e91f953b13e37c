"""Pickles of weights made hostile, and indices of shards: `Change`s, as in hostile_weights.py."""

import io
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from .hostile_weights import ANY, POINTER, TENSORS, Change, Write, changed_tensor, cut, flip, pickled


def unpickled(data: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(data), weights_only=True)


def in_pickle(change: Callable) -> Write:
    def write(data: bytes, rng: Random) -> bytes:
        tensors = unpickled(data)
        made = change(tensors, rng)
        return pickled(tensors if made is None else made)

    return write


class _Call:
    """Something that a careless reader would call."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _calls(flag: Path) -> dict[str, _Call]:
    """Ways to run code, each of which would make the file `flag`."""
    code = f"open({str(flag)!r}, 'w').close()"
    return {
        "os.system": _Call(os.system, f"touch {flag}"),
        "exec": _Call(exec, code),
        "eval": _Call(eval, f"open({str(flag)!r}, 'w')"),
        "open": _Call(open, str(flag), "w"),
        "subprocess": _Call(subprocess.Popen, ["touch", str(flag)]),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "mkdir": _Call(Path.touch, flag),
        "torch": _Call(torch.save, 1, str(flag)),
    }


def _in_archive(data: bytes, changes: dict[str, bytes | None], compressed: bool = False) -> bytes:
    """An archive of torch with other entries, by the end of their names; None takes one out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = next((value for end, value in changes.items() if name.endswith(end)), old.read(name))
            if content is not None:
                new.writestr(name, content, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    return buffer.getvalue()


def pickles(flag: Path) -> list[Change]:
    """What a pickle of weights may be instead; nothing may make the file `flag`."""
    bomb = lambda data, rng: _in_archive(data, {"data/0": bytes(1 << 26)}, compressed=True)  # noqa: E731
    changes = [
        Change("truncated", cut),
        Change("any bit", lambda data, rng: flip(data, rng), ANY),
        Change("any bits", lambda data, rng: flip(data, rng, bits=30), ANY),
        Change("bits of its pickle", lambda data, rng: _flipped_pickle(data, rng)),
        Change("empty", lambda data, rng: b""),
        Change("a pointer of git-lfs", lambda data, rng: POINTER),
        Change("text", lambda data, rng: b"no pickle at all"),
        Change("a safetensors file", lambda data, rng: save({"a": torch.zeros(1)})),
        Change("entries compressed", lambda data, rng: _in_archive(data, {}, compressed=True), ANY),
        Change("a compressed bomb", bomb),
        Change("no data.pkl", lambda data, rng: _in_archive(data, {"data.pkl": None})),
        Change("data.pkl empty", lambda data, rng: _in_archive(data, {"data.pkl": b""})),
        Change(
            "data.pkl nested", lambda data, rng: _in_archive(data, {"data.pkl": b"\x80\x02" + b"(" * 10**5 + b"."})
        ),
        Change("a storage lacks", lambda data, rng: _in_archive(data, {"data/1": None})),
        Change("a storage of another size", lambda data, rng: _in_archive(data, {"data/1": b"abc"})),
        Change(
            "files of old torch", lambda data, rng: pickled(unpickled(data), _use_new_zipfile_serialization=False), ANY
        ),
        Change("half of a file of old torch", lambda data, rng: _old(data)[: len(_old(data)) // 2]),
        Change("a list", in_pickle(lambda tensors, rng: list(tensors.values()))),
        Change("a number", in_pickle(lambda tensors, rng: 3)),
        Change("None", in_pickle(lambda tensors, rng: [None])),
        Change("numbers for names", in_pickle(lambda tensors, rng: dict(enumerate(tensors.values())))),
        Change("a dict within", in_pickle(lambda tensors, rng: {**tensors, "more": {"a": torch.zeros(1)}})),
        Change("text within", in_pickle(lambda tensors, rng: {**tensors, "more": "text"})),
        Change("a module", in_pickle(lambda tensors, rng: torch.nn.Linear(2, 2))),
        Change("a sparse tensor", in_pickle(changed_tensor(lambda t: t.to_sparse()))),
        Change("a tensor without memory", in_pickle(changed_tensor(lambda t: t.to("meta")))),
        Change(
            "10^12 entries in 4 bytes",
            in_pickle(lambda tensors, rng: {k: torch.zeros(1).expand(10**6, 10**6) for k in tensors}),
        ),
        Change(
            "parameters",
            in_pickle(
                lambda tensors, rng: {k: torch.nn.Parameter(t, t.is_floating_point()) for k, t in tensors.items()}
            ),
            ANY,
        ),
    ]
    for name, call in _calls(flag).items():
        changes += [
            Change(f"code: {name}", lambda data, rng, call=call: pickle.dumps(call)),
            Change(
                f"code in data.pkl: {name}",
                lambda data, rng, call=call: _in_archive(data, {"data.pkl": pickle.dumps(call, 2)}),
            ),
            Change(f"code among tensors: {name}", in_pickle(lambda tensors, rng, call=call: {**tensors, "x": call})),
            Change(
                f"code in old torch: {name}",
                lambda data, rng, call=call: pickled({"x": call}, _use_new_zipfile_serialization=False),
            ),
        ]
    return changes + [Change(name, in_pickle(change), right) for name, change, right in TENSORS]


def _old(data: bytes) -> bytes:
    return pickled(unpickled(data), _use_new_zipfile_serialization=False)


def _flipped_pickle(data: bytes, rng: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    place = data.index(content)
    return flip(data, rng, place, place + len(content))


# the index of shards


def _elsewhere(values: dict[str, Any], names: list[str]):
    where = values["weight_map"]
    where[names[0]] = next(file for file in where.values() if file != where[names[0]])


def indices(outside: Path) -> list[Change]:
    """outside: a sound weight file in another folder."""

    def index(change: Callable[[dict[str, Any], list[str]], Any]) -> Write:
        def write(data: bytes, rng: Random) -> bytes:
            values = json.loads(data)
            names = sorted(values["weight_map"])
            rng.shuffle(names)
            made = change(values, names)
            return json.dumps(values if made is None else made).encode()

        return write

    def one(name: Any) -> Write:
        def change(values, names):
            values["weight_map"][names[0]] = name(values) if callable(name) else name

        return index(change)

    places = [
        "../x.safetensors",
        f"../{outside.parent.name}/{outside.name}",
        str(outside),
        "..",
        ".",
        "",
        "/",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "file:///etc/passwd",
        "no such shard.safetensors",
        "n" * 5000,
        "nul\0.safetensors",
        "config.json",
        3,
        None,
        [],
        {},
        True,
    ]
    return [
        *(Change(f"shard {str(place)[:40]!r}", one(place)) for place in places),
        Change("no weight_map", index(lambda values, names: {"metadata": {}})),
        *(
            Change(f"weight_map {value!r}", index(lambda values, names, value=value: {"weight_map": value}))
            for value in ([], {}, None, 3, "text", [["a", "b"]])
        ),
        Change(
            "all in one shard",
            index(lambda values, names: {"weight_map": dict.fromkeys(names, values["weight_map"][names[0]])}),
        ),
        Change("a tensor that its shard lacks", index(_elsewhere)),
        Change(
            "a tensor that no shard has",
            index(lambda values, names: values["weight_map"].update({"stranger": values["weight_map"][names[0]]})),
        ),
        Change(
            "a tensor that is not in it", index(lambda values, names: values["weight_map"].pop(names[0]) and None), ANY
        ),
    ]
