"""What an expert forgets when it is tuned on to another task, and what the merged model still knows of both.

    python benchmarks/forgetting.py

The lab's *digits* expert is the *image* expert, tuned on to handwritten digits. Asked are: the old task (clothes)
before that tuning, after it, and after merging both experts; the new task (digits) before it, after it, and after
merging. 400 held-out items each, greedily, in fp32, through the processors and `generate`; accuracies with their
Wilson 95 % intervals, and the merged model's over those of the expert whose task it is. results/forgetting.json holds
the rows that the README shows. Target: both at least 99 %.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from retention import cells, load_merged, merged_inputs, original, recipe, versions
from rich.console import Console
from rich.table import Table

from evaluation_mmer.lab import load_items
from evaluation_mmer.retention import Score, evaluate
from mmer import merge

TASKS = {"old": "image", "new": "digits"}


def merged_scores(items: dict[str, list], settings: dict[str, Any]) -> dict[str, Score]:
    """The merged model's answers to each expert's items, each asked of its expert."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "both-tasks"
        merge(recipe(list(TASKS.values()), settings), out, progress=False)
        model, processor, decode = load_merged(out)
        scores = {}
        for name, own in items.items():
            model.keep_routes([name])
            scores[name] = evaluate(model, decode, merged_inputs(processor, name, own), own, label=f"merged: {name}")
        return scores


def row(task: str, stage: str, score: Score, expert: Score) -> dict[str, Any]:
    return {"task": task, "stage": stage, **score.against(expert)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as the README shows them."""
    lines = ["| task | parameters | accuracy (95 %) | of the task's expert | same words |", "|---|---|---|---|---|"]
    lines += [f"| {entry['task']} | {entry['stage']} | {cells(entry)} |" for entry in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=400, help="held-out items a task (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="order of the items (default: 0)")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    arguments = parser.parse_args()
    old, new = TASKS["old"], TASKS["new"]
    items = {name: load_items(name, "test", arguments.items, arguments.seed) for name in (old, new)}
    before = {task: original(old, items[task]) for task in (old, new)}  # the image expert, asked both
    after = {task: original(new, items[task]) for task in (old, new)}  # and what became of it
    ways = {"merged: default": {}, "merged: masks": {"decoupling": {"kind": "mask"}}}
    merged = {label: merged_scores(items, settings) for label, settings in ways.items()}
    rows = []
    for name, task, expert in ((old, "old: clothes", before[old]), (new, "new: digits", after[new])):
        rows.append(row(task, "before tuning on", before[name], expert))
        rows.append(row(task, "after tuning on", after[name], expert))
        rows += [row(task, label, scores[name], expert) for label, scores in merged.items()]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([{**entry, "versions": versions()} for entry in rows], indent=1) + "\n")
    table = Table("task", "parameters", "accuracy", "95 %", "of the task's expert", "same words")
    for entry in rows:
        low, high = entry["interval"]
        shares = [f"{entry[key]:.1%}" for key in ("retention", "agreement")]
        table.add_row(entry["task"], entry["stage"], f"{entry['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", *shares)
    Console(width=120).print(table)
    print(markdown(rows))


if __name__ == "__main__":
    main()
