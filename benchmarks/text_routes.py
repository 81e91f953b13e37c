"""Which route should text take? Every choice, on prompts with one medium and with two.

    python benchmarks/text_routes.py                         # all experts of the lab, the default recipe
    python benchmarks/text_routes.py --decoupling mask       # as masks

Each expert's held-out questions are asked with its own medium alone, and with a medium of another kind beside it, a
held-out item of another expert (each in turn): in front of the expert's own, which then stands next to the question,
or behind it. Media tokens take the route of the expert that encoded them; text and the answer take `merged`, `base` or
the expert whose question it is, with that route's own prompt format; `auto` is the expert's with one medium and
`merged` with two. Rows give accuracy with its Wilson 95 % interval, and its ratio to the original expert's on the same
questions, its own medium alone. In fp32 on the CPU, greedily. Rows that are in the file already are not asked again.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention import BATCH, cells, load_merged, original, recipe, versions
from rich.console import Console
from rich.table import Table

from evaluation_mmer.demo import EXPERTS
from evaluation_mmer.lab import load_items
from evaluation_mmer.lab.layouts import LAYOUTS
from evaluation_mmer.retention import batched, evaluate
from mmer import merge

RESULTS = Path(__file__).parent / "results" / "text_routes.json"
OWN = "expert"  # the expert whose question it is
ROUTES = ("merged", "base", OWN)
ALONE, LAST, FIRST = "alone", "last", "first"
PLACES = {ALONE: "its medium alone", LAST: "behind another medium", FIRST: "before another medium"}


def strangers(name: str, names: Sequence[str]) -> list[str]:
    """Experts whose media are of another kind than those of `name`."""
    return [other for other in names if LAYOUTS[other].media_type != LAYOUTS[name].media_type]


def chats(name: str, items: dict[str, list], place: str, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A chat for each item of expert `name`; at `place` last or first with a medium of another kind beside its own."""
    others, made = strangers(name, names), []
    for number, item in enumerate(items[name]):
        blocks = [block(name, item)]
        if place != ALONE:
            other = others[number % len(others)]
            extra = block(other, items[other][number % len(items[other])])
            blocks = [extra, *blocks] if place == LAST else [*blocks, extra]
        made.append([{"role": "user", "content": [*blocks, {"type": "text", "text": item.question}]}])
    return made


def block(name: str, item: Any) -> dict[str, Any]:
    kind = LAYOUTS[name].media_type
    return {"type": kind, kind: item.media, "expert": name}


def ways(names: Sequence[str]) -> list[tuple[str, str]]:
    """(where the medium stands, route of the text)."""
    places = (ALONE, LAST, FIRST) if len(names) > 1 else (ALONE,)
    return [(place, route) for place in places for route in ROUTES]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each place and route, the experts beside each other, and their mean retention."""
    names = list(dict.fromkeys(row["expert"] for row in rows))
    lines = ["| its medium | text on | " + " | ".join(names) + " | mean retention |", "|---" * (len(names) + 3) + "|"]
    for place, route in dict.fromkeys((row["place"], row["route"]) for row in rows):
        own = [row for row in rows if (row["place"], row["route"]) == (place, route)]
        shown = [f"{row['accuracy']:.0%}" for row in own]
        mean = sum(row["retention"] for row in own) / len(own)
        lines.append(f"| {place} | {route} | {' | '.join(shown)} | {mean:.0%} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default=",".join(EXPERTS), help="names, with commas (default: all of the lab)")
    parser.add_argument("--items", type=int, default=100, help="held-out items an expert (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="order of the items (default: 0)")
    parser.add_argument("--decoupling", default="auto", help="the recipe's kind (default: auto)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the rows go there (default: results/)")
    parser.add_argument("--markdown", action="store_true", help="only print the rows of --json as a table")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.json.read_text())))
        return
    names = arguments.experts.split(",")
    items = {name: load_items(name, "test", arguments.items, arguments.seed) for name in names}
    originals = {name: original(name, items[name]) for name in names}
    facts = {
        "n": arguments.items,
        "seed": arguments.seed,
        "merged": names,
        "decoupling": arguments.decoupling,
        "versions": versions(),
    }
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
    if any(row[key] != value for row in rows for key, value in facts.items()):
        parser.error(f"{arguments.json} holds rows of another run: give another file")
    done = {(row["expert"], row["place"], row["route"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "merged"
        merge(recipe(names, {"decoupling": {"kind": arguments.decoupling}}), out, progress=False)
        model, processor, decode = load_merged(out)
        model.keep_routes([*names, "merged"])
        for name in names:
            for place, route in ways(names):
                if (name, PLACES[place], route) in done:
                    continue
                asked = name if route == OWN else route
                batches = [
                    dict(
                        processor.apply_chat_template(
                            part, tokenize=True, return_dict=True, add_generation_prompt=True, text_route=asked
                        )
                    )
                    for part in batched(chats(name, items, place, names), BATCH)
                ]
                score = evaluate(model, decode, batches, items[name], label=f"{name}: {place}, {route}")
                row = {"expert": name, "place": PLACES[place], "route": route, **score.against(originals[name])}
                rows.append({**row, **facts})
                print(f"{name}, {PLACES[place]}, text on {route}: {cells(row)}", flush=True)
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("expert", "its medium", "text on", "accuracy", "95 %", "of the original")
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["expert"], row["place"], row["route"], f"{row['accuracy']:.1%}", f"{low:.1%} – {high:.1%}",
            f"{row['retention']:.1%}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(markdown(rows))


if __name__ == "__main__":
    main()
