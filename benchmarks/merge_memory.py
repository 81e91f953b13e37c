"""How much memory a merge takes, in units of the model's largest tensor in fp32.

    python benchmarks/merge_memory.py                   # two depths of one width, one worker and two
    python benchmarks/merge_memory.py --seven-billion   # a 7 B base with four experts

Counted is anonymous memory (RssAnon of the merging process and its children, read every 10 ms from outside): what is
mapped from files is the page cache's. Of its peak that of an idle interpreter is taken off, which has imported the
same modules and done nothing. The two depths have the same largest tensor, so that a peak that grows with the model
shows. --seven-billion takes as many of its layers as the disk has room for, and one file with several names as the
weights of all experts, for the same reason; a merge reads it once for each of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merge_speed import ROOT, machine
from rich.console import Console
from rich.table import Table
from synthetic_models import SCALES, Models, Shape, make

EVERY = 0.01
SHAPES = {
    "tiny": SCALES["tiny"],
    "small": Shape(hidden=1024, layers=4, ffn=2816, heads=8, vocabulary=32000),
}
ROOM = 0.95  # of the disk's free space, at most
BESIDE = 32 << 20  # bytes of a checkpoint that are no weights of its language model, at most
MERGE = """
import json, sys
from mmer import merge
recipe, out, modules, options = (json.loads(word) for word in sys.argv[1:])
merge(recipe, out, progress=False, **options)
with open(modules, "w") as file:
    json.dump(list(sys.modules), file)
"""
IDLE = """
import contextlib, importlib, json, sys, time
with open(json.loads(sys.argv[1])) as file:
    modules = json.load(file)
import mmer
for name in modules:
    with contextlib.suppress(ImportError):  # names that are in sys.modules but no file's
        importlib.import_module(name)
time.sleep(0.5)
"""


@dataclass
class Peak:
    anonymous: int
    resident: int
    seconds: float


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process and its children: RssAnon, and all that is resident. Zeros when it has ended."""
    sizes = {"RssAnon": 0, "VmRSS": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return sizes
    for line in lines:
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    for child in children:
        sizes = {name: size + more for (name, size), more in zip(sizes.items(), memory(int(child)).values())}
    return sizes


def watch(code: str, *words: Any) -> Peak:
    """Run Python code, and look at its memory until it ends. Raises SystemExit with what it said where it fails."""
    command = [sys.executable, "-c", code, *(json.dumps(word) for word in words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    peak = Peak(0, 0, 0.0)
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            now = memory(process.pid)
            peak.anonymous = max(peak.anonymous, now["RssAnon"])
            peak.resident = max(peak.resident, now["VmRSS"])
            time.sleep(EVERY)
        peak.seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            end = said.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{code}\nended with {process.returncode}:\n{end}")
    return peak


def measure(shape: Shape, made: Models, workers: int, rank: int, folder: Path) -> dict[str, Any]:
    """One merge, and an interpreter that only imports; a row."""
    recipe = made.recipe(decoupling={"kind": "mask", "scale": "row", "rank": rank})
    out, modules = folder / "out", folder / "modules.json"
    shutil.rmtree(out, ignore_errors=True)
    peak = watch(MERGE, recipe, str(out), str(modules), {"threads": workers})
    shutil.rmtree(out)
    idle = watch(IDLE, str(modules))
    largest = 4 * shape.largest_tensor
    return {
        **asdict(shape),
        "parameters": shape.parameters,
        "experts": len(made.experts),
        "workers": workers,
        "rank": rank,
        "largest_tensor_fp32": largest,
        "idle": idle.anonymous,
        "peak": peak.anonymous,
        "above_idle": peak.anonymous - idle.anonymous,
        "in_largest_tensors": (peak.anonymous - idle.anonymous) / largest,
        "resident": peak.resident,
        "seconds": peak.seconds,
    }


def bytes_needed(shape: Shape, experts: int, rank: int) -> int:
    """On the disk: base, the one file of the experts, and what the merge writes: θ₀, τ*, masks, corrections."""
    sides = shape.layers * (11 * shape.hidden + 3 * shape.ffn) + 2 * (shape.hidden + shape.vocabulary)
    masks, factors = shape.parameters * experts // 8, 2 * sides * rank * experts
    return 4 * 2 * shape.parameters + masks + factors + (experts + 1) * BESIDE


def deepest(shape: Shape, experts: int, rank: int, folder: Path) -> Shape:
    """`shape` with as many layers as there is room for. Raises SystemExit where there is room for none."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    room = int(ROOM * (shutil.disk_usage(folder).free + sum(made.values())))
    for layers in range(shape.layers, 0, -1):
        found = replace(shape, layers=layers)
        if bytes_needed(found, experts, rank) <= room:
            return found
    raise SystemExit(f"{folder} has room for {room / 1e9:.1f} GB: too little for one layer. Give another --folder")


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "hidden", "layers", "parameters", "experts", "rank", "workers", "idle", "peak", "above idle",
        "in largest tensors", "seconds",
    )  # fmt: skip
    for row in rows:
        sizes = [f"{row[name] / 1e6:.0f} MB" for name in ("idle", "peak", "above_idle")]
        names = ("experts", "rank", "workers")
        table.add_row(
            str(row["hidden"]), str(row["layers"]), f"{row['parameters'] / 1e6:.0f} M", *(str(row[n]) for n in names),
            *sizes, f"{row['in_largest_tensors']:.2f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scale", default="small", choices=list(SHAPES), help="of the shallower model (default: small)"
    )
    parser.add_argument("--seven-billion", action="store_true", help="a 7 B base and four experts instead")
    parser.add_argument("--experts", type=int, help="(default: 3, or 4 with --seven-billion)")
    parser.add_argument("--rank", type=int, default=8, help="of the corrections (default: 8)")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--folder", type=Path, help="where the models are made, and kept (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    experts = arguments.experts or (4 if arguments.seven_billion else 3)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.abspath(arguments.folder or temporary))
        if arguments.seven_billion:
            shapes = [deepest(SCALES["7b"], experts, arguments.rank, folder / "7b")]
            print(f"{shapes[0].layers} of {SCALES['7b'].layers} layers fit on the disk", flush=True)
        else:
            first = SHAPES[arguments.scale]
            shapes = [first, replace(first, layers=2 * first.layers)]
        for shape in shapes:
            name = "7b" if arguments.seven_billion else f"{shape.layers}-layers"
            made = make(folder / name, shape, experts, one_file=arguments.seven_billion)
            for workers in arguments.workers:
                rows.append(measure(shape, made, workers, arguments.rank, folder))
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    Console(width=150).print(show(rows))


if __name__ == "__main__":
    main()
