"""`mmer serve`: the page of `space/`, for a merged folder here or on the Hub.

Enters: a folder or an id of the Hub. Leaves: a server, until it is stopped. Invariant: without `trust_remote_code` it
is the installed code that runs, and none of the folder's own.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configuration_mmer.configuration_mmer import MMERConfig
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from processing_mmer.processing_mmer import MMERProcessor

from .card import is_hub_id


def serve(
    model: str,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Raises ValueError where gradio is missing, and for what is no merged model; OSError for a port that is taken."""
    if find_spec("gradio") is None:
        raise ValueError("`mmer serve` needs gradio, which is not installed: pip install 'mmer[space]'")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"found --revision {revision}, but {folder} is a folder here: a revision is of the Hub")
        _check(folder)
        model = str(folder)
    elif not is_hub_id(model):
        raise ValueError(f"found {model!r}, expected a merged folder, or org/name on the Hub")
    from .space.chat_page import starting

    classes: dict[str, Any] = {}
    if not trust_remote_code:
        classes = {
            "model_class": MMERForConditionalGeneration, "processor_class": MMERProcessor, "trust_remote_code": False,
        }  # fmt: skip
    starting.serve(model, revision, host, port, device, dtype, **classes)


def _check(folder: Path) -> None:
    config = folder / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if found != MMERConfig.model_type:
        what = f"a model of type {found!r}" if config.is_file() else "no config.json"
        raise ValueError(f"{folder}: found {what}, expected a folder that `mmer merge` made")
