"""What the routed model takes in memory and on the way from the disk, beside plain transformers.

Enters: models in memory, and folders of the base and of a merged model. Leaves: rows of bytes and of seconds. A load
is a process of its own, its files in the page cache, timed around `from_pretrained` with what is imported by it: for
ours also the encoders' classes and the code in the folder. Its resident memory is what the process has more than
before, once every tensor was read: RssAnon alone, and with RssFile, where the tensors are that stay in mapped files.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from inference_rows import Way, row
from merge_speed import into_page_cache
from torch import nn

LOAD = """
import json, os, sys, time
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

folder, ours, clock, *routes = sys.argv[1:]
now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
cls = AutoModel if ours == "ours" else AutoModelForCausalLM
before = resident()
started = now()
model = cls.from_pretrained(folder, trust_remote_code=ours == "ours")
seconds = now() - started
found = []
for kept in range(1 + len(routes)):
    if kept:
        model.keep_routes(routes[:kept])
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.flatten()[::512].float().sum()  # each page: of a mapped file nothing is there before it is read
    found.append(resident())
print(json.dumps({"seconds": seconds, "resident": [{k: now[k] - before[k] for k in now} for now in found]}))
"""


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers, what is tied once."""
    return sum({t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


def memory(base: Any, ours: Any) -> Iterator[dict]:
    """Of the language models, in the dtype that they run in; the encoders are the same on both sides."""
    experts = ours.config.expert_names
    plain = stored_bytes(base) * (1 + len(experts))
    for kept in ([], experts[:1], experts[:2])[: 1 + len(experts)]:
        ours.keep_routes(kept)
        total = sum(ours.memory_footprint_by_route().values()) - stored_bytes(ours.model.experts)
        aim = "≤ 0.5" if len(experts) == 4 and not kept else ""
        what = f"{len(kept)} kept" if kept else "packed"
        yield row(Way("memory", what, "base and originals", "bytes", len(experts), aim=aim), [total], [plain])
    ours.keep_routes([])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def loaded(folder: Path, ours: bool, modules: Path, clock: str, routes: Iterable[str] = ()) -> dict[str, Any]:
    """Seconds and resident bytes, from a process of its own. Raises SystemExit with what it said where it fails."""
    into_page_cache(folder.glob("*.safetensors"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", LOAD, str(folder), "ours" if ours else "plain", clock, *routes]
    done = subprocess.run(command, env=environment, cwd=modules, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"loading {folder} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(base: Path, merged: Path, rounds: int, modules: Path, clock: str = "wall") -> Iterator[dict]:
    """A load per byte, and what is then resident, in the dtype that the files have. `modules` is where transformers
    puts the folder's code: a load that is not counted does so where it is not there yet.
    """
    experts = json.loads((merged / "config.json").read_text())["expert_names"]
    runs: dict[str, Callable[[], dict]] = {
        "ours": lambda: loaded(merged, True, modules, clock, experts[:2]),
        "plain": lambda: loaded(base, False, modules, clock),
    }
    if not modules.is_dir():
        modules.mkdir()
        runs["ours"]()
    found: dict[str, list[dict]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 - turn % 2 * 2]:
            found[name].append(runs[name]())
    sizes = {"ours": folder_bytes(merged), "plain": folder_bytes(base)}
    seconds = {name: [one["seconds"] for one in found[name]] for name in found}
    per_gb = {name: [value / sizes[name] * 1e9 for value in seconds[name]] for name in found}
    number = len(experts)
    yield row(Way("load", "load", "base", "seconds", number), seconds["ours"], seconds["plain"])
    way = Way("load", "load, per byte", "base", "seconds/GB", number, aim="≤ 1.3")
    yield row(way, per_gb["ours"], per_gb["plain"])
    for kept in range(len(found["ours"][0]["resident"])):
        state = f"{kept} kept" if kept else "packed"
        for what, names in {"RssAnon": ["RssAnon"], "resident": ["RssAnon", "RssFile"]}.items():
            ours = [sum(one["resident"][kept][name] for name in names) for one in found["ours"]]
            side_by_side = [sum(one["resident"][0][n] for n in names) * (1 + number) for one in found["plain"]]
            way = Way("load", f"{what}, {state}, with encoders", "base × (1 + experts)", "bytes", number)
            yield row(way, ours, side_by_side)
