"""Weight files made hostile: what is done to the bytes of a safetensors file, and to the tensors in it.

Enters: the bytes of a sound file. Leaves: `Change`s: a name, what the file becomes, and which outcomes are right
("refused", "same": nothing of a merge changes, "other": read rightly, with other values). A change draws from a
`Random` of its own alone, so that a number gives one input.
"""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

REFUSED, SAME, OTHER = "refused", "same", "other"
ANY = frozenset({REFUSED, SAME, OTHER})
NO = frozenset({REFUSED})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 3\n"

Write = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Change:
    """One way to break a file. right: the outcomes that are right for it."""

    name: str
    write: Write
    right: frozenset[str] = NO


def pickled(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def flip(data: bytes, rng: Random, first: int = 0, end: int | None = None, bits: int = 1) -> bytes:
    """`bits` random bits of data[first:end] turned over."""
    changed = bytearray(data)
    for _ in range(bits):
        changed[rng.randrange(first, end or len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


# headers of safetensors


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: Any, body: bytes, length: int | None = None) -> bytes:
    """header: bytes, or what is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _header(change: Callable[[dict[str, Any], list[str], Random], Any], body: Callable = lambda data: data) -> Write:
    """A file whose header went through `change` (in place, or to what it returns)."""

    def write(data: bytes, rng: Random) -> bytes:
        header, values = parts(data)
        names = [name for name in header if name != "__metadata__"]
        rng.shuffle(names)
        made = change(header, names, rng)
        return whole(header if made is None else made, body(values))

    return write


def _entry(key: str, value: Any) -> Write:
    def change(header, names, rng):
        entry = header[names[0]]
        entry[key] = value(entry) if callable(value) else value

    return _header(change)


def _moved(by_first: int, by_end: int) -> Write:
    return _entry(
        "data_offsets", lambda entry: [entry["data_offsets"][0] + by_first, entry["data_offsets"][1] + by_end]
    )


def _twice(header, names, rng):
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(names[0])}: {json.dumps(header[names[1]])}}}").encode()


def _shared(header, names, rng):
    header[names[0]] = {**header[names[1]]}


def _hole(header, names, rng):
    for name in names:
        header[name]["data_offsets"] = [8 + place for place in header[name]["data_offsets"]]


def _without(key: str) -> Write:
    return _header(lambda header, names, rng: header[names[0]].pop(key) and None)


HEADERS = [
    Change("length 0", lambda data, rng: bytes(8) + data[8:]),
    Change("length 1", lambda data, rng: struct.pack("<Q", 1) + data[8:]),
    Change("length one too short", lambda data, rng: whole(json.dumps(parts(data)[0]).encode(), parts(data)[1], 9)),
    Change("length past the end", lambda data, rng: struct.pack("<Q", len(data) + 100) + data[8:]),
    Change("length 2^31", lambda data, rng: struct.pack("<Q", 2**31) + data[8:]),
    Change("length 2^63", lambda data, rng: struct.pack("<Q", 2**63) + data[8:]),
    Change("length 2^64 - 1", lambda data, rng: struct.pack("<Q", 2**64 - 1) + data[8:]),
    Change("seven bytes", lambda data, rng: data[:7]),
    Change("not JSON", lambda data, rng: whole(b"{" * 200, parts(data)[1])),
    Change("JSON cut", lambda data, rng: whole(json.dumps(parts(data)[0]).encode()[:-20], parts(data)[1])),
    Change("nested deeply", lambda data, rng: whole(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"")),
    Change(
        "not UTF-8",
        lambda data, rng: whole(
            json.dumps(parts(data)[0]).encode().replace(b"weight", b"w\xff\xfeght"), parts(data)[1]
        ),
    ),
    *(
        Change(f"header {value!r}", _header(lambda h, n, r, value=value: value))
        for value in (b"[]", b"null", b"3", b'"x"', b"{}", b"[[]]")
    ),
    Change("metadata a list", _header(lambda h, n, r: {**h, "__metadata__": []})),
    Change("metadata of numbers", _header(lambda h, n, r: {**h, "__metadata__": {"a": 1}})),
    Change("entry a list", _header(lambda h, n, r: {**h, n[0]: [1, 2]})),
    Change("entry null", _header(lambda h, n, r: {**h, n[0]: None})),
    *(Change(f"no {key}", _without(key)) for key in ("dtype", "shape", "data_offsets")),
    *(
        Change(f"dtype {value!r}", _entry("dtype", value))
        for value in ("F31", "f32", "", 3, None, "F64", "I8", "BOOL", "C64", "F4")
    ),
    *(
        Change(f"shape {value!r}", _entry("shape", value))
        for value in ([-1, 32], [1.5], ["32"], 32, None, [2**62, 2**62], [2**33], [0], [10**30], [[32]], [])
    ),
    Change("a row more", _entry("shape", lambda entry: [entry["shape"][0] + 1, *entry["shape"][1:]])),
    Change("offsets backwards", _entry("data_offsets", lambda entry: entry["data_offsets"][::-1])),
    Change("offsets before the file", _moved(-(2**20), -(2**20))),
    Change("offsets past the end", _moved(2**20, 2**20)),
    Change("offsets past 2^63", _moved(2**63, 2**63)),
    Change("offsets overlap", _moved(-4, -4)),
    Change("offsets one longer", _moved(0, 4)),
    Change("offsets of another tensor", _header(_shared)),
    Change("three offsets", _entry("data_offsets", [0, 4, 8])),
    Change("offsets of text", _entry("data_offsets", ["0", "4"])),
    Change("a hole in front", _header(_hole, lambda body: bytes(8) + body)),
    Change("bytes behind the end", _header(lambda h, n, r: None, lambda body: body + b"more")),
    Change("a name twice", _header(_twice)),
    Change("a name without letters", _header(lambda h, n, r: {"" if k == n[0] else k: v for k, v in h.items()})),
    Change("a name with NUL", _header(lambda h, n, r: {n[0] + "\0" if k == n[0] else k: v for k, v in h.items()})),
    Change(
        "a name of 100,000 letters",
        _header(lambda h, n, r: {"n" * 10**5 if k == n[0] else k: v for k, v in h.items()}),
    ),
    Change("empty", lambda data, rng: b""),
    Change("a pointer of git-lfs", lambda data, rng: POINTER),
    Change("a web page", lambda data, rng: b"<!DOCTYPE html><html><body>404</body></html>"),
    Change("zeros", lambda data, rng: bytes(len(data))),
    Change("a pickle", lambda data, rng: pickled({"a": torch.zeros(1)})),
]

BYTES = [
    Change("truncated", cut),
    Change("header bit", lambda data, rng: flip(data, rng, 0, 8 + struct.unpack("<Q", data[:8])[0]), ANY),
    Change("header bits", lambda data, rng: flip(data, rng, 0, 8 + struct.unpack("<Q", data[:8])[0], 3), ANY),
    Change("data bit", lambda data, rng: flip(data, rng, 8 + struct.unpack("<Q", data[:8])[0]), ANY),
    Change("data bits", lambda data, rng: flip(data, rng, 8 + struct.unpack("<Q", data[:8])[0], bits=40), ANY),
]

# tensors of other dtypes and shapes, in a sound file


def changed_tensor(change: Callable[[torch.Tensor], torch.Tensor], matrix: bool = True) -> Callable:
    """One tensor changed: a matrix that is not square (and no vocabulary, whose rows may be more), or any."""

    def apply(tensors: dict[str, torch.Tensor], rng: Random):
        wide = [name for name, t in sorted(tensors.items()) if t.ndim == 2 and t.shape[0] != t.shape[1]]
        wide = [name for name in wide if "embed" not in name and "lm_head" not in name] if matrix else sorted(tensors)
        name = rng.choice(wide)
        made = change(tensors[name]).clone()
        tensors[name] = made.contiguous() if made.layout is torch.strided else made

    return apply


def _filled(value: float) -> Callable:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return changed_tensor(change, matrix=False)


def _dropped(tensors: dict[str, torch.Tensor], rng: Random):
    del tensors[rng.choice(sorted(tensors))]


def _renamed(tensors: dict[str, torch.Tensor], rng: Random):
    name = rng.choice(sorted(tensors))
    tensors[name + ".more"] = tensors.pop(name)


def _exchanged(tensors: dict[str, torch.Tensor], rng: Random):
    """Two tensors of different shape under each other's name."""
    one, other = rng.choice([(a, b) for a in tensors for b in tensors if tensors[a].shape != tensors[b].shape])
    tensors[one], tensors[other] = tensors[other], tensors[one]


TENSORS: list[tuple[str, Callable, frozenset[str]]] = [
    *(
        (f"one in {dtype}", changed_tensor(lambda t, dtype=dtype: t.to(dtype)), NO)
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64)
    ),
    *(
        (f"one in {dtype}", changed_tensor(lambda t, dtype=dtype: t.to(dtype)), ANY)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    ),
    ("transposed", changed_tensor(lambda t: t.T), NO),
    ("a row less", changed_tensor(lambda t: t[:-1]), NO),
    ("a row more", changed_tensor(lambda t: torch.cat([t, t[:1]])), NO),
    ("a column less", changed_tensor(lambda t: t[:, :-1]), NO),
    ("one dimension more", changed_tensor(lambda t: t[None]), NO),
    ("flat", changed_tensor(lambda t: t.reshape(-1)), NO),
    ("no dimension", changed_tensor(lambda t: t.reshape(-1)[0]), NO),
    ("no rows", changed_tensor(lambda t: t[:0]), NO),
    ("NaN", _filled(float("nan")), NO),
    ("inf", _filled(float("inf")), NO),
    ("-inf", _filled(float("-inf")), NO),
    ("huge", _filled(1e38), ANY),
    ("one lacks", _dropped, NO),
    ("one renamed", _renamed, NO),
    ("two exchanged", _exchanged, NO),
    ("one more", lambda tensors, rng: tensors.update({"stranger.weight": torch.zeros(2, 2)}), NO),
    ("all zero", lambda tensors, rng: tensors.update({k: torch.zeros_like(t) for k, t in tensors.items()}), ANY),
    ("none", lambda tensors, rng: tensors.clear(), NO),
]


def in_safetensors(change: Callable) -> Write:
    def write(data: bytes, rng: Random) -> bytes:
        tensors = load(data)
        change(tensors, rng)
        return save(tensors, metadata={"format": "pt"})

    return write
