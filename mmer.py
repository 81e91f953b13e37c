"""mmer: the command line, and the public names (`from mmer import merge, Recipe, …`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from configuration_mmer import MMERConfig
from evaluation_mmer import demo as lab_demo
from hub_cards import write_card
from merging_mmer import MergeReport, Recipe
from merging_mmer import merge as merge_folder
from modeling_mmer import MMERForConditionalGeneration
from processing_mmer import MMERProcessor

__version__ = version("mmer")
__all__ = [
    "MMERConfig",
    "MMERForConditionalGeneration",
    "MMERProcessor",
    "MergeReport",
    "Recipe",
    "merge",
    "write_card",
]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="One model from several multimodal LLMs of one base."
)
console = Console()
MARK = "merge_report.json"  # a folder that holds it was made by a merge, and may be replaced by the next one


def merge(recipe: Recipe | dict[str, Any] | str | Path, out: str | Path, **options: Any) -> MergeReport:
    """Merge `recipe` (a Recipe, its fields as a mapping, or a YAML file) into the folder `out`, with its model card.

    `options` are those of `merging_mmer.merge`. Raises ValueError for what does not fit; nothing is left behind then.
    """
    if isinstance(recipe, dict):
        recipe = Recipe.from_dict(recipe)
    return merge_folder(recipe, out, finish=write_card, **options)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user can mend is one message on the screen, without a traceback; all else is a bug and shows one."""
    try:
        yield
    except (ValueError, OSError, lab_demo.LabError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


@app.command("merge")
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="recipe.yaml")],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    overwrite: Annotated[bool, typer.Option(help="replace what is in the folder")] = False,
    max_shard_size: Annotated[str, typer.Option(help="size of a weight file")] = "2GB",
    trust_remote_code: Annotated[bool, typer.Option(help="run an expert's own code")] = False,
):
    """Merge experts as a recipe says; prints densities, residuals and warnings."""
    with _plain_errors():
        report = merge(
            recipe, out, overwrite=overwrite, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code
        )
    console.print(lab_demo.densities(report))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    console.print(f"{out} ({report.seconds:.0f} s)")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("mmer-demo"),
):
    """Merge two real experts on SmolLM2-135M-Instruct, and ask about a picture, a sound, both, and plain text."""
    with _plain_errors():
        lab_demo.run(out, lambda recipe, folder: merge(recipe, folder, overwrite=(folder / MARK).is_file()), console)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="a merged folder")], repo: Annotated[str | None, typer.Option()] = None
):
    """Write the model card of a merged folder anew."""
    with _plain_errors():
        console.print(write_card(folder, repo))


if __name__ == "__main__":
    app()
