"""Kills merges at random moments, lets them go on until they finish, and compares every byte with an undisturbed one.

    python benchmarks/crash.py --kills 100           # processes forked behind the imports: seconds a kill
    python benchmarks/crash.py --kills 20 --cold     # each a new interpreter, `python -m mmer merge …`

What is killed is the process of `mmer merge`, by SIGKILL. A moment is counted from when the merge opens its workplace,
and is drawn over the time that an undisturbed merge takes from there; one in five falls into its last twentieth, and
one in three comes instead as soon as a drawn number of parts is done (1 to 100, small numbers more often). A merge is
killed up to three times before it may finish. Checked is: before it is finished `out` does not exist; when it is, its
files are those of the undisturbed merge, byte for byte (but for `seconds` in merge_report.json), and nothing else is
left beside it.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
REPORT = "merge_report.json"
JOURNAL = "journal.jsonl"
END_SHARE = 0.2  # of the kills that fall into the end of the merge,
END = 0.95  # which starts here
PARTS_SHARE = 1 / 3  # of the kills that wait for parts to be done,
MOST_PARTS = 100  # this many at most
MOST_KILLS = 3  # of one merge
LOOK = 0.0005
LONGEST = 120.0


# the process that others are forked from


def serve():
    """Read an order a line, fork a process that merges, say its id, and, when it has ended, its status.

    No tensor is touched here, so no thread of a library runs when a process is forked.
    """
    importlib.import_module("mmer")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        for name in order["import"]:
            with suppress(ImportError):  # names that are in sys.modules but no file's
                importlib.import_module(name)
        child = os.fork()
        if child == 0:
            _merge_and_exit(order)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _merge_and_exit(order: dict[str, Any]):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        if order["file_limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
        mmer = importlib.import_module("mmer")
        code = mmer.app(["merge", *order["arguments"]], standalone_mode=False) or 0
        if order["modules"] is not None:
            Path(order["modules"]).write_text(json.dumps(list(sys.modules)))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Merges:
    """Starts `mmer merge recipe out` in processes of their own. `status` is theirs, as `os.waitpid` has it."""

    def __init__(self, recipe: Path, out: Path, max_shard_size: str, cold: bool = False, threads: int | None = None):
        self.out, self.cold = out, cold
        self.workplace = out.parent / f".{out.name}.partial"
        self.log = recipe.with_suffix(".log")
        self.arguments = [str(recipe), str(out), "--max-shard-size", max_shard_size]
        self.arguments += [] if threads is None else ["--threads", str(threads)]
        self._modules = recipe.with_suffix(".modules.json")
        self._server: subprocess.Popen[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip

    def __enter__(self) -> "Merges":
        if not self.cold:
            self._server = subprocess.Popen(
                [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=self._environment,
            )  # fmt: skip
            self._told()
        return self

    def __exit__(self, *error: object):
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()

    def _told(self) -> str:
        assert self._server is not None and self._server.stdout is not None
        line = self._server.stdout.readline().strip()
        if not line:
            raise RuntimeError("the process that merges are forked from has ended")
        return line

    def start(self, *more: str, file_limit: int | None = None) -> int:
        """Start a merge; its process id. `file_limit`: the bytes that a file it writes may have (forked ones only)."""
        if self._server is None:
            with self.log.open("wb") as log:
                command = [sys.executable, "-m", "mmer", "merge", *self.arguments, *more]
                self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)
            return self._process.pid
        known = json.loads(self._modules.read_text()) if self._modules.is_file() else []
        order = {
            "arguments": [*self.arguments, *more],
            "import": known,  # what an earlier merge imported on its way
            "modules": None if known else str(self._modules),
            "log": str(self.log),
            "file_limit": file_limit,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(self._told())

    def status(self) -> int:
        """Wait for the merge's end; 0 where it was well, minus the signal where one ended it."""
        if self._process is not None:
            return self._process.wait()
        return os.waitstatus_to_exitcode(int(self._told()))

    def finish(self, *more: str) -> float:
        """Merge undisturbed; the seconds from when the workplace opened. Raises RuntimeError where it fails."""
        self.start(*more)
        self.wait_for_workplace()
        started = time.monotonic()
        if status := self.status():
            raise RuntimeError(f"a merge ended with {status}:\n{self.said()[-3000:]}")
        return time.monotonic() - started

    def wait_for_workplace(self):
        """Until the merge has opened its workplace, or is past it."""
        last = time.monotonic() + LONGEST
        while not self.workplace.is_dir() and time.monotonic() < last:
            if self.out.exists():
                return
            time.sleep(LOOK)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


# kills


@dataclass
class Kill:
    """One kill: when, of the whole; whether it came in time; parts of the folder that were done by then, if any."""

    moment: float
    in_time: bool
    journal: bool
    parts: int


@dataclass
class Campaign:
    seconds: float = 0.0  # of an undisturbed merge
    kills: list[Kill] = field(default_factory=list)
    merges: int = 0
    failures: list[str] = field(default_factory=list)


def parts_done(workplace: Path) -> list[str] | None:
    """The parts of the folder that the journal says are done; None where there is no journal."""
    path = workplace / JOURNAL
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off
    except FileNotFoundError:
        return None
    parts = [entry.get("part") for entry in map(json.loads, lines)]
    return [part for part in parts if part not in (None, "thresholds")]


def contents(folder: Path) -> dict[str, str]:
    """File -> sha256; of the report all but the time it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == REPORT:
                report = json.loads(data)
                del report["seconds"]
                data = json.dumps(report).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    return lines + [
        f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]
    ]


def moment(chance: random.Random) -> float:
    """A part of the whole: anywhere, or in its end."""
    return chance.uniform(END, 1.02) if chance.random() < END_SHARE else chance.uniform(0, 1)


def kill(merges: Merges, chance: random.Random, seconds: float) -> Kill:
    """Start a merge, which takes `seconds` undisturbed, and kill it."""
    process = merges.start()
    merges.wait_for_workplace()
    opened = time.monotonic()
    if chance.random() < PARTS_SHARE:
        wanted, last = int(MOST_PARTS ** chance.random()), opened + LONGEST
        while time.monotonic() < last and not merges.out.exists():
            if len(parts_done(merges.workplace) or []) >= wanted:
                break
            time.sleep(LOOK)
    else:
        time.sleep(moment(chance) * seconds)
    at = (time.monotonic() - opened) / seconds
    with suppress(ProcessLookupError):  # it was faster
        os.kill(process, signal.SIGKILL)
    status = merges.status()
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a merge ended with {status}:\n{merges.said()[-3000:]}")
    parts = parts_done(merges.workplace)
    return Kill(at, status != 0, parts is not None, len(parts or []))


def campaign(merges: Merges, kills: int, seed: int) -> Campaign:
    """Kill `kills` times. `out` must not exist at first."""
    done, chance = Campaign(), random.Random(seed)
    merges.finish()
    shutil.rmtree(merges.out)
    done.seconds = merges.finish()  # the first one imports and compiles what the others find
    expected, beside = contents(merges.out), {path.name for path in merges.out.parent.iterdir()}
    shutil.rmtree(merges.out)
    while len(done.kills) < kills:
        done.merges += 1
        label = f"merge {done.merges}"
        for _ in range(min(chance.randint(1, MOST_KILLS), kills - len(done.kills))):
            done.kills.append(kill(merges, chance, done.seconds))
            label += f", killed at {done.kills[-1].moment:.3f}"
            if merges.out.exists():
                break
            if not done.kills[-1].in_time:
                done.failures.append(f"{label}: it ended well, but {merges.out} is not there")
        finished = merges.out.exists()
        if not finished:
            merges.finish()
        done.failures += [f"{label}: {line}" for line in differences(contents(merges.out), expected)]
        left = {path.name for path in merges.out.parent.iterdir()} - beside
        if finished and done.kills[-1].in_time:  # named, and killed before the empty workplace was taken away
            left -= {merges.workplace.name}
        done.failures += [f"{label}: {name} is left beside it" for name in sorted(left)]
        shutil.rmtree(merges.out)
        shutil.rmtree(merges.workplace, ignore_errors=True)
    return done


def show(done: Campaign) -> Table:
    table = Table("kills", "in time", "before the journal", "after it", "parts taken over", "merges", "failures")
    hit = [one for one in done.kills if one.in_time]
    after = [one for one in hit if one.journal]
    table.add_row(
        str(len(done.kills)), str(len(hit)), str(len(hit) - len(after)), str(len(after)),
        str(sum(one.parts for one in after)), str(done.merges), str(len(done.failures)),
    )  # fmt: skip
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="(default: 100)")
    parser.add_argument("--cold", action="store_true", help="a new interpreter for each merge")
    parser.add_argument("--scale", default="tiny", help="of the models, see synthetic_models.py (default: tiny)")
    parser.add_argument("--experts", type=int, default=3, help="(default: 3)")
    parser.add_argument("--max-shard-size", default="100KB", help="several of them make a folder (default: 100KB)")
    parser.add_argument("--threads", type=int, help="of the merge (default: its own)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    from synthetic_models import SCALES, make  # imports what the process that others are forked from does without

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = make(folder / "models", SCALES[arguments.scale], arguments.experts)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(made.recipe(decoupling={"kind": "mask", "scale": "row", "rank": 8})))
        (folder / "place").mkdir()
        out = folder / "place" / "out"
        with Merges(recipe, out, arguments.max_shard_size, arguments.cold, arguments.threads) as merges:
            done = campaign(merges, arguments.kills, arguments.seed)
    Console(width=120).print(f"an undisturbed merge takes {done.seconds:.2f} s", show(done))
    if done.failures:
        print("\n".join(done.failures))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
