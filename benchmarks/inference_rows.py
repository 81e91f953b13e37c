"""Timing two models in turn, and the rows that come of it.

Enters: models, inputs, and functions that give one number a call. Leaves: tokens a second and seconds, as lists of one
number a round, and rows that hold the median, least and largest of both sides and of their ratios. Invariant: a
ratio is of two numbers of one round.
"""

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inference_subjects import Inputs
from merge_speed import spread
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_used = "wall"


def use_clock(name: str):
    """`cpu`: the processor's seconds that this process took, which others on the machine and pauses leave alone."""
    global _used
    _used = name


def now() -> float:
    return CLOCKS[_used]()


@dataclass(frozen=True)
class Way:
    """One comparison. `key` is all of it but the numbers: a later run of it replaces the earlier one."""

    section: str
    what: str
    against: str
    unit: str
    experts: int
    batch: int | None = None
    prompt: int | None = None
    aim: str = ""


class Clock(BaseStreamer):
    """When each token was there, and which."""

    def __init__(self):
        self.at: list[float] = []
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor):
        self.at.append(now())
        self.tokens.append(value)

    def end(self):
        pass


def synchronise(model: Any):
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def generated(model: Any, inputs: Inputs, new: int, **settings: Any) -> tuple[Clock, float]:
    """(what was generated and when, when it began). Raises SystemExit where it ended early."""
    clock = Clock()
    synchronise(model)
    started = now()
    model.generate(**inputs, do_sample=False, max_new_tokens=new, streamer=clock, **settings)
    synchronise(model)
    if len(clock.at) != new + 1:  # the prompt is put first
        raise SystemExit(f"{type(model).__name__} wrote {len(clock.at) - 1} tokens, expected {new}")
    return clock, started


class Steps(BaseStreamer):
    """The seconds of each step of one of several generations, which wait for one another: a step of each in turn."""

    def __init__(self, name: str, names: list[str], turn: threading.Condition, whose: list[str]):
        self.name, self.names, self.turn, self.whose = name, names, turn, whose
        self.seconds: list[float] = []
        self.synchronise: Callable[[], None] = lambda: None

    def wait(self):
        with self.turn:
            if not self.turn.wait_for(lambda: self.whose[0] == self.name, timeout=600):
                raise SystemExit(f"the others of {self.names} did not write a token in ten minutes")
        self.started = now()

    def pass_on(self):
        with self.turn:
            left = self.names[self.names.index(self.name) + 1 :] + self.names[: self.names.index(self.name) + 1]
            self.whose[0] = left[0]
            self.turn.notify_all()

    def put(self, value: torch.Tensor):
        self.synchronise()
        self.seconds.append(now() - self.started)
        self.pass_on()
        self.wait()

    def end(self):
        pass


def decode_rates(runs: dict[str, tuple[Any, Inputs]], new: int) -> dict[str, float]:
    """Tokens a second behind the first, all samples of the batch counted, of generations that take their steps in
    turn: what disturbs the machine for longer than a step disturbs all of them alike.
    """
    names, turn, threads = list(runs), threading.Condition(), torch.get_num_threads()
    whose = [names[0]]
    steps = {name: Steps(name, names, turn, whose) for name in names}

    def run(name: str) -> int:
        model, inputs = runs[name]
        torch.set_num_threads(threads)  # of each thread its own
        steps[name].synchronise = lambda: synchronise(model)
        steps[name].wait()
        made = model.generate(**inputs, do_sample=False, max_new_tokens=new + 1, streamer=steps[name])
        steps[name].pass_on()
        return made.shape[1] - inputs["input_ids"].shape[1]

    with ThreadPoolExecutor(len(names)) as pool:
        written = dict(zip(names, pool.map(run, names), strict=True))
    if set(written.values()) != {new + 1}:
        raise SystemExit(f"{written} tokens were written, expected {new + 1}")
    # the prompt is put first, then the token that the prefill gives
    return {name: new * len(runs[name][1]["input_ids"]) / sum(own.seconds[2:]) for name, own in steps.items()}


def first_token(model: Any, inputs: Inputs) -> float:
    clock, started = generated(model, inputs, 1)
    return clock.at[1] - started


def prefill_rate(model: Any, inputs: Inputs, **settings: Any) -> float:
    """Tokens of the prompt a second, with the logits of the last one and a cache filled, as generation begins."""
    with torch.no_grad():
        synchronise(model)
        started = now()
        model(**inputs, logits_to_keep=1, use_cache=True, **settings)
        synchronise(model)
    return inputs["input_ids"].numel() / (now() - started)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Rounds of all runs, each round starting with another, after a warm-up."""
    return rotated(lambda turned: {name: run() for name, run in turned.items()}, runs, rounds)


def rotated(measure: Callable[[dict], dict[str, float]], runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """`measure(runs)` for every round, each starting with another of the runs, after a warm-up."""
    measure(runs)
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name, value in measure({name: runs[name] for name in names[first:] + names[:first]}).items():
            found[name].append(value)
    return found


def three(values: list[float]) -> list[float]:
    """[median, least, largest]"""
    return [statistics.median(values), min(values), max(values)]


def row(way: Way, ours: list[float], plain: list[float]) -> dict[str, Any]:
    found = {**dataclasses.asdict(way), "rounds": len(ours), "ours": three(ours), "plain": three(plain)}
    found["ratio"] = three([a / b for a, b in zip(ours, plain, strict=True)])
    median, least, largest = found["ratio"]
    place = " ".join(f"{name} {value}" for name in ("batch", "prompt") if (value := found[name]) is not None)
    print(
        f"{way.section}, {way.what}, {way.experts} experts {place}: {median:.3f} ({least:.3f} – {largest:.3f}) "
        f"of {way.against}",
        flush=True,
    )
    return found


def rows(way: Way, found: dict[str, list[float]], aims: dict[str, str]) -> list[dict[str, Any]]:
    """Ours against each of the others; `aims` by their names."""
    others = [name for name in found if name != "ours"]
    ways = {name: dataclasses.replace(way, against=name, aim=aims.get(name, "")) for name in others}
    return [row(ways[name], found["ours"], found[name]) for name in others]


def keep(path: Path, found: dict[str, Any]):
    """Put rows into a JSON file, each in place of an older one of the same way, subject, dtype and clock.

    Raises SystemExit where the file holds rows of another machine: those would not compare.
    """
    old = json.loads(path.read_text()) if path.is_file() else {"machine": found["machine"], "rows": []}
    if old["machine"] != found["machine"]:
        raise SystemExit(f"{path} holds rows of another machine, {old['machine']}: give another file")
    key = ["subject", "dtype", "clock", *(field.name for field in dataclasses.fields(Way))]
    kept = {tuple(entry[name] for name in key): entry for entry in [*old["rows"], *found["rows"]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, "rows": list(kept.values())}, indent=1) + "\n")


def amount(unit: str, values: list[float]) -> str:
    """The median, as a table shows it."""
    return f"{values[0] / 1e9:.3f} GB" if unit == "bytes" else f"{values[0]:.4g} {unit}"


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("section", "what", "experts", "batch", "prompt", "ours", "plain", "against", "ratio", "aim")
    for entry in rows:
        counts = ["–" if entry[name] is None else str(entry[name]) for name in ("experts", "batch", "prompt")]
        sides = [amount(entry["unit"], entry[side]) for side in ("ours", "plain")]
        table.add_row(
            entry["section"], entry["what"], *counts, *sides, entry["against"], spread(entry["ratio"]), entry["aim"]
        )
    return table
