"""A Space of the Hub with the chat page for a merged model: the folder `space/`, told which model it shows.

Enters: the id of a model on the Hub and the commit to show. Leaves: one commit to a Space, and `Published`.
Invariants: the Space stands alone, it needs nothing of ours but the model's repository; it shows one commit, not what
the model becomes later; what is there already makes no commit.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .card import CARD
from .publish import PlainRefusals, Published, check_name, tried

FOLDER = Path(__file__).parent / "space"
CODE = "chat_page"
SETTINGS = "space.json"
# a README that ends otherwise was edited by hand
_END = "<!-- written by `mmer push --space` -->\n"


def space_files(model: str, revision: str) -> dict[str, bytes]:
    """Path -> content of a Space that shows `model` at the commit `revision`."""
    code = [FOLDER / "app.py", FOLDER / "requirements.txt", *sorted((FOLDER / CODE).glob("*.py"))]
    settings = {"model": model, "revision": revision}
    card = (FOLDER / CARD).read_text(encoding="utf-8")
    card = card.replace('title: "MMER"', f'title: "{model.rpartition("/")[2]}"').replace("org/name", model)
    return {
        **{path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in code},
        SETTINGS: (json.dumps(settings, indent=2) + "\n").encode(),
        CARD: (card.rstrip() + "\n\n" + _END).encode(),
    }


def check_space(space: str | None, create_pr: bool) -> None:
    """Whether a push may make a Space too. Raises ValueError."""
    if space is not None:
        check_name(space)
    if create_pr:
        raise ValueError(
            "found --space and --create-pr: a Space shows what is in the repository. Push it after merging"
        )


def push_space(
    model: str,
    revision: str,
    space: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Published:
    """Make the Space `space`, "<model>-space" when absent, show the commit `revision` of `model`, in one commit.

    private: of a Space that is not there yet. A README.md that was edited by hand in the Space stays as it is.
    Raises ValueError for what the Hub refuses; OSError where it cannot be reached.
    """
    space = space or f"{model}-space"
    check_name(space)
    files, notes = space_files(model, revision), []
    api = HfApi(token=token)
    with PlainRefusals(space):
        made_repo = tried(
            lambda: api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        )
        name = made_repo.repo_id
        there = tried(lambda: api.list_repo_files(name, repo_type="space"))
        if SETTINGS in there and CARD in there and _by_hand(api, name):
            del files[CARD]
            notes.append(f"{CARD} of the Space was edited by hand, and stays as it is")
        if tried(lambda: api.repo_info(model)).private:
            notes.append("the model is private: give the Space a secret HF_TOKEN that may read it")
        before = tried(lambda: api.repo_info(name, repo_type="space").sha)
        gone = [path for path in there if path.startswith(f"{CODE}/") and path not in files]
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in gone]
        title = message or f"Show {model} at {revision[:12]}"
        made = tried(
            lambda: api.create_commit(name, operations, repo_type="space", commit_message=title, revision="main")
        )
    return Published(
        name, f"{api.endpoint}/spaces/{name}", made.oid, made.oid != before, None, sorted(files), [], notes
    )


def _by_hand(api: HfApi, name: str) -> bool:
    card = Path(tried(lambda: api.hf_hub_download(name, CARD, repo_type="space")))
    return not card.read_text(encoding="utf-8").endswith(_END)
