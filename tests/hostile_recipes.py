"""Recipes made hostile: (name, bytes of the file, outcomes that are right)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .hostile_weights import ANY, NO, SAME


def _yaml(values: Any) -> bytes:
    return yaml.safe_dump(values, sort_keys=False).encode()


def recipes(good: dict[str, Any], flag: Path) -> Iterator[tuple[str, bytes, frozenset[str]]]:
    """(name, bytes of a recipe file, outcomes that are right), from a good recipe as YAML has it."""
    text = json.dumps(good)[1:-1]
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(10))}]\n" for i in range(1, 10)
    )
    merged = "m0: &m0 {k0: 1}\n" + "".join(
        f"m{i}: &m{i} {{<<: [{', '.join(f'*m{i - 1}' for _ in range(10))}], k{i}: 1}}\n" for i in range(1, 9)
    )
    broken = {
        "aliases that explode": f"{bomb}base: a/b\nexperts: {{image: *a9}}\n",
        "aliases that explode in a known field": f"{bomb}base: *a9\nexperts: {{image: a/b}}\n",
        "merge keys that explode": f"{merged}base: a/b\nexperts: {{image: a/b}}\n",
        "an anchor in itself": "base: a/b\nexperts: &e {image: *e}\n",
        "a list in itself": "base: &b [*b]\nexperts: {image: a/b}\n",
        "a merge of itself": "&m\n<<: *m\nbase: a/b\nexperts: {image: a/b}\n",
        "a key that is itself": "&k {? *k : 1}\n",
        "an alias of nothing": "base: *none\n",
        "lists 10,000 deep": f"base: {'[' * 10**4}{']' * 10**4}\n",
        "lists 200 deep": f"base: {'[' * 200}{']' * 200}\nexperts: {{image: a/b}}\n",
        "mappings 3,000 deep": "".join(f"{' ' * i}a:\n" for i in range(3000)),
        "10 MB of one word": f"{{{text}, dtype: {'x' * 10**7}}}",
        "10 MB of entries": "experts:\n" + "".join(f"  e{i}: a/b\n" for i in range(700_000)),
        "10 MB of comments": f"# {'x' * 10**7}\n{{{text}}}",
        "100,000 experts": "base: a/b\nexperts: {" + ", ".join(f"e{i}: a" for i in range(10**5)) + "}",
        "code: os.system": f"base: !!python/object/apply:os.system ['touch {flag}']\nexperts: {{image: a/b}}\n",
        "code: eval": f"!!python/object/apply:eval [\"open('{flag}', 'w')\"]\n",
        "code: new": f"!!python/object/new:pathlib.Path.touch ['{flag}']\n",
        "code: module": "base: !!python/module:os\nexperts: {image: a/b}\n",
        "an unknown tag": f"base: !secret x\n{text}",
        "a binary 'hello'": "base: !!binary aGVsbG8=\nexperts: {image: a/b}\n",
        "a set": "base: a/b\nexperts: !!set {image, audio}\n",
        "a date": "base: 2001-01-01\nexperts: {image: a/b}\n",
        "two documents": f"{{{text}}}\n---\n{{{text}}}\n",
        "nothing": "",
        "a comment": "# nothing\n",
        "a list": "- a\n- b\n",
        "a word": "base\n",
        "a brace": "{",
        "a tab": "base:\n\t- a\n",
        "a list as key": "? [a, b]\n: c\nbase: a/b\n",
        "a mapping as key": "? {a: b}\n: c\nbase: a/b\n",
        "a date as key": "2001-01-01: c\nbase: a/b\n",
        "a key twice": f'{{{text}, "base": a/b}}',
        "an expert twice": "base: a/b\nexperts: {image: a/b, image: a/b}\n",
        "a control character": f"{{{text}}}\n# \x07\n",
        "a date that is none": "base: 2001-99-99\nexperts: {image: a/b}\n",
        "an integer of 10,000 digits": f"base: {'9' * 10**4}\nexperts: {{image: a/b}}\n",
        "base 60": f"base: {':'.join(['59'] * 2000)}\nexperts: {{image: a/b}}\n",
    }
    for name, content in broken.items():
        yield name, content.encode("utf-8", "surrogatepass"), NO
    whole = f"{{{text}}}".encode()
    yield "UTF-16", whole.decode().encode("utf-16"), ANY
    yield "Latin-1", b"base: caf\xe9\nexperts: {image: a/b}\n", NO
    yield "bytes that are no text", bytes(range(256)) * 4, NO
    yield "NUL bytes", whole + bytes(8), NO
    yield "a BOM", b"\xef\xbb\xbf" + whole, ANY
    yield "sound", whole, frozenset({SAME})
    yield (
        "an alias for a few words",
        (json.dumps({**good, "method": {"name": "ties"}})[:-1] + "}").encode(),
        frozenset({SAME}),
    )
    hostile: dict[str, list[Any]] = {
        "base": [
            None,
            3,
            [],
            {},
            True,
            "",
            "nul\0",
            "x" * 10**5,
            "\ud800",
            "..",
            "/dev/zero",
            "https://x.y/z",
            "a/b/c/d",
            "a@b@c",
        ],
        "experts": [
            None,
            [],
            {},
            3,
            "x",
            {"image": None},
            {"image": 3},
            {"image": {}},
            {"image": []},
            {"": "a/b"},
            {"../x": "a/b"},
            {"a b": "a/b"},
            {"base": "a/b"},
            {"auto": "a/b"},
            {"x": {"model": "a/b", "lora": "a/b"}},
            {"x" * 10**5: "a/b"},
            {"nul\0": "a/b"},
        ],
        "method": [
            None,
            3,
            "ties",
            [],
            {"name": "x"},
            {"density": 0},
            {"density": float("nan")},
            {"density": float("inf")},
            {"density": -1},
            {"density": "x"},
            {"alpha": float("nan")},
            {"alpha": float("inf")},
            {"alpha": -float("inf")},
            {"alpha": "x"},
            {"alpha": 10**400},
            {"scope": "x"},
            {"x": 1},
        ],
        "decoupling": [
            None,
            3,
            [],
            {"kind": "x"},
            {"lambda": float("nan")},
            {"lambda": -1},
            {"lambda": float("inf")},
            {"rank": -1},
            {"rank": 1.5},
            {"rank": 10**30},
            {"rank": "x"},
            {"scale": 3},
            {"x": 1},
        ],
        "text_route": [None, 3, [], "x", ""],
        "dtype": ["int8", "float8", 3, [], ""],
        "default_experts": [3, [], {"image": "x"}, {"smell": "image"}, {"image": 3}],
        "strange": [1, None],
    }
    for key, values in hostile.items():
        for value in values:
            yield f"{key} {str(value)[:40]!r}", _yaml({**good, key: value}), NO
    expert = next(iter(good["experts"]))
    for key, values in {
        "lambda": [float("nan"), float("inf"), -1, "x", [], 10**400],
        "weight": [0, -1, float("nan"), float("inf"), "x", None, 1e-320, 1e308],
        "density": [0, 2, float("nan"), "x"],
        "modality": ["smell", 3, {}, [3]],
        "tokenizer": ["x", None, 3],
        "encoder": [3, {"smell": "x"}],
        "lora_key": ["x", 3],
        "tower": [3, [], {}],
        "model": [None, 3, [], "nul\0"],
        "strange": [1],
    }.items():
        for value in values:
            entry = {**good["experts"][expert], key: value}
            right = ANY if value in (1e-320, 1e308) else NO
            yield f"expert's {key} {str(value)[:40]!r}", _yaml({**good, "experts": {expert: entry}}), right
