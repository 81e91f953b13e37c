"""What a merged model keeps of the base's language: on the base's route all, on every other how much.

    python benchmarks/language.py                  # the lab's five experts, the default recipe
    python benchmarks/language.py --bigbench       # and two tasks of BIG-bench

Multiple choice by likelihood through `mmer evaluate` (capitals, definitions; see language_tasks.py), on every route,
beside the base LLM as it was; and the perplexity of plain English sentences. The base's route must give the base's own
logits, bit for bit, on every sentence, and the same answer to every question: anything else ends the run. In fp32 on
the CPU. results/language.json holds the rows that README.md beside it shows.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from language_tasks import sentences, write_tasks
from retention import recipe, versions
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from configuration_mmer.routes_mmer import BASE_ROUTE
from evaluation_mmer.demo import EXPERTS
from evaluation_mmer.evaluating import ORIGINALS, evaluate
from evaluation_mmer.lab import build_base
from mmer import MMERForConditionalGeneration, merge

RESULTS = Path(__file__).parent / "results" / "language.json"


def negative_log_likelihood(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of all tokens but the first, summed, in nats. logits (1, n, vocabulary), ids (1, n)."""
    scores = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    return -float(scores.double().sum())


def perplexities(folder: Path, base: Path, texts: Sequence[str], routes: Sequence[str]) -> dict[str, float]:
    """route -> perplexity of `texts`. Raises SystemExit where the base's route is not the base, bit for bit."""
    model = MMERForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    numbers = {name: place for place, name in enumerate(["base", "merged", *model.config.expert_names])}
    found = {}
    with torch.inference_mode():
        for name in routes:
            model.keep_routes([name] if numbers[name] != BASE_ROUTE else [])
            total = 0.0
            for text, ids in zip(texts, tqdm(rows, desc=f"sentences, {name}", leave=False)):
                logits = model(input_ids=ids, route_ids=torch.full_like(ids, numbers[name])).logits
                if numbers[name] == BASE_ROUTE:
                    own = plain(input_ids=ids).logits
                    if not torch.equal(logits[..., : own.shape[-1]], own):
                        raise SystemExit(f"the base's route differs from the base in {text!r}")
                total += negative_log_likelihood(logits, ids)
            found[name] = math.exp(total / sum(ids.shape[1] - 1 for ids in rows))
    return found


def answered(folder: Path, tasks: Path, routes: Sequence[str], scratch: Path) -> list[dict[str, Any]]:
    """A row for each route, the base's first, and task. Raises SystemExit where its answers are not the base's own."""
    output, settings = scratch / "evaluation.json", {"dtype": "float32"}
    own = evaluate(folder, tasks, ORIGINALS, route=["base"], output=output, **settings).results
    for result in own:
        assert result.original is not None
        if result.agreement != 1.0 or result.value != result.original.value:
            raise SystemExit(f"{result.task}: {result.agreement:.1%} of the base's route's answers are the base's")
    base = {result.task: result.value for result in own}
    others = [route for route in routes if route != "base"]
    results = [*own, *evaluate(folder, tasks, route=others, output=output, **settings).results] if others else own
    return [
        {
            "task": result.task, "route": result.route, "n": result.n, "accuracy": result.value,
            "interval": list(result.interval), "change": result.value - base[result.task],
        }
        for result in results
    ]  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line a route: accuracies with their 95 % intervals, perplexity."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    heads = [f"{task} (n = {next(row['n'] for row in rows if row['task'] == task)})" for task in tasks]
    lines = ["| route | " + " | ".join(heads) + " |", "|---" * (len(tasks) + 1) + "|"]
    for route in dict.fromkeys(row["route"] for row in rows):
        own = {row["task"]: row for row in rows if row["route"] == route}
        lines.append(f"| {route} | " + " | ".join(_cell(own[task]) for task in tasks) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "accuracy" not in row:
        return f"{row['value']:.2f}"
    low, high = row["interval"]
    return f"{row['accuracy']:.1%} ({low:.1%} – {high:.1%})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default=",".join(EXPERTS), help="names, with commas (default: all of the lab)")
    parser.add_argument("--items", type=int, default=100, help="at most, a task (default: 100)")
    parser.add_argument("--sentences", type=int, default=300, help="(default: 300)")
    parser.add_argument("--bigbench", action="store_true", help="two of its tasks as well; downloads 358 MB once")
    parser.add_argument("--decoupling", default="auto", help="the recipe's kind (default: auto)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the rows go there (default: results/)")
    parser.add_argument("--markdown", action="store_true", help="only print the rows of --json as a table")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.json.read_text())["rows"]))
        return
    names = arguments.experts.split(",")
    routes = ["base", "merged", *names]
    facts = {"merged": names, "decoupling": arguments.decoupling, "versions": versions()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = folder / "merged"
        merge(recipe(names, {"decoupling": {"kind": arguments.decoupling}}), out, progress=False)
        texts = sentences(arguments.sentences)
        rows = [
            {"task": "perplexity", "route": route, "n": len(texts), "value": value}
            for route, value in perplexities(out, build_base(), texts, routes).items()
        ]
        tasks = write_tasks(folder, items=arguments.items, with_bigbench=arguments.bigbench)
        rows = [*answered(out, tasks, routes, folder), *rows]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"rows": [{**row, **facts} for row in rows]}, indent=1) + "\n")
    table = Table("task", "route", "n", "value")
    for row in rows:
        table.add_row(row["task"], row["route"], str(row["n"]), _cell(row))
    Console(width=110).print(table)
    print(markdown(rows))


if __name__ == "__main__":
    main()
