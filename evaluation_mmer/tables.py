"""What the commands print, as tables and lines of rich.

Enters: a report, a plan, a finding. Leaves: tables, and lines in rich's markup, with all that is not ours escaped.
Invariant: nothing heavy is imported here; the objects come from those who made them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from merging_mmer.comparison import Fit
    from merging_mmer.inspection import Inspection
    from merging_mmer.plan import MergePlan
    from merging_mmer.report import MergeReport


def densities(report: "MergeReport") -> Table:
    table = Table("expert", "mask density", "energy kept by mask", "residual", "bits a parameter", title="merged")
    for name, numbers in report.experts.items():
        total = numbers["total"]
        shares = ["–" if total[key] is None else f"{total[key]:.1%}" for key in ("mask_density", "kept_energy")]
        table.add_row(name, *shares, f"{total['residual']:.3f}", f"{numbers['bits_per_parameter']:.2f}")
    return table


def plan_lines(plan: "MergePlan", out: Path) -> Iterator[Table | str]:
    """What `mmer merge --dry-run` prints."""
    table = Table("", "tensors", "written", title=f"what a merge into {escape(str(out))} would do")
    words = {
        "matrix": "matrices with a merged vector", "small": "norms and biases of which each expert keeps its own",
        "same": "equal to the base in all experts", "rows": "rows of added tokens", "tower": "towers",
    }  # fmt: skip
    for kind, word in words.items():
        parts = [part for part in plan.parts if part.kind == kind]
        size = sum(stored.nbytes for part in parts for stored in part.stored)
        table.add_row(word, str(len(parts)), decimal(size))
    table.add_row("together", str(len(plan.parts)), decimal(plan.placement.total_bytes), style="bold")
    yield table
    files = plan.placement.files
    yield f"{len(files)} {'file' if len(files) == 1 else 'files'}, {decimal(plan.reads)} to read"
    yield f"{plan.threads} workers, {decimal(plan.memory)} of memory at most beside the interpreter's own"
    for warning in plan.warnings:
        yield f"[yellow]warning:[/yellow] {escape(warning)}"


def inspected(found: "Inspection") -> Iterator[Table | str]:
    """What `mmer inspect` prints."""
    yield f"[bold]{escape(found.source)}[/bold]: {found.kind} {escape(found.architecture or found.model_type)}"
    table = Table("part", "tensors", "parameters", "size", "dtypes")
    for group in found.groups:
        dtypes = ", ".join(
            f"{dtype} {count}" if len(group.dtypes) > 1 else dtype for dtype, count in group.dtypes.items()
        )
        table.add_row(group.name, f"{group.tensors}", f"{group.parameters:,}", _size(group.bytes), dtypes)
    yield table
    for title, names in (("unknown tensors", found.unknown), ("missing tensors", found.missing)):
        if names:
            yield f"[red]{title}:[/red] {escape(', '.join(names))}"
    if found.words is not None:
        words = found.words
        yield f"vocabulary: {words.rows} rows, {words.tokens} tokens, {words.padding} rows of padding"
        if words.added:
            yield f"added tokens: {escape(', '.join(words.added))}"
        for modality, token in words.placeholders.items():
            yield f"placeholder of {modality}: {escape(token['token'])} ({token['id']})"
    for name, value in found.adapter.items():
        if value not in (None, [], {}, False):
            yield f"{name}: {escape(str(value))}"
    if found.merged:
        yield f"decoupling: {escape(str(found.merged['decoupling']))}, text_route: {found.merged['text_route']}"
        yield _kept_table(found.merged["experts"])
    for note in found.notes:
        yield f"[yellow]note:[/yellow] {escape(note)}"
    for problem in found.problems:
        yield f"[red]problem:[/red] {escape(problem)}"
    if found.fit is not None:
        yield from _fit_lines(found.fit)


def _kept_table(experts: dict[str, dict[str, Any]]) -> Table:
    table = Table("expert", "modalities", "class", "mask density", "energy kept", "residual", "bits a parameter")
    for name, expert in experts.items():
        numbers = [expert.get(key) for key in ("mask_density", "kept_energy", "residual", "bits_per_parameter")]
        shown = ["–" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(name, ", ".join(expert["modalities"]), expert["model_type"], *shown)
    return table


def _fit_lines(fit: "Fit") -> Iterator[str]:
    if fit.distance is not None:
        yield (
            f"from {escape(fit.base)}: distance {fit.distance:.4f} of its norm, cosine {fit.cosine:.4f}, "
            f"{fit.equal:.1%} of the entries equal ({len(fit.compared)} matrices)"
        )
        yield f"changed: {len(fit.changed)} of the {fit.tensors} tensors compared"
    for reason in fit.reasons:
        yield f"[red]does not fit:[/red] {escape(reason)}"
    if fit.fits:
        yield f"[green]fits[/green] {escape(fit.base)}"


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


__all__ = ["densities", "inspected", "plan_lines"]
