"""Broken and hostile merged folders: `verify`, `add`, `remove` and `export` refuse them in words, or do their work."""

from collections import Counter
from random import Random

import pytest

from . import hostile_folders as hostile
from .hostile_processes import table
from .hostile_weights import ANY, OTHER, REFUSED, SAME

SEED, COUNT = 3, 250


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return hostile.Folders(tmp_path_factory.mktemp("folders") / "world")


def test_the_sound_folder(world, tmp_path):
    same = hostile.Input("config.json", "as it is", lambda path, sound: path.write_bytes(sound.read_bytes()), ANY)
    found = {command: hostile.run(world, same, command, tmp_path / command) for command in hostile.COMMANDS}
    assert found == {"verify": SAME, "add": OTHER, "remove": OTHER, "export": OTHER}


def test_broken_folders(world, tmp_path):
    """Every command on some of the inputs; benchmarks/fuzz.py --folders takes them all."""
    inputs = list(world.inputs(SEED))
    Random(SEED).shuffle(inputs)
    counts: Counter = Counter()
    faults = []
    for number, one in enumerate(inputs[:COUNT]):
        command = hostile.COMMANDS[number % len(hostile.COMMANDS)]
        outcome = hostile.run(world, one, command, tmp_path / str(number))
        counts[command, outcome if outcome in ANY else "FAULT"] += 1
        faults += [] if outcome in ANY else [f"{command}: {one}\n    {outcome}"]
    print(table(counts))
    assert not faults, "\n".join(faults[:20])
    assert all(counts[command, REFUSED] > 20 for command in hostile.COMMANDS)
    assert sum(counts[command, done] for command in hostile.COMMANDS for done in (SAME, OTHER)) > 5


def test_code_of_a_folder_never_runs(world, tmp_path):
    asked = [one for one in world.inputs(SEED) if one.name.startswith("code asked for")]
    assert len(asked) == 6
    for number, one in enumerate(asked):
        for command in hostile.COMMANDS:
            assert hostile.run(world, one, command, tmp_path / f"{number}{command}") in ANY
