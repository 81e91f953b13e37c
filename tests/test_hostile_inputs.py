"""More than a thousand hostile and broken inputs: each is refused by name within a second, or merged rightly."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from merging_mmer.checkpoints import Checkpoint
from merging_mmer.pretrained import naming, read_json
from merging_mmer.recipe import Recipe

from . import hostile_inputs as hostile
from . import hostile_settings as spoilt
from .hostile_processes import run_process, table
from .hostile_weights import ANY, OTHER, REFUSED, SAME, pickled, whole

COUNT, PROCESSES = 1000, 30
SEED = 20
EXAMPLES = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.World(tmp_path_factory.mktemp("hostile") / "world")


def test_a_thousand_broken_inputs(world, tmp_path):
    counts: Counter = Counter()
    faults = []
    for number, one in enumerate(hostile.chosen(world, SEED, COUNT)):
        outcome = hostile.run(world, one, tmp_path / str(number))
        counts[one.kind, outcome if outcome in ANY else "FAULT"] += 1
        if outcome not in ANY:
            faults.append(f"{one}\n    {outcome}")
    print(table(counts))
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults[:20])
    assert sum(counts.values()) == COUNT >= 1000
    # a fuzz that only meets one outcome would show nothing
    assert all(
        sum(n for (_, found), n in counts.items() if found == outcome) > 20 for outcome in (REFUSED, SAME, OTHER)
    )


def test_processes(world, tmp_path):
    """`mmer merge` as a process: exit status 1 and one message, or 0; no traceback, no signal."""
    counts: Counter = Counter()
    faults = []
    for number, one in enumerate(hostile.chosen(world, SEED + 1, PROCESSES)):
        outcome = run_process(world, one, tmp_path / str(number))
        counts[one.kind, outcome if outcome in ANY else "FAULT"] += 1
        faults += [] if outcome in ANY else [f"{one}\n    {outcome}"]
    print(table(counts))
    assert not faults, "\n".join(faults)


# the same by hypothesis, on what reads each kind of file


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F4", "x"]) | VALUES
SIZES = st.integers(0, 16) | st.integers()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.lists(SIZES, max_size=3) | VALUES,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | VALUES,
    },
)


@EXAMPLES
@given(header=st.dictionaries(st.text(max_size=4), ENTRIES | VALUES, max_size=3), body=st.binary(max_size=64))
def test_any_header(header, body, tmp_path):
    """What Checkpoint reads is what safetensors reads, and what it refuses it names."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole(json.dumps(header).encode("utf-8", "replace"), body))
    try:
        checkpoint = Checkpoint(tmp_path)
        found = {key: checkpoint.tensor(key) for key in checkpoint.keys()}
    except ValueError as error:
        assert "model.safetensors" in str(error)
        return
    theirs = load_file(path)
    assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in found)


@EXAMPLES
@given(start=st.integers(0, 400), patch=st.binary(min_size=1, max_size=12))
def test_any_pickle(start, patch, tmp_path):
    """Bytes of a pickle written over: refused, or the tensors that are in the file."""
    sound = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}
    data = pickled(sound)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data[:start] + patch + data[start + len(patch) :])
    try:
        checkpoint = Checkpoint(tmp_path)
        found = {key: checkpoint.tensor(key) for key in checkpoint.keys()}
    except ValueError as error:
        assert "pytorch_model.bin" in str(error)
        return
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in sound.items()}


@EXAMPLES
@given(values=VALUES, text=st.text(max_size=30), key=st.sampled_from(["base", "experts", "method", "dtype", "x"]))
def test_any_recipe(values, text, key, tmp_path):
    path = tmp_path / "recipe.yaml"
    sound = {"base": "a/b", "experts": {"eye": "c/d"}}
    for content in (
        yaml.safe_dump({**sound, key: values}),
        yaml.safe_dump(values),
        text,
        f"{yaml.safe_dump(sound)}{text}",
    ):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(Recipe.load(path), Recipe)
        except ValueError as error:
            assert "recipe.yaml" in str(error)


@settings(EXAMPLES, max_examples=40)
@given(number=st.integers(0), value=VALUES)
def test_any_setting(number, value, world, tmp_path_factory):
    """A field of a config, adapter or processor set to anything."""
    place = (*hostile.CONFIGS, *hostile.WORDS)[number % len((*hostile.CONFIGS, *hostile.WORDS))]
    paths = list(spoilt.places_of(json.loads((world.folder / place).read_text())))
    change = spoilt.field(paths[number % len(paths)], value, ANY)
    level = "weights" if place in hostile.CONFIGS else "words"
    one = hostile.changed("hypothesis", place, change, 0, level)
    outcome = hostile.run(world, one, tmp_path_factory.mktemp("setting") / "work")
    assert outcome in ANY, f"{one}: {outcome}"


# what the readers promise, one by one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"x": {"a": 1, "a": 1}}', "'a' is given twice"),
        (b"[1]", "holds list, expected a JSON object"),
        (b'{"a": NaN}', "NaN is no value"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
        (b"\xff", "utf-8"),
    ],
)
def test_json_is_read_strictly(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_that_is_sound(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, Infinity, {"b": null}], "ä": "\\u00e4"}', encoding="utf-8")
    assert read_json(path) == {"a": [1, float("inf"), {"b": None}], "ä": "ä"}


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("r"), RecursionError(), MemoryError(), ValueError("v")])
def test_any_error_becomes_one_that_names_the_file(error):
    with pytest.raises(ValueError, match="some/file.json") as caught:
        with naming(Path("some/file.json")):
            raise error
    assert caught.value.__cause__ is error


def test_errors_that_name_the_file_stay():
    for error in (ValueError("some/file.json: x"), FileNotFoundError(2, "no such file", "some/file.json")):
        with pytest.raises(type(error)) as caught:
            with naming("some/file.json"):
                raise error
        assert caught.value is error
    with pytest.raises(KeyboardInterrupt):
        with naming("some/file.json"):
            raise KeyboardInterrupt
