"""RESULTS.md: every table of `results/`, each with the command that made it and the versions it holds for.

    python benchmarks/results_page.py

Enters: results/*.json. Leaves: RESULTS.md beside them, made anew. Invariants: a number on the page is in a results
file, no results file is left out, and the page in the repository is the one that this command writes (a test).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import fidelity_plot
import forgetting
import language
import retention
import text_routes

from evaluation_mmer.demo import EXPERTS

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
HEAD = """# Results

Made by `python benchmarks/results_page.py` from `results/*.json`. What each benchmark does: [README.md](README.md).
Intervals are 95 %: Wilson's for shares, least and largest of the rounds for times. *Same words*: the share of items
answered exactly as the original expert answers them. *Bits*: what an expert costs for each merged parameter, beside
base and τ*.
"""


@dataclass(frozen=True)
class Section:
    """One table. table: the file's content -> Markdown."""

    title: str
    command: str
    file: str
    words: str
    table: Callable[[Any], str]


def rows_of(found: Any) -> list[dict[str, Any]]:
    return found["rows"] if isinstance(found, dict) else found


def versions_of(found: Any) -> str:
    """What the numbers hold for, as far as the file says it."""
    if isinstance(found, dict) and "machine" in found:
        facts = found["machine"]
        cores = f"{facts['cores']} cores of {facts['processor']}"
        more = [f"mergekit {found['mergekit']}"] if "mergekit" in found else []
        names = ("python", "torch", "transformers")
        return ", ".join([cores, *(f"{name} {facts[name]}" for name in names if name in facts), *more])
    said = {row["versions"] for row in rows_of(found) if "versions" in row}
    return "; ".join(sorted(said)) or "versions were not kept"


def _retention(found: Any) -> str:
    return retention.markdown_of(found)


def _baselines(found: Any) -> str:
    return baselines.markdown(found, [name for name in EXPERTS if any(row["expert"] == name for row in found)])


def merge_speed(found: Any) -> str:
    lines = ["| | experts | seconds | × a plain copy | CPU seconds |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        parts = [row["tool"]]
        parts += [f"density {row['density']:g}"] if row["density"] is not None else []
        parts += [f"rank {row['rank']}"] if row["rank"] is not None else []
        ratio = f"{row['over_copy'][0]:.1f}" if row["over_copy"] else "–"
        seconds = f"{row['seconds']:.1f} ({row['least']:.1f} – {row['largest']:.1f})"
        lines.append(f"| {', '.join(parts)} | {row['experts']} | {seconds} | {ratio} | {row['cpu']:.1f} |")
    return "\n".join(lines)


def merge_memory(found: Any) -> str:
    heads = (
        "layers × hidden",
        "parameters",
        "experts",
        "rank",
        "workers",
        "peak above idle",
        "in largest tensors (fp32)",
    )
    lines = [f"| {' | '.join(heads)} | seconds |", "|---" * (len(heads) + 1) + "|"]
    for row in found["rows"]:
        cells = [f"{row['layers']} × {row['hidden']}", f"{row['parameters'] / 1e6:.0f} M"]
        cells += [str(row[name]) for name in ("experts", "rank", "workers")]
        cells += [f"{row['above_idle'] / 1e6:.0f} MB", f"{row['in_largest_tensors']:.2f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def inference(found: Any) -> str:
    lines = [
        "| | what | against | experts | batch | prompt | ours | plain | ours ÷ plain | aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        sides = [f"{row[side][0]:.3g} {row['unit']}" for side in ("ours", "plain")]
        middle, least, largest = row["ratio"]
        facts = [str(row[name]) if row[name] is not None else "" for name in ("experts", "batch", "prompt")]
        cells = [row["section"], row["what"], row["against"], *facts, *sides]
        lines.append(f"| {' | '.join(cells)} | {middle:.2f} ({least:.2f} – {largest:.2f}) | {row['aim']} |")
    return "\n".join(lines)


SECTIONS = (
    Section(
        "What is retained", 'python benchmarks/retention.py --only default paper "mask, row scales, rank 8"',
        "retention.json", "Five experts merged, 400 held-out questions each.", _retention,
    ),
    Section(
        "Every way of decoupling", "python benchmarks/retention.py --experts image,audio --sweep",
        "retention-two-experts.json", "Two experts merged alone, 400 questions each.", _retention,
    ),
    Section(
        "Other ways to merge", "python benchmarks/baselines.py --items 60", "baselines.json",
        "The same experts and questions for all, 60 each; coefficients are the authors' defaults.", _baselines,
    ),
    Section(
        "Fidelity per bit", "python benchmarks/fidelity.py --ways final --experts clothes,words --sets 7 --split test",
        "fidelity.json",
        "Two experts that were tuned in full; merged folders have no 4-bit factors yet. All ways, on validation "
        "items: [fidelity.md](fidelity.md).",
        lambda found: "\n".join(fidelity_plot.final_table(found)),
    ),
    Section(
        "Which route for text", "python benchmarks/text_routes.py --items 60", "text_routes.json",
        "60 questions an expert, its medium alone and with one of another kind beside it. `auto` is the expert's "
        "route with one medium, `merged` with two.",
        lambda found: text_routes.markdown(found),
    ),
    Section(
        "The base's language", "python benchmarks/language.py --items 60 --sentences 100", "language.json",
        "The base's route is the base's own, bit for bit: the run ends where it is not.",
        lambda found: language.markdown(found["rows"]),
    ),
    Section(
        "What is forgotten", "python benchmarks/forgetting.py", "forgetting.json",
        "400 questions a task.", lambda found: forgetting.markdown(found),
    ),
    Section(
        "Time of a merge", "python benchmarks/merge_speed.py --rounds 3", "merge_speed.json",
        "664 M parameters in bf16, whole processes.", merge_speed,
    ),
    Section(
        "Time of a merge by the number of experts",
        "python benchmarks/merge_speed.py --only ours copy --experts 2 4 8 --densities 1.0 --rounds 2",
        "merge_linearity.json",
        "The same size. Other work ran on the machine, so the CPU seconds tell, not the clock.", merge_speed,
    ),
    Section(
        "Memory of a merge", "python benchmarks/merge_memory.py --seven-billion --workers 2", "merge_memory.json",
        "As many layers of a 7 B Llama as the disk has room for; the peak does not grow with layers.", merge_memory,
    ),
    Section(
        "Speed and memory of the routed model", "python benchmarks/inference.py --subject lab --rounds 3",
        "inference.json",
        "The lab's five experts, fp32, one thread; in bf16, with more parameters or on a GPU not measured.", inference,
    ),
)  # fmt: skip


def page(sections: Sequence[Section] = SECTIONS, results: Path = RESULTS) -> str:
    parts = [HEAD]
    for section in sections:
        if not (results / section.file).is_file():
            continue
        found = json.loads((results / section.file).read_text())
        facts = f"`{section.command}` ({section.file}; {versions_of(found)})"
        parts.append(f"## {section.title}\n\n{section.words}\n\n{facts}\n\n{section.table(found)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(PAGE.read_text().splitlines())} lines")
