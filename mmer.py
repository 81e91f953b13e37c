"""mmer: the command line, and the public names (`from mmer import merge, Recipe, …`).

Only what the command line itself needs is imported at once. torch and transformers take seconds: a public name is
imported when it is asked for, and each command imports what it uses.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from evaluation_mmer.result_tables import evaluated
from evaluation_mmer.tables import densities, inspected, plan_lines
from hub_cards.commands import add_commands
from merging_mmer import merge as merge_folder
from merging_mmer.command_words import asked_experts, encoders, together
from merging_mmer.recipe import Recipe, load_experts
from merging_mmer.start import collector_paused, own_process

if TYPE_CHECKING:
    from configuration_mmer import MMERConfig
    from evaluation_mmer.results import Evaluation
    from hub_cards import Published, push_space, serve, write_card
    from merging_mmer import MergeReport
    from merging_mmer.exporting import export_route
    from merging_mmer.inspection import Inspection, inspect
    from merging_mmer.verification import Check, Verification, verify
    from modeling_mmer import MMERForConditionalGeneration
    from processing_mmer import MMERProcessor

    __version__: str

__all__ = [
    "Evaluation",
    "Inspection",
    "MMERConfig",
    "MMERForConditionalGeneration",
    "MMERProcessor",
    "MergeReport",
    "Published",
    "Recipe",
    "Verification",
    "add",
    "evaluate",
    "export_route",
    "inspect",
    "merge",
    "push",
    "push_space",
    "remove",
    "serve",
    "verify",
    "write_card",
]

_HOMES = {
    "Evaluation": "evaluation_mmer.results",
    "Inspection": "merging_mmer.inspection",
    "MMERConfig": "configuration_mmer",
    "MMERForConditionalGeneration": "modeling_mmer",
    "MMERProcessor": "processing_mmer",
    "MergeReport": "merging_mmer",
    "Published": "hub_cards",
    "Verification": "merging_mmer.verification",
    "export_route": "merging_mmer.exporting",
    "inspect": "merging_mmer.inspection",
    "push_space": "hub_cards",
    "serve": "hub_cards",
    "verify": "merging_mmer.verification",
    "write_card": "hub_cards",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mmer")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _imported(_HOMES[name], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _imported(module: str, name: str) -> Any:
    with collector_paused():
        return getattr(import_module(module), name)


app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="One model from several multimodal LLMs of one base."
)
console = Console()
MARK = "merge_report.json"  # a folder that holds it was made by a merge, and may be replaced by the next one


def merge(recipe: Recipe | dict[str, Any] | str | Path, out: str | Path, **options: Any) -> "MergeReport":
    """Merge `recipe` (a Recipe, its fields as a mapping, or a YAML file) into the folder `out`, with its model card.

    `options` are those of `merging_mmer.merge`. Raises ValueError for what does not fit; nothing is left behind then.
    """
    if isinstance(recipe, dict):
        recipe = Recipe.from_dict(recipe)
    return merge_folder(recipe, out, finish=_write_card, **options)


def add(folder: str | Path, experts: Mapping[str, Any], **options: Any) -> "MergeReport":
    """Add experts, name -> source or fields as in a recipe, to a merged folder, and write its model card anew.

    `options` are those of `merging_mmer.add`. Raises ValueError for what does not fit; the folder is untouched then.
    """
    return _imported("merging_mmer", "add")(folder, experts, finish=_write_card, **options)


def remove(folder: str | Path, experts: str | Collection[str], **options: Any) -> "MergeReport":
    """Take experts out of a merged folder, and write its model card anew.

    `options` are those of `merging_mmer.remove`. Raises ValueError for what does not fit, and leaves the folder then.
    """
    return _imported("merging_mmer", "remove")(folder, experts, finish=_write_card, **options)


def evaluate(folder: str | Path, tasks: str | Path, against: str | None = None, **options: Any) -> "Evaluation":
    """Ask the tasks of a YAML file of a merged folder, and put what was found into it and into its model card.

    `options` are those of `evaluation_mmer.evaluating.evaluate`. Raises ValueError for what cannot be asked.
    """
    asked = _imported("evaluation_mmer.evaluating", "evaluate")
    return asked(folder, tasks, against, finish=_write_card, **options)


def push(folder: str | Path, repo_id: str, **options: Any) -> "Published":
    """Check a merged folder, and make the repository `repo_id` of the Hub hold what it holds.

    `options` are those of `hub_cards.push_folder`. Raises ValueError for a folder that `verify` finds fault with;
    nothing is sent then.
    """
    result = _imported("merging_mmer.verification", "verify")(Path(folder).resolve(strict=True))
    if not result.ok:
        fault = result[result.failed[0]]
        found = f"{', '.join(result.failed)}: {fault.found}; expected {fault.expected}"
        raise ValueError(f"{folder} fails the checks {found}. Nothing was pushed; `mmer verify` tells more")
    return _imported("hub_cards", "push_folder")(folder, repo_id, **options)


def _write_card(folder: Path) -> Path:
    return _imported("hub_cards", "write_card")(folder)


app.callback()(own_process)


@contextmanager
def _plain_errors(*more: type[Exception]) -> Iterator[None]:
    """What a user can mend is one message on the screen, without a traceback; all else is a bug and shows one.

    more: kinds of errors that a user can mend, beside ValueError and OSError.
    """
    mended: tuple[type[Exception], ...] = (ValueError, OSError, *more)
    try:
        yield
    except mended as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


@app.command("merge")
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="recipe.yaml")],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    overwrite: Annotated[bool, typer.Option(help="replace what is in the folder")] = False,
    max_shard_size: Annotated[str, typer.Option(help="size of a weight file")] = "2GB",
    trust_remote_code: Annotated[bool, typer.Option(help="run an expert's own code")] = False,
    threads: Annotated[int | None, typer.Option(help="workers; as many as there are processors when absent")] = None,
    device: Annotated[str, typer.Option(help="where the arithmetic is done: cpu, cuda, cuda:1 …")] = "cpu",
    ray: Annotated[str | None, typer.Option(help="a Ray cluster that does the work: host:port, or auto")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what would be done, and write nothing")] = False,
):
    """Merge experts as a recipe says; prints densities, residuals and warnings."""
    settings: dict[str, Any] = {
        "max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code, "threads": threads,
    }  # fmt: skip
    with _plain_errors():
        if dry_run:
            for part in plan_lines(_imported("merging_mmer.merge", "plan")(recipe, **settings), out):
                console.print(part)
            return
        report = merge(recipe, out, overwrite=overwrite, device=device, ray=ray, **settings)
    _print_report(report, out)


def _print_report(report: "MergeReport", out: Path):
    console.print(densities(report))
    for note in report.notes:
        console.print(escape(note), highlight=False)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    console.print(f"{out} ({report.seconds:.0f} s)")


_FOLDER = typer.Argument(help="a merged folder")
_OUT = typer.Option(help="the folder to make; without it the new one takes the old one's place")
_BASE = typer.Option(help="where the base is now, if not where the folder's recipe says")


@app.command("add")
def add_command(
    folder: Annotated[str, _FOLDER],
    expert: Annotated[list[str] | None, typer.Option(help="NAME=SOURCE, or NAME with --lora; again for more")] = None,
    recipe: Annotated[Path | None, typer.Option(help="a YAML file with `experts:`, as in a recipe")] = None,
    lora: Annotated[str | None, typer.Option(help="its adapter")] = None,
    tower: Annotated[str | None, typer.Option(help="the checkpoint that its adapter belongs to")] = None,
    modality: Annotated[list[str] | None, typer.Option(help="what of it to take; again for more")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="how strict its mask is")] = None,
    weight: Annotated[float | None, typer.Option(help="its weight in the merged vector")] = None,
    density: Annotated[float | None, typer.Option(help="the share of it that is kept when trimming")] = None,
    remerge: Annotated[bool, typer.Option("--remerge", help="merge all originals anew; changes all experts")] = False,
    out: Annotated[Path | None, _OUT] = None,
    base: Annotated[str | None, _BASE] = None,
    max_shard_size: Annotated[str, typer.Option(help="size of a weight file")] = "2GB",
    trust_remote_code: Annotated[bool, typer.Option(help="run an expert's own code")] = False,
):
    """Add an expert to a merged folder; the other experts' routes do not change by one bit."""
    more = {"lora": lora, "tower": tower, "modality": modality, "lambda": lam, "weight": weight, "density": density}
    with _plain_errors():
        asked = asked_experts(expert or [], {key: value for key, value in more.items() if value not in (None, [])})
        experts = together(load_experts(recipe) if recipe else {}, asked)
        report = add(
            folder, experts, remerge=remerge, out=out, base=base, max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    _print_report(report, out or Path(folder))


@app.command("remove")
def remove_command(
    folder: Annotated[str, _FOLDER],
    expert: Annotated[list[str], typer.Option(help="its name; again for more")],
    remerge: Annotated[bool, typer.Option("--remerge", help="merge the other originals anew")] = False,
    out: Annotated[Path | None, _OUT] = None,
    base: Annotated[str | None, _BASE] = None,
    max_shard_size: Annotated[str, typer.Option(help="size of a weight file")] = "2GB",
    trust_remote_code: Annotated[bool, typer.Option(help="run an expert's own code")] = False,
):
    """Take an expert out of a merged folder; the other experts' routes do not change by one bit."""
    with _plain_errors():
        report = remove(
            folder, expert, remerge=remerge, out=out, base=base, max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    _print_report(report, out or Path(folder))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("mmer-demo"),
):
    """Merge five real experts on SmolLM2-135M-Instruct, and ask about a picture, a sound, a clip, a chair and text."""
    with collector_paused():
        from evaluation_mmer import demo as lab_demo
    with _plain_errors(lab_demo.LabError):
        lab_demo.run(out, lambda recipe, folder: merge(recipe, folder, overwrite=(folder / MARK).is_file()), console)


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[str, typer.Argument(help="a merged folder, here or on the Hub")],
    tasks: Annotated[Path, typer.Option(help="a YAML file of tasks")],
    against: Annotated[str | None, typer.Option(help="originals: ask the original experts and the base too")] = None,
    limit: Annotated[int | None, typer.Option(help="the first items of each task alone")] = None,
    batch_size: Annotated[int, typer.Option(help="items, or choices, in one forward")] = 8,
    route: Annotated[list[str] | None, typer.Option(help="in place of the tasks' own; again for more")] = None,
    output: Annotated[Path | None, typer.Option(help="the file to write, if not the folder's evaluation.json")] = None,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="ask anew what was answered before")] = False,
    recipe: Annotated[Path | None, typer.Option(help="a recipe that says where the originals are now")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="run the originals' own code")] = False,
):
    """Ask tasks of a merged folder, compare with the originals, and write scores into its model card."""
    with _plain_errors():
        console.print(evaluated(evaluate(**{**locals(), "route": route or ()})))


add_commands(app, console, _plain_errors, push)


@app.command("export")
def export_command(
    folder: Annotated[str, _FOLDER],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    route: Annotated[str, typer.Option(help="base, merged, or an expert's name")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as stored when absent")] = None,
    max_shard_size: Annotated[str, typer.Option(help="size of a weight file")] = "2GB",
    overwrite: Annotated[bool, typer.Option(help="replace what is in the folder")] = False,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="an expert's language model without its tower")] = False,
):
    """Write one route of a merged folder as a stock checkpoint, which needs no code of ours."""
    with _plain_errors():
        made = _imported("merging_mmer.exporting", "export_route")(
            folder, route, out, dtype, max_shard_size, overwrite, llm_only
        )
    console.print(escape(str(made)), highlight=False)


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="a checkpoint, adapter or merged folder, here or on the Hub")],
    base: Annotated[str | None, typer.Option(help="the LLM that it is to fit")] = None,
    tower: Annotated[str | None, typer.Option(help="the checkpoint that an adapter belongs to")] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(help="SOURCE, or MODALITY=SOURCE, where a checkpoint only names its encoder")
    ] = None,
    lora_key: Annotated[str | None, typer.Option(help="which of several LoRAs (ModelCompose) is the expert's")] = None,
    every: Annotated[bool, typer.Option("--every", help="compare every tensor, not some")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="run the checkpoint's own code")] = False,
):
    """Show what of a checkpoint is language model, tower and vocabulary, and whether it fits a base."""
    with _plain_errors():
        found = _imported("merging_mmer.inspection", "inspect")(
            source, base, tower, every, trust_remote_code, encoders(encoder), lora_key
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        for part in inspected(found):
            console.print(part, highlight=False)
    if not found.ok:
        raise typer.Exit(1)


@app.command("verify")
def verify_command(
    folder: Annotated[str, typer.Argument(help="a merged folder, here or on the Hub")],
    base: Annotated[str | None, typer.Option(help="the base, where the recipe's is not at hand")] = None,
    originals: Annotated[bool, typer.Option("--originals", help="compare with the original experts too")] = False,
    recipe: Annotated[Path | None, typer.Option(help="a recipe that says where the originals are now")] = None,
    load: Annotated[bool, typer.Option("--load", help="load the model and ask it what the base is asked")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="run the originals' own code")] = False,
):
    """Check that a merged folder is whole, sound, and made of the base and experts it names."""
    with _plain_errors():
        shown = None if as_json else _print_check
        result = _imported("merging_mmer.verification", "verify")(
            folder, recipe or originals, base, load, trust_remote_code, on_check=shown
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    elif result.failed:
        console.print(f"[red]failed:[/red] {', '.join(result.failed)}")
    if not result.ok:
        raise typer.Exit(1)


def _print_check(check: "Check"):
    color = {"passed": "green", "failed": "red", "warning": "yellow"}.get(check.status, "dim")
    expected = f" (expected {escape(check.expected)})" if check.expected else ""
    console.print(
        f"[{color}]{check.status:<8}[/{color}] {check.name:<13} {escape(check.found)}{expected}", highlight=False
    )


if __name__ == "__main__":
    app()
