"""Fidelity per bit: what each way to write an expert's task vector down costs, and what it gives back.

    python benchmarks/fidelity.py --ways screen                 # all ways, on validation items: KL divergence, words
    python benchmarks/fidelity.py --ways final --split test --items 400   # those near the knee: accuracy as well
    python benchmarks/fidelity_plot.py                          # the rows as tables and as a picture

Experts: the lab's five LoRA experts and two that were tuned in full (lab/full.py). Everything is merged in memory with
the functions of merging_mmer: τ* of a set of experts by TIES, rounded to bf16; an expert's linears become θ₀ + τ̂ᵢ, the
rest of it (tower, connector, rows of added tokens) is its own. A way is a pattern (mask, signs, …) and a correction of
what the pattern leaves. Bits are those of one expert a parameter of its linears, beside base and τ*, with 16 bits for
every scale and every number of a factor unless the way says otherwise. No test item chooses anything. Rows go to
results/fidelity.json; those that are there are not computed again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fidelity_formulas import factor_bits, rounded, spread, weighted_correct
from fidelity_questions import Questions, compare, follow, moments, read_tower
from fidelity_ways import ALONE, MOST_RANK, PATTERNS, PLANS, Way
from retention import versions
from transformers import AutoModelForCausalLM

from evaluation_mmer.demo import EXPERTS
from evaluation_mmer.lab import build_base, build_expert, load_items
from evaluation_mmer.lab.layouts import LAYOUTS
from merging_mmer.base import Base
from merging_mmer.experts import Expert, open_expert
from merging_mmer.recipe import Recipe
from merging_mmer.ties import merge_vectors, trim

from lab.full import FULL, full_tower  # isort: skip

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
SETS = {
    "2: image, audio": ("image", "audio"),
    "2: clothes, words": ("clothes", "words"),
    "2: clothes, audio": ("clothes", "audio"),
    "4: image, audio, clothes, words": ("image", "audio", "clothes", "words"),
    "4: digits, video, point_cloud, words": ("digits", "video", "point_cloud", "words"),
    "7": (*EXPERTS, *FULL),
}
UNLABELLED = 128  # train inputs behind the activation weights

Matrices = dict[str, torch.Tensor]


@dataclass
class Lab:
    """Base and experts, opened. θ₀ of every linear in fp32."""

    experts: dict[str, Expert]
    towers: dict[str, Path]
    theta_0: Matrices
    tokens: int
    llm: Any
    merged: dict[tuple[str, float], Matrices] = field(default_factory=dict)

    @classmethod
    def open(cls, names: Sequence[str]) -> "Lab":
        entries, towers = {}, {}
        for name in names:
            if name in FULL:
                towers[name] = full_tower(name)
                entries[name] = {"model": str(towers[name]), "modality": LAYOUTS[FULL[name]].media_type}
            else:
                expert = build_expert(name)
                towers[name] = expert.tower
                entries[name] = {"lora": str(expert.lora), "tower": str(expert.tower), "modality": expert.modality}
        recipe = Recipe.from_dict({"base": str(build_base()), "experts": entries, "default_experts": firsts(names)})
        base = Base(recipe.base)
        experts = {name: open_expert(name, own, base) for name, own in recipe.experts.items()}
        linears = [n for n in base.names if n in base.delta_weights and n not in base.vocabulary_names]
        theta_0 = {name: base.tensor(name).float() for name in linears}
        llm = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
        return cls(experts, towers, theta_0, len(base.load_tokenizer()), llm)

    def tau(self, expert: str, name: str) -> torch.Tensor:
        base = self.experts[expert].base
        return self.experts[expert].task_vector(name, base.tensor(name), self.tokens)

    def merge(self, members: Sequence[str], density: float) -> Matrices:
        """τ* in bf16. The last ones asked for are kept."""
        key = (",".join(members), density)
        if key not in self.merged:
            while len(self.merged) > 4:
                self.merged.pop(next(iter(self.merged)))
            self.merged[key] = {
                name: merge_vectors("ties", [trim(self.tau(m, name), density) for m in members]).bfloat16()
                for name in self.theta_0
            }
        return self.merged[key]

    def put(self, hat: Callable[[str], torch.Tensor]):
        with torch.no_grad():
            for name, theta_0 in self.theta_0.items():
                self.llm.get_parameter(f"model.{name}").copy_(theta_0 + hat(name))


def firsts(names: Sequence[str]) -> dict[str, str]:
    """Which expert a medium belongs to where two take it."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(LAYOUTS[FULL.get(name, name)].media_type, name)
    return found


@dataclass
class Subject:
    """One expert of one set: its task vectors, the patterns and factors that were made of them."""

    lab: Lab
    name: str
    taus: Matrices
    moments: Callable[[], Matrices]
    members: Sequence[str] = ()
    _pattern: tuple[str, Matrices] | None = None
    _factors: dict[tuple[str, str], dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict
    )

    def pattern(self, name: str) -> Matrices:
        if self._pattern is None or self._pattern[0] != name:
            formula, shares = PATTERNS[name][0], PATTERNS[name][4]
            merged = self.lab.merge(self.members, 0.2 if "density 0.2" in name else 1.0) if shares else None
            made = {
                key: formula(tau, tau if merged is None else merged[key].float()) for key, tau in self.taus.items()
            }
            self._pattern = (name, made)
            self._factors = {}
        return self._pattern[1]

    def factors(self, way: Way) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        hats, key = self.pattern(way.pattern), (way.pattern, way.weight)
        if key not in self._factors:
            weights: dict[str, torch.Tensor | None] = dict.fromkeys(self.taus, None)
            if way.weight != "none":
                weights |= self.moments()
            if way.weight == "diagonal":
                weights = {n: w.diagonal() for n, w in weights.items() if w is not None}
            self._factors[key] = {
                n: weighted_correct(tau - hats[n], weights[n], MOST_RANK) for n, tau in self.taus.items()
            }
        return self._factors[key]

    def ranks(self, way: Way) -> dict[str, int]:
        if not way.rank:
            return dict.fromkeys(self.taus, 0)
        cost = {name: sum(tau.shape) for name, tau in self.taus.items()}
        if not way.spread:
            return {name: min(way.rank, *tau.shape) for name, tau in self.taus.items()}
        energy = {name: values for name, (_, _, values) in self.factors(way).items()}
        return spread(energy, cost, way.rank * sum(cost.values()))

    def make(self, way: Way) -> dict[str, float]:
        """The way's τ̂ into the LLM; its bits a parameter, and what of ‖τ‖ is lost."""
        hats, ranks = self.pattern(way.pattern), self.ranks(way)
        factors = self.factors(way) if way.rank else {}
        _, entry_bits, per_row, per_column, _ = PATTERNS[way.pattern]
        bits, entries, error, energy = 0.0, 0, 0.0, 0.0

        def hat(name: str) -> torch.Tensor:
            nonlocal bits, entries, error, energy
            own, tau, rank = hats[name], self.taus[name], ranks[name]
            out, wide = tau.shape
            if rank:
                b, a, _ = factors[name]
                own = own + rounded(b[:, :rank].T, way.bits).T @ rounded(a[:rank], way.bits)
            bits += entry_bits * tau.numel() + 16 * (per_row * out + per_column * wide)
            bits += factor_bits(rank, out, wide, way.bits)
            entries += tau.numel()
            error += (tau - own).square().sum().item()
            energy += tau.square().sum().item()
            return own

        self.lab.put(hat)
        return {"bits": bits / entries, "residual": (error / energy) ** 0.5}


@dataclass(frozen=True)
class Plan:
    split: str
    items: int
    seed: int
    ways: Callable[[str], list[Way]]  # of the set's name, or ALONE


def own_rank(expert: Expert) -> int:
    """Of a LoRA: at this rank its task vector is met exactly, so that more is not asked for."""
    return MOST_RANK if expert.adapter is None else max(expert.adapter.ranks.values())


def questions_of(lab: Lab, name: str, split: str, count: int, seed: int) -> Questions:
    task = FULL.get(name, name)
    return read_tower(lab.towers[name], LAYOUTS[task], load_items(task, split, count, seed))


def rows_of(lab: Lab, name: str, sets: dict[str, tuple[str, ...]], plan: Plan, known: set) -> Iterator[dict]:
    """The rows of one expert that are not known yet."""
    places = {ALONE: (name,), **{key: members for key, members in sets.items() if name in members}}
    most = own_rank(lab.experts[name])
    todo = {
        place: [
            way
            for way in plan.ways(place)
            if (name, place, way.label, plan.split) not in known and (way.pattern or way.rank <= most)
        ]
        for place in places
    }
    if not any(todo.values()):
        return
    taus = {key: lab.tau(name, key) for key in lab.theta_0}
    questions = questions_of(lab, name, plan.split, plan.items, plan.seed)
    lab.put(taus.__getitem__)
    follow(lab.llm, questions)
    kept: list[Matrices] = []

    def second_moments() -> Matrices:
        if not kept:
            lab.put(taus.__getitem__)
            seen = questions_of(lab, name, "train", UNLABELLED, plan.seed)
            kept.append(moments(lab.llm, seen, {key: f"model.{key}".removesuffix(".weight") for key in taus}))
        return kept[0]

    for place, ways in todo.items():
        subject = Subject(lab, name, taus, second_moments, places[place])
        for way in sorted(ways, key=lambda way: list(PATTERNS).index(way.pattern)):
            began = time.monotonic()
            made = subject.make(way)
            answered = compare(lab.llm, questions, plan.split == "test")
            yield {
                "expert": name, "set": place, "experts": len(places[place]), "way": way.label, "split": plan.split,
                "seed": plan.seed, **made, "divergence": answered.divergence, "n": answered.n, "same": answered.same,
                "right": answered.right, "right_original": sum(questions.right),
                "data_free": way.weight == "none", "seconds": round(time.monotonic() - began, 1),
                "versions": versions(),
            }  # fmt: skip


def keep(path: Path, rows: Sequence[dict[str, Any]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def key_of(row: dict[str, Any]) -> tuple:
    return (row["expert"], row["set"], row["way"], row["split"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default=",".join(SETS["7"]), help="whose rows to compute, with commas")
    parser.add_argument("--sets", default=";".join(SETS), help="which of them, with semicolons; nothing: none")
    parser.add_argument("--ways", choices=list(PLANS), default="screen")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="order of the items")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.experts.split(",")
    sets = {key: SETS[key] for key in arguments.sets.split(";") if key}
    rows = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
    lab = Lab.open(list(dict.fromkeys([*names, *(m for members in sets.values() for m in members)])))
    plan = Plan(arguments.split, arguments.items, arguments.seed, PLANS[arguments.ways])
    for name in names:
        for row in rows_of(lab, name, sets, plan, {key_of(row) for row in rows}):
            rows.append(row)
            keep(arguments.json, rows)
            share = row["same"] / row["n"]
            print(
                f"{name}, {row['set']}, {row['way']}: {row['bits']:.3f} bits, residual {row['residual']:.3f}, "
                f"KL {row['divergence']:.5f}, same words {share:.1%}, {row['seconds']} s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
