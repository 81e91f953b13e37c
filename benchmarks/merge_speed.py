"""How long a merge takes: ours, mergekit's TIES, and a plain copy of the same bytes, in turn.

    python benchmarks/merge_speed.py                                      # 664 M parameters, three experts
    python benchmarks/merge_speed.py --only ours copy --experts 2 4 8     # linear in the experts?
    python benchmarks/merge_speed.py --only ours copy --scale small full  # linear in the parameters?

Each run is a process of its own, timed from outside. `ours` is `mmer merge` with masks and row scales, at rank 0 and
with a correction of rank 8, its report and the sha256 of every input included; `mergekit` is `mergekit-yaml
--lazy-unpickle` with its own defaults, on the same language models without towers (it knows no masks); `copy` reads
base and experts and writes them to the disk, which is the floor for what reads them all. `start` is what importing
costs, ours and mergekit's. Before each run all inputs are read once and the disk is synced, so that every run finds
them in the page cache. *seconds* ends with the process, *on disk* when its output is synced too. Ratios are taken
round by round.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from synthetic_models import SCALES, Models, make

from evaluation_mmer.lab.cache import cache_root

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = "mergekit==0.1.5"
TOOLS = ("start", "copy", "ours", "mergekit")
COPY = """
import os, shutil, sys
os.makedirs(sys.argv[1])
for place, path in enumerate(sys.argv[2:]):
    shutil.copyfile(path, f"{sys.argv[1]}/{place}")
"""
PART = 1 << 24


@dataclass(frozen=True)
class Way:
    """One thing that is timed. `key` is what a later run of it replaces in the results."""

    tool: str
    scale: str
    experts: int
    density: float | None = None
    rank: int | None = None
    threads: int | None = None

    @property
    def label(self) -> str:
        parts = [self.tool]
        parts += [f"density {self.density:g}"] if self.density is not None else []
        parts += [f"rank {self.rank}"] if self.rank is not None else []
        parts += [f"threads {self.threads}"] if self.threads is not None else []
        return ", ".join(parts)


@dataclass
class Run:
    seconds: float
    on_disk: float
    cpu: float
    peak: int
    written: int


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def into_page_cache(paths: Iterable[Path]):
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(PART):
                pass


def sync(folder: Path) -> int:
    """Put a folder's files on the disk; their bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    return size


def timed(command: list[str], inputs: list[Path], out: Path) -> Run:
    """Run a command that writes into `out`. Raises SystemExit with the end of what it said where it fails."""
    shutil.rmtree(out, ignore_errors=True)
    into_page_cache(inputs)
    os.sync()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            end = said.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{end}")
    written = sync(out) if out.exists() else 0
    on_disk = time.monotonic() - started
    return Run(seconds, on_disk, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, written)


def mergekit_environment(folder: Path) -> Path:
    """A virtual environment that holds mergekit, made where there is none."""
    if not (folder / "bin/mergekit-yaml").is_file():
        print(f"installing {MERGEKIT} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", MERGEKIT], check=True)
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    found = subprocess.run([folder / "bin/python", "-c", code], check=True, capture_output=True, text=True)
    if (there := f"mergekit=={found.stdout.strip()}") != MERGEKIT:
        raise SystemExit(f"{folder} holds {there}, expected {MERGEKIT}: give another --mergekit-venv, or remove it")
    return folder


def commands(way: Way, made: Models, folder: Path, out: Path, mergekit: Path) -> tuple[list[str], list[Path]]:
    """(command, the files that it reads) of one way."""
    if way.tool == "copy":
        return [sys.executable, "-c", COPY, str(out), *map(str, made.inputs())], made.inputs()
    if way.tool == "start":
        return [sys.executable, "-c", "import merging_mmer.opened_merge"], []
    if way.tool == "start of mergekit":
        return [str(mergekit / "bin/mergekit-yaml"), "--help"], []
    file = folder / "recipe.yaml"
    if way.tool == "ours":
        decoupling = {"kind": "mask", "scale": "row", "rank": way.rank}
        recipe = made.recipe(method={"name": "ties", "density": way.density}, decoupling=decoupling)
        command = [sys.executable, "-m", "mmer", "merge", str(file), str(out)]
        command += [] if way.threads is None else ["--threads", str(way.threads)]
    else:
        parameters = {"density": way.density, "weight": 1.0}
        models = [{"model": str(path), "parameters": parameters} for path in made.plain]
        recipe = {"merge_method": "ties", "base_model": str(made.base), "models": models}
        recipe |= {"parameters": {"normalize": True}, "dtype": "bfloat16"}
        command = [str(mergekit / "bin/mergekit-yaml"), str(file), str(out), "--lazy-unpickle"]
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return command, made.inputs(plain=way.tool == "mergekit")


def change(out: Path, base: Path, tool: str) -> torch.Tensor:
    """θ - θ₀ of one matrix of what a tool wrote, fp32; of ours that of θ₀ + τ*, rounded as mergekit's is."""
    name = "layers.0.mlp.down_proj"
    wanted = f"model.language_model.{name}.delta" if tool == "ours" else f"model.{name}.weight"
    with safe_open(base / "model.safetensors", framework="pt") as file:
        theta_0 = file.get_tensor(f"model.{name}.weight")
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if wanted in file.keys():
                found = file.get_tensor(wanted).float()
                theta = (theta_0.float() + found).to(theta_0.dtype).float() if tool == "ours" else found
                return theta - theta_0.float()
    raise SystemExit(f"{out} holds no {wanted}")


def ways_of(arguments: argparse.Namespace, scale: str, experts: int) -> list[Way]:
    ways = [Way(tool, scale, experts) for tool in ("start", "copy") if tool in arguments.only]
    if {"start", "mergekit"} <= set(arguments.only):
        ways.append(Way("start of mergekit", scale, experts))
    for density in arguments.densities:
        if "ours" in arguments.only:
            ways += [Way("ours", scale, experts, density, rank, arguments.threads) for rank in arguments.ranks]
        if "mergekit" in arguments.only:
            ways.append(Way("mergekit", scale, experts, density))
    return ways


def measure(ways: list[Way], made: Models, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of all ways in turn, each round starting with another; a row for each way."""
    runs: dict[Way, dict[int, Run]] = {way: {} for way in ways}
    changes: dict[tuple[str, float | None], torch.Tensor] = {}
    for turn in range(arguments.rounds):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            if way.tool == "mergekit" and turn >= arguments.rounds_mergekit:
                continue
            out = folder / "out"
            command, inputs = commands(way, made, folder, out, arguments.mergekit_venv)
            runs[way][turn] = run = timed(command, inputs, out)
            print(
                f"round {turn + 1}: {way.scale}, {way.experts} experts, {way.label}: {run.seconds:.2f} s", flush=True
            )
            if way.tool in ("ours", "mergekit") and (way.tool, way.density) not in changes:
                changes[way.tool, way.density] = change(out, made.base, way.tool)
            shutil.rmtree(out, ignore_errors=True)
    parameters = SCALES[ways[0].scale].parameters
    copies = next((runs[way] for way in ways if way.tool == "copy"), {})
    return [row(way, runs[way], copies, first_ours(way, runs), changes, parameters) for way in ways]


def first_ours(way: Way, runs: dict[Way, dict[int, Run]]) -> dict[int, Run]:
    """Our runs at the density of `way` and the first rank: what mergekit's are compared with."""
    return next((found for other, found in runs.items() if other.tool == "ours" and other.density == way.density), {})


def ratios(runs: dict[int, Run], others: dict[int, Run]) -> list[float]:
    """[median, least, largest] of the ratios of the rounds that both have; empty where there is none."""
    found = [runs[turn].seconds / others[turn].seconds for turn in runs if turn in others]
    return [statistics.median(found), min(found), max(found)] if found else []


def row(
    way: Way,
    runs: dict[int, Run],
    copies: dict[int, Run],
    ours: dict[int, Run],
    changes: dict[tuple[str, float | None], torch.Tensor],
    parameters: int,
) -> dict[str, Any]:
    seconds = [run.seconds for run in runs.values()]
    both = [changes.get((tool, way.density)) for tool in ("ours", "mergekit")]
    median = statistics.median(seconds)
    return {
        **dataclasses.asdict(way),
        "parameters": parameters,
        "rounds": len(seconds),
        "seconds": median,
        "least": min(seconds),
        "largest": max(seconds),
        "on_disk": statistics.median(run.on_disk for run in runs.values()),
        "cpu": statistics.median(run.cpu for run in runs.values()),
        "peak_resident": max(run.peak for run in runs.values()),
        "written": max(run.written for run in runs.values()),
        "ns_per_parameter_and_expert": median * 1e9 / parameters / way.experts,
        "over_copy": [] if way.tool.startswith("start") else ratios(runs, copies),
        "over_ours": ratios(runs, ours) if way.tool == "mergekit" else [],
        "cosine_of_both": cosine(*both) if way.tool == "mergekit" else None,
    }


def cosine(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    """Of the merged vectors of the two tools, in one matrix: they do the same work."""
    if a is None or b is None:
        return None
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def keep(path: Path, found: dict[str, Any]):
    """Put rows into a JSON file, each in place of an older one of the same way.

    Raises SystemExit where the file holds rows of another machine: those would not compare.
    """
    old = json.loads(path.read_text()) if path.is_file() else {"machine": found["machine"], "rows": []}
    if old["machine"] != found["machine"]:
        raise SystemExit(f"{path} holds rows of another machine, {old['machine']}: give another file")
    key = [field.name for field in dataclasses.fields(Way)]
    rows = {tuple(entry[name] for name in key): entry for entry in [*old["rows"], *found["rows"]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**old, **found, "rows": list(rows.values())}, indent=1) + "\n")


def spread(values: list[float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f} – {values[2]:.2f})" if values else "–"


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "scale", "experts", "what", "seconds (least – largest)", "on disk", "cpu", "written", "× copy", "× ours"
    )
    for entry in rows:
        way = Way(**{field.name: entry[field.name] for field in dataclasses.fields(Way)})
        seconds = spread([entry["seconds"], entry["least"], entry["largest"]])
        table.add_row(
            way.scale, str(way.experts), way.label, seconds, f"{entry['on_disk']:.2f}", f"{entry['cpu']:.1f}",
            f"{entry['written'] / 1e9:.2f} GB", spread(entry["over_copy"]), spread(entry["over_ours"]),
        )  # fmt: skip
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", nargs="+", default=["full"], choices=list(SCALES), help="sizes (default: full)")
    parser.add_argument("--experts", nargs="+", type=int, default=[3], help="numbers of experts (default: 3)")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 1.0], help="(default: 0.2 1.0)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8], help="of our corrections (default: 0 8)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--rounds-mergekit", type=int, help="of these, those with mergekit (default: all)")
    parser.add_argument("--only", nargs="+", default=list(TOOLS), choices=TOOLS, help="(default: all)")
    parser.add_argument("--threads", type=int, help="of ours (default: its own)")
    parser.add_argument("--folder", type=Path, help="where the models are made, and kept (default: a temporary one)")
    parser.add_argument("--mergekit-venv", type=Path, default=cache_root() / "mergekit-venv", help="made if not there")
    parser.add_argument("--json", type=Path, help="put the rows into this file, in place of older ones of their kind")
    arguments = parser.parse_args()
    if arguments.rounds_mergekit is None:
        arguments.rounds_mergekit = arguments.rounds
    if min(arguments.rounds, arguments.rounds_mergekit) < 1:
        parser.error("--rounds and --rounds-mergekit: expected 1 or more; leave mergekit out with --only")
    if "mergekit" in arguments.only:
        mergekit_environment(arguments.mergekit_venv)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.abspath(arguments.folder or temporary))
        for scale in arguments.scale:
            for experts in arguments.experts:
                made = make(folder / scale, SCALES[scale], experts, plain="mergekit" in arguments.only)
                rows += measure(ways_of(arguments, scale, experts), made, folder, arguments)
                if arguments.json:
                    tools = {"mergekit": MERGEKIT.partition("==")[2]} if "mergekit" in arguments.only else {}
                    keep(arguments.json, {"machine": machine(), **tools, "rows": rows})
    Console(width=150).print(show(rows))


if __name__ == "__main__":
    main()
