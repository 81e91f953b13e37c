"""What is left of the lab's experts after merging, for every way of decoupling.

    python benchmarks/retention.py                                  # the default recipe: four rows an expert
    python benchmarks/retention.py --only default paper             # and other ways, with their bits
    python benchmarks/retention.py --experts image,audio --sweep    # every way, with these two merged alone

`--experts` are the experts that are merged and asked: all five of the lab, or some. Prints accuracy on held-out items
with its Wilson 95 % interval, retention (÷ the original expert on the same items), the share of items answered with
the same words as the original, the residual, and the bits a parameter that it costs. Everything runs in fp32 on the
CPU, greedily, through the processors and `generate`. results/retention.json holds the rows that the README shows.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from evaluation_mmer.demo import EXPERTS, sources
from evaluation_mmer.lab import build_base, build_expert, load_expert, load_items
from evaluation_mmer.lab.experts import processor_inputs
from evaluation_mmer.lab.layouts import LAYOUTS
from evaluation_mmer.retention import Score, batched, evaluate
from mmer import MMERForConditionalGeneration, merge

DEFAULT: dict[str, Any] = {}  # the recipe's own defaults; for LoRA experts such as these: kind exact
SWEEP: dict[str, dict[str, Any]] = {
    "paper": {"decoupling": {"kind": "paper"}},
    "paper, density 0.2": {"method": {"density": 0.2}, "decoupling": {"kind": "paper"}},
    "paper, lambda 0.4": {"decoupling": {"kind": "paper", "lambda": 0.4}},
    "mask, row scales": {"decoupling": {"kind": "mask", "scale": "row", "rank": 0}},
    "mask, row scales, rank 8": {"decoupling": {"kind": "mask", "scale": "row", "rank": 8}},
    "mask, row scales, rank 16": {"decoupling": {"kind": "mask", "scale": "row", "rank": 16}},
    "mask, row scales, rank 32": {"decoupling": {"kind": "mask", "scale": "row", "rank": 32}},
    "mask, rank 16, no scales": {"decoupling": {"kind": "mask", "scale": "none", "rank": 16}},
}
BATCH = 40


def versions() -> str:
    """What the numbers of a run hold for."""
    said = [f"{name} {version(name)}" for name in ("mmer", "torch", "transformers")]
    return ", ".join([*said, f"Python {platform.python_version()}"])


def recipe(names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    return {"base": str(build_base()), **sources({name: build_expert(name) for name in names}), **settings}


def decoder(processor: Any) -> Callable[[torch.Tensor], list[str]]:
    return lambda tokens: processor.batch_decode(tokens, skip_special_tokens=True)


def original(name: str, items: list) -> Score:
    model, processor = load_expert(name, torch.float32)
    batches = [processor_inputs(processor, part) for part in batched(items, BATCH)]
    return evaluate(model, decoder(processor), batches, items, label=name)


def load_merged(folder: Path) -> tuple[Any, Any, Callable[[torch.Tensor], list[str]]]:
    """A merged folder in fp32: model, processor, and what makes words of tokens."""
    model = MMERForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return model, processor, decoder(processor)


def merged_inputs(processor, name: str, items: list) -> list[dict[str, torch.Tensor]]:
    """The same items through the merged repo's processor, with the expert's own template."""
    modality, batches = LAYOUTS[name].media_type, []
    for part in batched(items, BATCH):
        chats = []
        for item in part:
            media = {"type": modality, modality: item.media, "expert": name}
            chats.append([{"role": "user", "content": [media, {"type": "text", "text": item.question}]}])
        batches.append(
            dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True))
        )
    return batches


def row(table: Table, label: str, score: Score, base: Score, report: Any = None, name: str = "") -> dict[str, Any]:
    low, high = score.interval
    cost = report.experts[name] if report else None
    values = {
        "expert": name,
        "parameters": label,
        **score.against(base),
        "residual": cost["total"]["residual"] if cost else None,
        "bits_per_parameter": cost["bits_per_parameter"] if cost else None,
    }
    shown = [f"{score.accuracy:.1%}", f"{low:.1%} – {high:.1%}", f"{values['retention']:.1%}"]
    shown += [f"{values['agreement']:.1%}"]
    shown += [f"{cost['total']['residual']:.3f}", f"{cost['bits_per_parameter']:.2f}"] if cost else ["", ""]
    table.add_row(name, label, *shown)
    return values


def keep(path: Path, rows: list[dict[str, Any]]):
    """Put rows into a JSON file, each in place of an older one of the same expert and parameters.

    Raises SystemExit where the file holds rows of another experiment: other experts merged, items or seed.
    """
    old = json.loads(path.read_text()) if path.is_file() else []
    if others := [row for row in old if any(row[key] != rows[0][key] for key in ("n", "seed", "merged"))]:
        raise SystemExit(f"{path} holds {len(others)} rows of another experiment: give another file")
    all_rows = {(row["expert"], row["parameters"]): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(all_rows.values()), indent=1) + "\n")


def cells(row: dict[str, Any]) -> str:
    """Accuracy with its interval, retention and agreement, as cells of a table in Markdown."""
    low, high = row["interval"]
    return f"{row['accuracy']:.1%} ({low:.1%} – {high:.1%}) | {row['retention']:.1%} | {row['agreement']:.1%}"


def markdown(path: Path) -> str:
    """The rows of a results file as the README shows them."""
    return markdown_of(json.loads(path.read_text()))


def markdown_of(rows: list[dict[str, Any]]) -> str:
    lines = ["| expert | parameters | accuracy (95 %) | retention | same words | bits |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: EXPERTS.index(row["expert"])):
        cost = "–" if row["bits_per_parameter"] is None else f"{row['bits_per_parameter']:.2f}"
        lines.append(f"| {row['expert']} | {row['parameters']} | {cells(row)} | {cost} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default=",".join(EXPERTS), help="names, with commas (default: all of the lab)")
    parser.add_argument("--items", type=int, default=400, help="held-out items an expert (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="order of the items (default: 0)")
    parser.add_argument("--sweep", action="store_true", help="every way of decoupling, not the default alone")
    parser.add_argument("--only", nargs="+", help="of all ways, those with exactly these names (default among them)")
    parser.add_argument("--json", type=Path, help="put the rows into this file, in place of older ones of their name")
    parser.add_argument("--markdown", type=Path, help="only print the rows of this results file as a table")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(arguments.markdown))
        return
    names = arguments.experts.split(",")
    if strangers := set(arguments.only or []) - {"default", *SWEEP}:
        parser.error(f"--only: found {sorted(strangers)}, expected some of {['default', *SWEEP]}")
    items = {name: load_items(name, "test", arguments.items, arguments.seed) for name in names}
    originals = {name: original(name, items[name]) for name in names}
    table = Table(
        "expert", "parameters", "accuracy", "95 %", "retention", "same words", "residual", "bits a parameter"
    )
    rows = [row(table, "original expert", originals[name], originals[name], name=name) for name in names]
    ways: dict[str, dict[str, Any]] = {"default": DEFAULT}
    if arguments.sweep or arguments.only:
        ways |= SWEEP
    if arguments.only:
        ways = {label: ways[label] for label in arguments.only}
    prompts: dict[str, list[dict[str, torch.Tensor]]] = {}
    for label, settings in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            out = Path(folder) / label.replace(" ", "-")
            report = merge(recipe(names, settings), out, progress=False)
            model, processor, decode = load_merged(out)
            for name in names:
                if name not in prompts:
                    prompts[name] = merged_inputs(processor, name, items[name])
                routes: dict[str, int | None] = {f"decoupled: {label}": None}
                if label == "default":
                    routes = {"base parameters": 0, "TIES merged everywhere": 1, **routes}
                for words, route in routes.items():
                    model.keep_routes([name] if route is None else ["merged"])
                    score = evaluate(model, decode, prompts[name], items[name], route, f"{name}: {words}")
                    own = report if route is None else None
                    rows.append(row(table, words, score, originals[name], own, name))
                    print(json.dumps(rows[-1]), flush=True)
            print(f"{label}: {time.monotonic() - started:.0f} s", flush=True)
        if arguments.json:
            keep(
                arguments.json,
                [{**entry, "seed": arguments.seed, "merged": names, "versions": versions()} for entry in rows],
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
