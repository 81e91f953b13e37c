"""Other ways to merge beside this one: the same experts, the same questions, one switch.

    python benchmarks/baselines.py                                             # every method, all experts of the lab
    python benchmarks/baselines.py --experts image,audio --methods ours tall   # some
    python benchmarks/baselines.py --validation 100         # coefficients chosen on 100 validation items an expert

Methods: `alone` (each expert's parameters on every task), `base`, static merges (`weight_average`, `naive_mc`,
`task_arithmetic`, `dare`, `consensus`, `ties`), one vector and masks (`emr`, `tall`, `paper`, `masks`), each expert's
parameters exactly (`exact`, the upper bound, and `damc`, with text on the average), and `ours`, the default recipe.
Prints and writes, for every method and expert, accuracy on held-out items with its Wilson 95 % interval, retention
(÷ the original expert on the same items), the share of items answered with the same words, and the bits that the
expert costs a merged parameter beside base and τ*. In fp32 on the CPU, greedily.

What an expert cannot take by itself (a picture expert has no ears) is given to it as features of the task's own
tower: "audio's parameters" on pictures is the audio expert's language model behind the picture expert's tower, with
the latter's prompt. Where two experts take the same media, the other one as a whole is asked too ("expert … alone").
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from retention import cells, keep, load_merged, merged_inputs, original, recipe, versions
from rich.console import Console
from rich.table import Table

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE
from evaluation_mmer.baseline_models import HOST, TaskVectors, put
from evaluation_mmer.baselines import GRIDS, METHODS, Coefficients
from evaluation_mmer.demo import EXPERTS
from evaluation_mmer.lab import load_items
from evaluation_mmer.lab.layouts import LAYOUTS
from evaluation_mmer.retention import Score, evaluate
from mmer import Recipe, merge

RESULTS = Path(__file__).parent / "results" / "baselines.json"
STATIC = ("weight_average", "naive_mc", "task_arithmetic", "dare", "consensus", "ties")
MADE_OF_HOST = ("base", *METHODS)


def recipes(count: int) -> dict[str, dict[str, Any]]:
    """Method -> settings of the recipe that makes it. Text in DAMC has the average parameters of `count` experts."""
    average = {"name": "task_arithmetic", "alpha": 1 / count}
    exact = {"method": average, "decoupling": {"kind": "exact"}}
    ties = {"name": "ties", "density": 0.2, "scope": "model"}
    return {
        **dict.fromkeys(MADE_OF_HOST, {"decoupling": HOST}),
        "ties": {"method": ties, "decoupling": {"kind": "none"}},
        "paper": {"decoupling": {"kind": "paper"}},
        "masks": {"decoupling": {"kind": "mask"}},
        "alone": exact,
        "damc": exact,
        "exact": exact,
        "ours": {},
    }


EVERY = tuple(recipes(1))


@dataclass
class Questions:
    """expert -> its items, and, once a merged processor is there, the model inputs."""

    items: Mapping[str, Sequence[Any]]
    batches: dict[str, list[dict[str, torch.Tensor]]] = field(default_factory=dict)

    def inputs(self, processor: Any, name: str) -> list[dict[str, torch.Tensor]]:
        if name not in self.batches:
            self.batches[name] = merged_inputs(processor, name, list(self.items[name]))
        return self.batches[name]


@dataclass
class Loaded:
    """A merged folder in memory. decode: tokens to words. costs: expert -> bits a merged parameter."""

    model: Any
    processor: Any
    decode: Callable[[torch.Tensor], list[str]]
    costs: dict[str, float]

    @classmethod
    def merged(cls, settings: dict[str, Any], out: Path) -> "Loaded":
        report = merge(Recipe.from_dict(settings), out, progress=False)
        costs = {name: numbers["bits_per_parameter"] for name, numbers in report.experts.items()}
        return cls(*load_merged(out), costs)

    def ask(self, questions: Questions, name: str, method: str, of: str | None = None) -> Score:
        """The answers to the items of expert `name`, by `method`; `of`: all tokens with that expert's parameters."""
        route, batches = route_of(method), questions.inputs(self.processor, name)
        if of is not None:
            route = FIRST_EXPERT_ROUTE + self.model.config.expert_names.index(of)
        if method == "damc":
            batches = [text_on_merged(batch) for batch in batches]
        self.model.keep_routes(held_for(method, of or name))
        return evaluate(self.model, self.decode, batches, list(questions.items[name]), route, f"{name}: {method}")


def route_of(method: str) -> int | None:
    """The route of all tokens; None where each takes its own."""
    return BASE_ROUTE if method == "base" else MERGED_ROUTE if method in STATIC else None


def held_for(method: str, expert: str) -> list[str]:
    """The routes whose weights the answers need."""
    if method == "base":
        return []
    return ["merged"] if method in STATIC else [expert, "merged"] if method == "damc" else [expert]


def text_on_merged(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Media as before, text (and what is generated) on the merged route: DAMC merges the parameters of text alone."""
    routes, text = batch["route_ids"], batch["mm_token_type_ids"] == 0
    answer = torch.full_like(batch["text_route"], MERGED_ROUTE)
    return {**batch, "route_ids": routes.masked_fill(text, MERGED_ROUTE), "text_route": answer}


def best(
    method: str, loaded: Loaded, vectors: TaskVectors, validation: Questions, given: Coefficients
) -> Coefficients:
    """`given` with the value of the authors' grid that answers most of the validation items right.

    TALL's λ is chosen for each expert by itself, a scaling by the mean accuracy over all experts; of equal values the
    first. A method without a grid keeps what is given.
    """
    free = next((name for name in METHODS[method] if name in GRIDS), None)
    if free is None:
        return given
    found: dict[float, dict[str, float]] = {}
    for value in GRIDS[free]:
        put(loaded.model, vectors, method, replace(given, **{free: value}))
        found[value] = {name: loaded.ask(validation, name, method).accuracy for name in validation.items}
    if free == "lam":
        return replace(given, lam={name: max(found, key=lambda v: found[v][name]) for name in validation.items})
    return replace(given, scaling=max(found, key=lambda v: sum(found[v].values())))


def row(name: str, method: str, label: str, score: Score, expert: Score, **more: Any) -> dict[str, Any]:
    """One line: `name` is whose task it is, `label` which parameters answered."""
    return {"expert": name, "method": method, "parameters": label, **score.against(expert), **more}


def compare(
    recipe_of: Callable[[dict[str, Any]], dict[str, Any]],
    questions: Questions,
    originals: Mapping[str, Score],
    methods: Sequence[str],
    settings: Coefficients,
    validation: Questions | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of `methods`, in the order in which their models are made: methods of one folder share it.

    `recipe_of`: settings -> a recipe of the experts in `questions`. Raises ValueError for a method that is not known.
    """
    names, made_by = list(questions.items), recipes(len(questions.items))
    if strangers := sorted(set(methods) - set(made_by)):
        raise ValueError(f"methods: found {strangers}, expected some of {list(made_by)}")
    groups: dict[str, list[str]] = {}
    for method in methods:
        groups.setdefault(json.dumps(made_by[method], sort_keys=True), []).append(method)
    for group in groups.values():
        with tempfile.TemporaryDirectory() as folder:
            own = recipe_of(made_by[group[0]])
            loaded = Loaded.merged(own, Path(folder) / "merged")
            vectors = TaskVectors(Recipe.from_dict(own)) if set(group) & set(METHODS) else None
            for method in group:
                if method == "alone":
                    yield from _alone(loaded, questions, originals)
                    continue
                used, costs = settings, loaded.costs
                if vectors is not None and method in METHODS:
                    if validation is not None:
                        used = best(method, loaded, vectors, validation, settings)
                    costs = put(loaded.model, vectors, method, used)
                if method in STATIC:
                    costs = dict.fromkeys(names, 0.0)
                more = {key: asdict(used)[key] for key in METHODS.get(method, ())}
                for name in names:
                    cost = None if method == "base" else costs[name]
                    score = loaded.ask(questions, name, method)
                    yield row(name, method, method, score, originals[name], bits_per_parameter=cost, coefficients=more)


def _alone(loaded: Loaded, questions: Questions, originals: Mapping[str, Score]) -> Iterator[dict[str, Any]]:
    for name in questions.items:
        for other in questions.items:
            if other != name:
                score = loaded.ask(questions, name, "alone", of=other)
                label = f"{other}'s parameters"
                yield row(name, "alone", label, score, originals[name], bits_per_parameter=None, coefficients={})


def same_media(names: Sequence[str]) -> list[tuple[str, str]]:
    """(whose task, another expert that takes the same media by itself)."""
    kinds = {name: LAYOUTS[name].media_type for name in names}
    return [(name, other) for name in names for other in names if name != other and kinds[name] == kinds[other]]


def cross_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Each expert's parameters on every task, in Markdown: a line a task, a column whose parameters."""
    lines = ["| task | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for task in names:
        shown = []
        for other in names:
            label = "original expert" if other == task else f"{other}'s parameters"
            found = [entry for entry in rows if entry["expert"] == task and entry["parameters"] == label]
            shown.append(f"{found[0]['accuracy']:.1%}" if found else "–")
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    return lines


def markdown(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The rows of a results file: the methods, then the cross table."""
    lines = ["| expert | parameters | accuracy (95 %) | retention | same words | bits |", "|---|---|---|---|---|---|"]
    for name in names:
        for entry in rows:
            if entry["expert"] == name and entry["method"] != "alone":
                cost = "–" if entry["bits_per_parameter"] is None else f"{entry['bits_per_parameter']:.2f}"
                lines.append(f"| {name} | {entry['parameters']} | {cells(entry)} | {cost} |")
    return "\n".join([*lines, "", *cross_table(rows, names)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default=",".join(EXPERTS), help="names, with commas (default: all of the lab)")
    parser.add_argument("--methods", nargs="+", default=EVERY, choices=EVERY, metavar="METHOD", help=" ".join(EVERY))
    parser.add_argument("--items", type=int, default=400, help="held-out items an expert (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="order of the items, and what DARE drops (default: 0)")
    parser.add_argument("--validation", type=int, default=0, help="items to choose coefficients on (default: 0, none)")
    for name, default in asdict(Coefficients()).items():
        if name != "seed":
            parser.add_argument(f"--{name}", type=type(default), default=default, help=f"(default: {default})")
    parser.add_argument("--json", type=Path, default=RESULTS, help="put the rows there, in place of older ones")
    parser.add_argument("--markdown", type=Path, help="only print the rows of this results file as tables")
    arguments = parser.parse_args()
    names = arguments.experts.split(",")
    if arguments.markdown:
        rows = json.loads(arguments.markdown.read_text())
        print(markdown(rows, [name for name in names if any(entry["expert"] == name for entry in rows)]))
        return
    try:
        settings = Coefficients(**{name: getattr(arguments, name) for name in asdict(Coefficients())})
    except ValueError as error:
        parser.error(str(error))
    items = {name: load_items(name, "test", arguments.items, arguments.seed) for name in names}
    chosen = None
    if arguments.validation:
        chosen = Questions({n: load_items(n, "validation", arguments.validation, arguments.seed) for n in names})
    facts = {"seed": arguments.seed, "merged": names, "validation": arguments.validation, "versions": versions()}
    rows, started = [], time.monotonic()

    def note(*new: dict[str, Any]):
        rows.extend({**entry, **facts} for entry in new)
        keep(arguments.json, rows)
        for entry in new:
            shown = " ".join(cells(entry).split(" | "))
            print(
                f"{time.monotonic() - started:6.0f} s  {entry['expert']}, {entry['parameters']}: {shown}", flush=True
            )

    originals = {name: original(name, items[name]) for name in names}
    plain = {"bits_per_parameter": None, "coefficients": {}}
    note(*(row(n, "original", "original expert", own, own, **plain) for n, own in originals.items()))
    if "alone" in arguments.methods:
        for name, other in same_media(names):
            score = original(other, items[name])
            note(row(name, "alone", f"expert {other} alone", score, originals[name], **plain))
    for entry in compare(
        lambda own: recipe(names, own), Questions(items), originals, arguments.methods, settings, chosen
    ):
        note(entry)
    table = Table("expert", "parameters", "accuracy", "95 %", "retention", "same words", "bits a parameter")
    for entry in sorted(rows, key=lambda entry: names.index(entry["expert"])):
        low, high = entry["interval"]
        cost = "" if entry["bits_per_parameter"] is None else f"{entry['bits_per_parameter']:.2f}"
        shares = [f"{entry[key]:.1%}" for key in ("retention", "agreement")]
        table.add_row(
            entry["expert"], entry["parameters"], f"{entry['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", *shares, cost
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
