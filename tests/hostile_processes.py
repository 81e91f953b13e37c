"""Hostile inputs given to `mmer merge` as a process of its own, and the table of all outcomes."""

import atexit
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from mmer import app

from .hostile_inputs import Input, World, cleared, prepare, tree
from .hostile_weights import ANY, OTHER, REFUSED, SAME

ROOT = Path(__file__).resolve().parent.parent


def table(counts: Mapping[tuple[str, str], int]) -> str:
    """Counts by kind and outcome, as text."""
    outcomes = [REFUSED, SAME, OTHER, "FAULT"]
    rows = [["input", *outcomes, "all"]]
    for kind in dict.fromkeys(kind for kind, _ in counts):
        own = [counts.get((kind, outcome), 0) for outcome in outcomes]
        rows.append([kind, *map(str, own), str(sum(own))])
    rows.append(["all", *(str(sum(int(row[i]) for row in rows[1:])) for i in range(1, len(rows[0])))])
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def run_process(world: World, given: Input, work: Path, command: Sequence[str] = ()) -> str:
    """As `run`, by `mmer merge` in a process of its own: a forked one, or `command` if it is given.

    REFUSED is exit status 1 with a message on stderr that names the file, without a traceback; OTHER is status 0.
    """
    work.mkdir(exist_ok=True)
    values, recipe, out = prepare(world, given, work), work / "recipe.yaml", work / "out"
    if values:
        recipe.write_text(yaml.safe_dump(values))
    before, said = tree(work), work.with_name(f"{work.name}.said")
    arguments = ["merge", str(recipe), str(out)]
    with said.open("w") as file:
        if command:
            process = subprocess.Popen([*command, *arguments], stdout=file, stderr=file)
            status = process.wait(120)
        else:
            status = _forked(arguments, said)
    text = said.read_text(errors="replace")
    plain, name = "".join(text.split()), given.place.rpartition("/")[2]
    outcome = {0: OTHER, 1: REFUSED}.get(status, f"exit status {status}: {text[-300:]}")
    if "Traceback" in text:
        outcome = f"a traceback: {text[-300:]}"
    elif status == 1 and name not in plain and not (given.says and given.says.replace(" ", "") in plain):
        outcome = f"the message does not name {name}: {text[-300:]}"
    if out.exists() != (status == 0):
        outcome = f"an output was left ({outcome})"
    outcome = cleared(world, work, out, before, outcome)
    said.unlink()
    wrong = outcome in ANY and outcome not in given.right and not (outcome == OTHER and SAME in given.right)
    return f"{outcome}, expected {sorted(given.right)}" if wrong else outcome


def _forked(arguments: Sequence[str], place: Path) -> int:
    """The exit status of a child that runs the command line, without the seconds that importing takes.

    It is forked by a process that has imported everything and done nothing: here libraries have threads, whose locks a
    child would wait for without end.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"arguments": list(arguments), "said": str(place)}) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@cache
def _server() -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile_processes"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    atexit.register(started.kill)
    return started


def serve():
    """Read an order a line, fork a process that carries it out, write its exit status."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _carry_out(order["arguments"], order["said"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _carry_out(arguments: Sequence[str], said: str):
    status = 70
    file = open(said, "w")  # noqa: SIM115 - it lives as long as the process
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        app(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc(file=file)
    finally:
        file.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
