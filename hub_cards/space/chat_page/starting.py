"""From a command line, or the Space's own space.json, to a page that answers.

Enters: a folder or an id of the Hub with a revision. Leaves: a server, until it is stopped. Invariant: a model of the
Hub is loaded at one revision, code and weights; in a Space that is the commit that space.json names.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTINGS = Path(__file__).parent.parent / "space.json"


def start(arguments: Sequence[str] | None = None) -> None:
    """`python app.py`, with what space.json says, or `python app.py MODEL --revision …`."""
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    known = argparse.ArgumentParser(description="Chat with a merged model; its own code is run.")
    known.add_argument("model", nargs="?", default=settings["model"], help="a folder, or an id of the Hub")
    known.add_argument("--revision", help="a commit, branch or tag of the Hub")
    known.add_argument("--host")
    known.add_argument("--port", type=int)
    known.add_argument("--device", default="auto")
    known.add_argument("--dtype", default="auto")
    given = known.parse_args(arguments)
    if given.model is None:
        known.error(f"no model: give a folder or an id of the Hub, or write one into {SETTINGS.name}")
    if given.model == settings["model"] and given.revision is None:
        given.revision = settings["revision"]
    serve(given.model, given.revision, given.host, given.port, given.device, given.dtype)


def serve(
    model: str,
    revision: str | None = None,
    host: str | None = None,
    port: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **classes: Any,
) -> None:
    """host, port: gradio's own, 127.0.0.1 and the first free one from 7860 on, where they are None. classes: as `load`
    takes them; without, the model's own code is run."""
    from .mask_shares import counted, reported, stored_report
    from .merged_model import load
    from .page import CSS, build, theme

    merged = load(model, revision, device, dtype, **classes)
    merged.name = Path(model).resolve().name if Path(model).is_dir() else model
    report = stored_report(model, revision)
    page = build(merged, counted(merged.model) if report is None else reported(report))
    page.queue().launch(
        server_name=host, server_port=port, theme=theme(), css=CSS, max_file_size="200mb", footer_links=[],
        ssr_mode=False, show_error=False,
    )  # fmt: skip
