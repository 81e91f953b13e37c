"""Settings made hostile: JSON files (config, adapter, index, tokenizer, processor), and what is no file.

Enters: the bytes of a sound file. Leaves: `Change`s, as in hostile_weights.py, and `Place`s, which put something else
where a file should be.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .hostile_weights import ANY, NO, POINTER, SAME, Change, cut, flip

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    10**9,
    10**12,
    -(10**12),
    10**30,
    0.5,
    -1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "32",
    "../x",
    "nul\0",
    "\ud800",
    "x" * 10**5,
    [],
    [1],
    ["x"],
    [[[]]],
    {},
    {"a": 1},
    {"model_type": "llama"},
    "float8",
    "auto",
]
_DELETED = object()


def places_of(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested JSON."""
    if path:
        yield path
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield from places_of(value, (*path, key))


def put(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with `value` at `path`."""
    made = copy.deepcopy(values)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is _DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def _field(data: bytes, rng: Random) -> bytes:
    """One random field set to a random hostile value, or taken out."""
    values = json.loads(data)
    paths = list(places_of(values))
    keys = sorted({path[0] for path in paths})
    chosen = rng.choice(keys)  # the large parts of a file get no more than their share
    path = rng.choice([path for path in paths if path[0] == chosen])
    return json.dumps(put(values, path, rng.choice([*VALUES, _DELETED]))).encode()


def field(path: tuple[Any, ...], value: Any, right: frozenset[str] = NO) -> Change:
    return Change(
        f"{'.'.join(map(str, path))} {str(value)[:30]!r}",
        lambda data, rng: json.dumps(put(json.loads(data), path, value)).encode(),
        right,
    )


def _doubled(data: bytes, rng: Random) -> bytes:
    values = json.loads(data)
    key = rng.choice(sorted(values))
    return (json.dumps(values)[:-1] + f", {json.dumps(key)}: {json.dumps(values[key])}}}").encode()


FIELD = Change("a field", _field, ANY)
SYNTAX = [
    Change("empty", lambda data, rng: b""),
    Change("truncated", cut),
    Change("a brace", lambda data, rng: b"{"),
    *(Change(text, lambda data, rng, text=text: text.encode()) for text in ("[]", "null", "3", '"x"', "true", "[{}]")),
    Change("nested 100,000 deep", lambda data, rng: b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    Change("lists 100,000 deep", lambda data, rng: b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    Change(
        "a field 100,000 deep", lambda data, rng: data.rstrip()[:-1] + b',"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    ),
    Change("not UTF-8", lambda data, rng: data[:1] + b'"\xff\xfe": 1,' + data[1:]),
    Change("UTF-16", lambda data, rng: data.decode().encode("utf-16")),
    Change("NUL bytes", lambda data, rng: bytes(64)),
    Change("a key twice", _doubled),
    Change("more behind the end", lambda data, rng: data + b"}"),
    Change("a number of 10,000 digits", lambda data, rng: data.rstrip()[:-1] + b',"a":' + b"9" * 10**4 + b"}"),
    Change("a pointer of git-lfs", lambda data, rng: POINTER),
    Change("a web page", lambda data, rng: b"<!DOCTYPE html><html></html>"),
    Change("a bit", lambda data, rng: flip(data, rng), ANY),
    Change("bits", lambda data, rng: flip(data, rng, bits=8), ANY),
]

HUGE = [10**9, 10**12, 10**30, -1, 0, 1.5, "x", None, float("nan"), [], {}]
CONFIG_FIELDS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "model_type",
    "tie_word_embeddings",
    "hidden_act",
]
ADAPTER_FIELDS = {
    "r": [10**9, 0, -1, 4.5, "4", None, [], float("nan"), True],
    "lora_alpha": ["6", None, [], float("nan"), float("inf"), 10**400, {}],
    "peft_type": ["ADALORA", None, 3, []],
    "rank_pattern": [
        [],
        "x",
        {"(": 4},
        {"(a+)+$": 4},
        {"q_proj": "4"},
        {"q_proj": 10**9},
        3,
        {"q_proj": -4},
        {"q_proj": 0},
    ],
    "alpha_pattern": [[], "x", {"(": 4}, {"q_proj": "4"}, {"q_proj": float("nan")}, {"(x+x+)+y": 1}, {"q_proj": None}],
    "use_rslora": ["yes", 3],
    "use_dora": [True],
    "init_lora_weights": ["pissa"],
    "trainable_token_indices": [[1], "x", {"embed_tokens": [10**9]}],
    "base_model_name_or_path": [3, [], {}],
    "auto_map": [{"AutoModel": "evil.Model"}],
}


TEMPLATES = [
    Change("not UTF-8", lambda data, rng: b"\xff\xfe" + data, ANY),
    Change("NUL bytes", lambda data, rng: bytes(64), ANY),
    Change("an open block", lambda data, rng: data + b"{% for m in messages %}", ANY),
    Change(
        "loops without end",
        lambda data, rng: data + b"{% for i in range(99999) %}" * 5 + b"x" + b"{% endfor %}" * 5,
        ANY,
    ),
    Change("a class's secrets", lambda data, rng: data + b"{{ ''.__class__.__mro__[1].__subclasses__() }}", ANY),
    Change("5,000 deep", lambda data, rng: data + b"{% if a %}" * 5000 + b"{% endif %}" * 5000, ANY),
    Change("a bit", lambda data, rng: flip(data, rng), ANY),
]


# what stands where a file should be


@dataclass(frozen=True)
class Place:
    """put(path): something else at a path that is free now. right: as of a `Change`."""

    name: str
    put: Callable[[Path, Path], object]
    right: frozenset[str] = NO


def with_code(flag: Path, name: str) -> list[Place]:
    """A settings file that asks for code beside it, which would make the file `flag`."""
    maps = {
        "config.json": {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoModelForImageTextToText": "evil.Evil",
            "AutoModelForMultimodalLM": "evil.Evil",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "processor_config.json": {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"},
    }
    own: dict[str, Any] = {
        "asked for": {},
        "asked for, class unknown": {"model_type": "evil", "tokenizer_class": "Evil", "processor_class": "Evil"},
    }

    def put_code(more: dict[str, Any]) -> Callable[[Path, Path], None]:
        def put_files(path: Path, original: Path):
            path.write_text(json.dumps({**json.loads(original.read_text()), **more, "auto_map": maps[name]}))
            path.with_name("evil.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Evil: ...\n")

        return put_files

    return [Place(f"code {how}", put_code(more), ANY) for how, more in own.items()]


def _blob(path: Path, original: Path):
    """As the Hub's cache has it: a link to a file of another name in another folder."""
    blob = path.parent.parent / "blobs" / f"0f{abs(hash(path.name)):x}"
    blob.parent.mkdir(exist_ok=True)
    os.link(original, blob)
    path.symlink_to(os.path.relpath(blob, path.parent))


PLACES = [
    Place("nothing", lambda path, original: None, ANY),
    Place("a folder", lambda path, original: path.mkdir(), ANY),
    Place("a link to itself", lambda path, original: path.symlink_to(path.name), ANY),
    Place("a link to nowhere", lambda path, original: path.symlink_to("../no such file"), ANY),
    Place("a link to a blob", _blob, frozenset({SAME})),
    Place("a link to the file elsewhere", lambda path, original: path.symlink_to(original), frozenset({SAME})),
    Place("a pipe", lambda path, original: os.mkfifo(path), ANY),
    Place("a link to a device", lambda path, original: path.symlink_to("/dev/zero"), ANY),
]
