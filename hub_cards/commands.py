"""The commands that show a merged model to the world: `mmer card`, `mmer push`, `mmer serve`.

Enters: the command line's app, and what it does with errors and output. Leaves: the app with three commands more.
Invariant: nothing heavy is imported before a command runs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import hub_cards


def add_commands(
    app: typer.Typer,
    console: Console,
    plain_errors: Callable[[], AbstractContextManager[None]],
    push: Callable[..., Any],
) -> None:
    """push: checks a folder and sends it, as `mmer.push`."""

    @app.command()
    def card(
        folder: Annotated[Path, typer.Argument(help="a merged folder")],
        repo: Annotated[str | None, typer.Option(help="the id that its snippets load, if not the folder's")] = None,
        license: Annotated[str | None, typer.Option(help="the license to name, instead of the strictest")] = None,
        plots: Annotated[bool, typer.Option(help="draw them")] = True,
    ):
        """Write the model card of a merged folder anew, with its plots."""
        with plain_errors():
            console.print(hub_cards.write_card(folder, repo, license, plots))

    @app.command("push")
    def push_command(
        folder: Annotated[Path, typer.Argument(help="a merged folder")],
        repo: Annotated[str, typer.Argument(help="org/name")],
        private: Annotated[bool | None, typer.Option(help="what a new repository is to be")] = None,
        revision: Annotated[str | None, typer.Option(help="a branch; made when it is not there")] = None,
        create_pr: Annotated[bool, typer.Option("--create-pr", help="as a pull request")] = False,
        message: Annotated[str | None, typer.Option(help="of the commit")] = None,
        license: Annotated[str | None, typer.Option(help="the license to name, also where the inputs' clash")] = None,
        large: Annotated[bool, typer.Option("--large", help="in several commits, where it is very large")] = False,
        space: Annotated[bool, typer.Option("--space", help="and a Space with a chat page, org/name-space")] = False,
        space_repo: Annotated[str | None, typer.Option(help="the same, under this id: org/other")] = None,
    ):
        """Check a merged folder, write its card, and send it to the Hub in one commit."""
        wanted = space or space_repo is not None
        with plain_errors():
            if wanted:
                hub_cards.check_space(space_repo, create_pr)
            made = push(
                folder, repo, private=private, revision=revision, create_pr=create_pr, message=message,
                license=license, large=large,
            )  # fmt: skip
            _print(console, made)
            if wanted:
                _print(console, hub_cards.push_space(made.repo_id, made.commit, space_repo, private, message))

    @app.command("serve")
    def serve_command(
        model: Annotated[str, typer.Argument(help="a merged folder, here or on the Hub")],
        revision: Annotated[str | None, typer.Option(help="a commit, branch or tag of the Hub")] = None,
        host: Annotated[str, typer.Option(help="0.0.0.0: seen from other machines")] = "127.0.0.1",
        port: Annotated[int | None, typer.Option(help="the first free one from 7860 on when absent")] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
        dtype: Annotated[str, typer.Option(help="auto (float32 on cpu, else as stored), float32 …")] = "auto",
        trust_remote_code: Annotated[bool, typer.Option(help="run the folder's own code, not the installed")] = False,
    ):
        """Chat with a merged model on a web page: media, answers, and which parameters read which token."""
        with plain_errors():
            hub_cards.serve(model, revision, host, port, device, dtype, trust_remote_code)


def published_lines(made: Any) -> Iterator[str]:
    """What `mmer push` prints of a `Published`."""
    yield from map(escape, made.notes)
    if made.left_out:
        yield escape(f"not part of a repository, and left out: {', '.join(made.left_out)}")
    what = f"{len(made.files)} files" if made.changed or made.pull_request else "nothing has changed since"
    yield escape(f"{made.pull_request or made.url} ({what})")


def _print(console: Console, made: Any) -> None:
    for line in published_lines(made):
        console.print(line, highlight=False)
