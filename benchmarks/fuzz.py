"""Hostile and broken inputs in any number: what a merge makes of each.

    python benchmarks/fuzz.py 3000 --seed 7 --processes 30

Files of a tiny sound world are broken one at a time (tests/hostile_inputs.py): truncated and bit-flipped weights,
lying headers, indices that point elsewhere, pickles that would run code, JSON and YAML of every wrong kind, settings
out of any bounds, things that are no files. Each input must be refused by an error that names the file, or merged
rightly, within a second above the time of the sound world (CPU seconds, the median of three); nothing may be left
behind. With `--folders` all inputs of tests/hostile_folders.py follow: a merged folder with one broken file, given to
`verify`, `add`, `remove` and `export`. With `--processes` as many more are given to `mmer merge` as a process of its
own. The table counts outcomes:
"refused", "same" (the very result of the sound world), "other" (other values, which another reader finds in the broken
file too), and faults, which are listed; the exit status is 1 when there is one.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from tests import hostile_folders  # noqa: E402
from tests import hostile_inputs as hostile  # noqa: E402
from tests.hostile_processes import run_process  # noqa: E402
from tests.hostile_weights import ANY, OTHER, REFUSED, SAME  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=1000, help="inputs (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--processes", type=int, default=0, help="inputs more for real processes (default: 0)")
    parser.add_argument("--folders", action="store_true", help="broken merged folders as well")
    parser.add_argument("--only", default="", help="inputs whose description holds this")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    counts: Counter = Counter()
    faults: list[tuple[str, str]] = []

    def note(kind: str, one: object, outcome: str):
        counts[kind, outcome if outcome in ANY else "fault"] += 1
        if outcome not in ANY:
            faults.append((str(one), outcome))

    with tempfile.TemporaryDirectory() as folder:
        world = hostile.World(Path(folder) / "world")
        some = hostile.chosen(world, arguments.seed, arguments.count, arguments.only)
        for number, one in enumerate(track(some, "in this process", console=console)):
            note(one.kind, one, hostile.run(world, one, Path(folder) / f"work-{number}"))
        more = hostile.chosen(world, arguments.seed + 1, arguments.processes, arguments.only)
        command = [sys.executable, str(Path(__file__).parent.parent / "mmer.py")]
        for number, one in enumerate(track(more, "mmer merge", console=console)):
            note("mmer merge", one, run_process(world, one, Path(folder) / f"process-{number}", command))
        if arguments.folders:
            folders = hostile_folders.Folders(Path(folder) / "folders")
            broken = list(folders.inputs(arguments.seed))
            for one in track(broken, "merged folders", console=console):
                for command_name in hostile_folders.COMMANDS:
                    outcome = hostile_folders.run(folders, one, command_name, Path(folder) / "work")
                    note(f"mmer {command_name}", one, outcome)
    outcomes = [REFUSED, SAME, OTHER, "fault"]
    shown = Table("input", *outcomes, "all", title=f"hostile inputs, seed {arguments.seed}")
    for kind in dict.fromkeys(kind for kind, _ in counts):
        own = [counts[kind, outcome] for outcome in outcomes]
        shown.add_row(kind, *map(str, own), str(sum(own)))
    sums = [sum(n for (_, found), n in counts.items() if found == outcome) for outcome in outcomes]
    shown.add_section()
    shown.add_row("all", *map(str, sums), str(sum(sums)))
    console.print(shown)
    for one, outcome in faults:
        console.print(f"{one}\n    {outcome}", markup=False, highlight=False)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
