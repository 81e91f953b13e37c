"""The rows of fidelity.py as tables and as a picture.

    python benchmarks/fidelity_plot.py [--json results/fidelity.json] [--png results/fidelity.png]

Enters: results/fidelity.json. Leaves: on stdout a table of the screen (validation: KL divergence from the original and
the share of items with the same words) and one of the accuracies (test), with Wilson's 95 % intervals; the picture has
both against bits a parameter, one colour an expert. A way's worst expert is what counts.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation_mmer.intervals import wilson

from lab.full import FULL  # isort: skip

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def grouped(rows: Sequence[Row], split: str) -> dict[tuple[str, str], list[Row]]:
    """(set, way) -> the rows of its experts, by bits. Ways without τ* belong to no set: they are the same in all."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["split"] == split:
            found.setdefault((row["set"], row["way"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "alone", item[0][0], item[1][0]["bits"])))


def share(right: int, n: int) -> str:
    low, high = wilson(right, n)
    return f"{right / n:.1%} ({low:.1%} – {high:.1%})"


def screen_table(rows: Sequence[Row]) -> list[str]:
    """LoRAs and experts that were tuned in full apart, since not every way was asked of both."""
    lines = [
        "| shares τ* of | way | bits | KL, worst LoRA | same words | KL, worst full expert | same words |",
        "|---|---|---|---|---|---|---|",
    ]
    for (place, way), own in grouped(rows, "validation").items():
        full = [row for row in own if row["expert"] in FULL]
        cells = [*_worst([row for row in own if row not in full]), *_worst(full)]
        bits = sum(row["bits"] for row in own) / len(own)
        lines.append(f"| {'–' if place == 'alone' else place} | {way} | {bits:.2f} | " + " | ".join(cells) + " |")
    return lines


def _worst(rows: Sequence[Row]) -> tuple[str, str]:
    if not rows:
        return "–", "–"
    worst = max(rows, key=lambda row: row["divergence"])
    same = share(sum(row["same"] for row in rows), sum(row["n"] for row in rows))
    return f"{max(worst['divergence'], 0):.4f} ({worst['expert']}, of {len(rows)})", same


def retention(row: Row) -> float:
    return row["right"] / row["right_original"]


def final_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| shares τ* of | way | bits | expert | n | accuracy (95 %) | original | retention | same words (95 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (place, way), own in grouped(rows, "test").items():
        for row in own:
            lines.append(
                f"| {'–' if place == 'alone' else place} | {way} | {row['bits']:.2f} | {row['expert']} | {row['n']} "
                f"| {share(row['right'], row['n'])} | {row['right_original'] / row['n']:.1%} | {retention(row):.1%} "
                f"| {share(row['same'], row['n'])} |"
            )
    return lines


def draw(rows: Sequence[Row], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({row["expert"] for row in rows})
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name in names:
        own = [row for row in rows if row["expert"] == name]
        for alone, marker in ((True, "o"), (False, "^")):
            screen = [r for r in own if r["split"] == "validation" and (r["set"] == "alone") == alone]
            left.plot(
                [r["bits"] for r in screen], [max(r["divergence"], 1e-6) for r in screen], marker, color=colours[name],
                markersize=4, alpha=0.8, label=name if alone else None, linestyle="none",
            )  # fmt: skip
            test = [r for r in own if r["split"] == "test" and (r["set"] == "alone") == alone]
            right.plot(
                [r["bits"] for r in test], [100 * retention(r) for r in test], marker, color=colours[name],
                markersize=5, alpha=0.8, linestyle="none",
            )  # fmt: skip
    left.set(yscale="log", xscale="log", ylabel="KL from the original, nats a token", title="validation items")
    right.set(xscale="log", ylabel="retention, %", title="test items")
    right.axhline(99, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("bits a parameter and expert, beside base and τ*")
        axes.grid(alpha=0.3)
    left.plot([], [], "o", color="grey", markersize=4, label="of τᵢ alone")
    left.plot([], [], "^", color="grey", markersize=4, label="shares τ*")
    left.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "fidelity.json")
    parser.add_argument("--png", type=Path, default=RESULTS / "fidelity.png")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())
    print("\n".join([*screen_table(rows), "", *final_table(rows)]))
    draw(rows, arguments.png)


if __name__ == "__main__":
    main()
