"""The pictures of a model card, as PNG files.

Enters: the counts of the masks, the report, the results of an evaluation. Leaves: plots/*.png, each WIDTH pixels wide,
and for each a `Plot`, what the card says of it. Invariants: the same numbers give the same bytes; every picture can be
read without telling colours apart, by its numbers, markers or order; none is drawn of numbers that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .mask_counts import MaskCounts
from .results import Result, shown

FOLDER = "plots"
_RETENTION, _RESIDUAL, _DENSITY, _OVERLAP = _DRAWN = (
    "retention.png", "residual_by_layer.png", "mask_density.png", "mask_overlap.png",
)  # fmt: skip
WIDTH = 1280  # pixels; a card is shown some 800 wide
_INCHES = 8.0
# Okabe and Ito's colours without yellow, which is too light for lines: https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^Dv*P"
_STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "font.family": "DejaVu Sans",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """`file` relative to the folder; `alt` for those who do not see it, `words` on how to read it."""

    file: str
    title: str
    alt: str
    words: str


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def remove_plots(folder: Path):
    """Take away what `draw_plots` has drawn: it shows a folder as it was."""
    for name in _DRAWN:
        (folder / FOLDER / name).unlink(missing_ok=True)
    if (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()


def draw_plots(folder: Path, report: dict[str, Any], counts: MaskCounts | None, results: list[Result]) -> list[Plot]:
    """Draw all that there are numbers for, and take away what is left of an earlier time."""
    import matplotlib

    remove_plots(folder)
    layers = {name: numbers.get("layers") or {} for name, numbers in report["experts"].items()}
    several = counts is not None and len(counts.experts) > 1
    drawn: list[tuple[str, Callable[[], tuple[Any, Plot]]]] = [
        (_RETENTION, lambda: _retention([r for r in results if r.retention is not None])),
        (_RESIDUAL, lambda: _residual(layers)),
        (_DENSITY, lambda: _density(counts)),  # type: ignore[arg-type]
        (_OVERLAP, lambda: _overlap(counts)),  # type: ignore[arg-type]
    ]
    there = {
        _RETENTION: any(r.retention is not None for r in results),
        _RESIDUAL: any(len(of) > 1 for of in layers.values()),
        _DENSITY: counts is not None and bool(counts.kinds),
        _OVERLAP: several,
    }
    plots = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nothing of the user's own settings
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        for name, draw in drawn:
            if there[name]:
                figure, plot = draw()
                (folder / FOLDER).mkdir(exist_ok=True)
                figure.savefig(folder / plot.file, dpi=WIDTH / _INCHES, metadata={"Software": None})
                plots.append(plot)
    return plots


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _retention(results: list[Result]) -> tuple[Any, Plot]:
    figure = _figure(1.3 + 0.42 * len(results))
    axes = figure.subplots()
    values = [result.retention or 0.0 for result in results]
    spans = [result.retention_interval or (value, value) for result, value in zip(results, values)]
    places = np.arange(len(results))[::-1]
    axes.barh(places, values, height=0.62, color=_COLORS[0])
    errors = [
        [max(0.0, v - low) for v, (low, _) in zip(values, spans)],
        [max(0.0, high - v) for v, (_, high) in zip(values, spans)],
    ]
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    right = max([1.0, *(high for _, high in spans)])
    for place, value, result in zip(places, values, results):
        axes.text(right * 1.02, place, f"{value:.1%}", va="center", weight="bold")
        axes.text(right * 1.16, place, f"{shown(result.value)}, n = {result.n}", va="center")
    axes.set_yticks(places, [result.label for result in results])
    axes.set_xlim(0, right * 1.42)
    axes.spines["bottom"].set_bounds(0, right)
    ticks = np.arange(0, right + 1e-9, 0.2 if right <= 1.6 else 0.5)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_xlabel("score of the merged model ÷ score of the original expert", loc="left")
    words = ", ".join(f"{result.label} {value:.1%}" for result, value in zip(results, values))
    return figure, Plot(
        f"{FOLDER}/{_RETENTION}", "Retention", f"Bars of retention by task: {words}",
        "What is left of each original expert on its own task. Whiskers are its 95 % interval, drawn over the "
        "same questions; beside the bars stand the retention, the score and the number of questions.",
    )  # fmt: skip


def _residual(layers: dict[str, dict[str, dict[str, float]]]) -> tuple[Any, Plot]:
    figure = _figure(4.0)
    axes = figure.subplots()
    ends: list[tuple[float, str]] = []
    last = max(int(layer) for of in layers.values() for layer in of)
    for place, (name, of) in enumerate(layers.items()):
        if not of:
            continue
        x = [int(layer) for layer in of]
        y = [numbers["residual"] for numbers in of.values()]
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        every = max(1, len(x) // 16)
        axes.plot(x, y, color=color, marker=marker, markersize=5, markevery=(place % every, every), linewidth=1.6)
        ends.append((y[-1], name))
    top = max(1e-6, axes.get_ylim()[1], *(value for value, _ in ends)) * 1.05
    axes.set_ylim(0, top)
    names = list(layers)
    for height, (value, name) in zip(_apart([value for value, _ in ends], top * 0.055), ends):
        place = names.index(name)
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        axes.annotate(
            name, (last, value), xytext=(last * 1.055 + 0.15, height), va="center", color=color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip
        axes.plot([last], [value], color=color, marker=marker, markersize=5)
    axes.set_xlim(-0.02 * last - 0.1, last * (1.06 + 0.017 * max(len(name) for name in names)) + 0.5)
    axes.spines["bottom"].set_bounds(0, last)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last and tick == int(tick)])
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("layer", loc="left")
    axes.set_ylabel("residual  ‖θ̂ − θ‖ / ‖θ − θ₀‖")
    alt = "Lines of the residual by layer: " + ", ".join(
        f"{name} {min(n['residual'] for n in of.values()):.3f} to {max(n['residual'] for n in of.values()):.3f}"
        for name, of in layers.items() if of
    )  # fmt: skip
    return figure, Plot(
        f"{FOLDER}/{_RESIDUAL}", "Residual by layer", alt,
        "How far each expert's recovered parameters are from its own, relative to how far it is from the base: 0 is "
        "the expert itself, 1 the base.",
    )  # fmt: skip


def _apart(values: list[float], distance: float) -> list[float]:
    """Heights for labels of lines that end at `values`: no two nearer than `distance`, each as near as can be."""
    groups: list[list[int]] = []
    for place in sorted(range(len(values)), key=lambda place: values[place]):
        groups.append([place])
        while len(groups) > 1 and _bottom(groups[-1], values, distance) < (
            _bottom(groups[-2], values, distance) + len(groups[-2]) * distance
        ):
            above = groups.pop()
            groups[-1] += above
    heights = [0.0] * len(values)
    for group in groups:
        bottom = max(0.0, _bottom(group, values, distance))
        for step, place in enumerate(group):
            heights[place] = bottom + step * distance
    return heights


def _bottom(group: list[int], values: list[float], distance: float) -> float:
    """Where the lowest label of some that touch one another stands, when they lie around their lines' ends."""
    return sum(values[place] for place in group) / len(group) - (len(group) - 1) * distance / 2


def _density(counts: MaskCounts) -> tuple[Any, Plot]:
    kinds, layers, experts = counts.kinds, counts.layers, counts.experts
    columns = 1 if len(experts) == 1 or len(layers) > 40 else 2
    rows = -(-len(experts) // columns)
    figure = _figure(0.9 + rows * (0.55 + 0.2 * len(kinds)))
    grids = [counts.grid(place) for place in range(len(experts))]
    low = min(float(np.nanmin(grid)) for grid in grids)
    high = max(float(np.nanmax(grid)) for grid in grids)
    every = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    short = _short(kinds)
    for place, axes in enumerate(every.flat):
        if place >= len(experts):
            axes.axis("off")
            continue
        image = axes.imshow(
            grids[place], aspect="auto", cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest"
        )  # fmt: skip
        total = sum(of[place] for of in counts.by_matrix.values()) / sum(counts.entries.values())
        beside = "".join(f", {kind} {counts.density(place, kind, None):.0%}" for kind in counts.outside)
        axes.set_title(f"{experts[place]}: {total:.1%} in all{beside}", loc="left")
        axes.set_yticks(range(len(kinds)), short, fontsize=8)
        step = max(1, len(layers) // 6)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if place + columns >= len(experts):
            axes.tick_params(labelbottom=True)
        if place // columns == rows - 1:
            axes.set_xlabel("layer", loc="left", fontsize=9)
    bar = figure.colorbar(image, ax=every, shrink=min(1.0, 0.8 if rows > 1 else 1.0), aspect=30, pad=0.015)
    bar.set_label("share of ones in the mask", fontsize=9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    alt = "Mask density by layer and kind of matrix: " + ", ".join(
        f"{name} {float(np.nanmin(grid)):.0%} to {float(np.nanmax(grid)):.0%}" for name, grid in zip(experts, grids)
    )  # fmt: skip
    return figure, Plot(
        f"{FOLDER}/{_DENSITY}", "Mask density by layer and kind of matrix", alt,
        "How much of the merged vector each expert takes as its own. Where a panel is dark, the expert differs most "
        "from what the merge agreed on, and its correction has most to mend.",
    )  # fmt: skip


def _short(kinds: list[str]) -> list[str]:
    """The last word of each name, or all of it where two would be alike."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [word if last.count(word) == 1 else kind for word, kind in zip(last, kinds)]


def _overlap(counts: MaskCounts) -> tuple[Any, Plot]:
    experts, shares = counts.experts, counts.overlap()
    count = len(experts)
    figure = _figure(min(7.5, 1.6 + 0.62 * count))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i in range(count):
        for j in range(count):
            words = "–" if np.isnan(shares[i, j]) else f"{shares[i, j]:.0%}"
            color = "black" if shares[i, j] > 0.55 else "white"
            axes.text(j, i, words, ha="center", va="center", color=color, fontsize=11 if count <= 8 else 7)
    axes.set_xticks(range(count), experts, rotation=0 if count <= 6 else 40, ha="center" if count <= 6 else "right")
    axes.set_yticks(range(count), experts)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.015)
    bar.set_label("in both masks ÷ in either", fontsize=9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    pairs = ", ".join(f"{experts[i]} and {experts[j]} {shares[i, j]:.0%}" for i in range(count) for j in range(i))
    return figure, Plot(
        f"{FOLDER}/{_OVERLAP}", "Overlap of the experts' masks", f"Overlap of masks: {pairs}",
        "Of the entries of the merged vector that one or the other of two experts takes, the share that both take. "
        "Experts with much in common share more of it than strangers.",
    )  # fmt: skip
