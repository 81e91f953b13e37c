"""A merged folder, sent to the Hub.

Enters: a merged folder that has been checked, the id of a repository. Leaves: one commit that makes the repository
what the folder is, and `Published`. Invariants: nothing goes up that is no part of a model's repository; what the
repository holds and a push has written before goes when the folder has it no more; a folder that is there already
makes no commit; the token is read where huggingface_hub reads it, and written nowhere.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .card import CARD, is_generated, is_hub_id, read_folder, write_card_with
from .licenses import of_fields
from .licensing import FILE as LICENSES
from .licensing import Licensing, read_licensing, sources_of, write_licensing
from .plots import can_draw
from .results import FILE as RESULTS

# what a merge, an evaluation and a card write: it goes from the repository when the folder has it no more
_WRITTEN = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "*_mmer.py", "merge_recipe.yaml", "merge_report.json",
    "plots/*.png", RESULTS, LICENSES,
)  # fmt: skip
# what people put beside it; it goes up, and what the repository has of it stays
_BESIDE = (
    CARD, "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "CITATION*", "assets/*.png", "assets/*.jpg",
    ".gitattributes",
)  # fmt: skip
# seconds before each further try, where the Hub or the way to it fails
WAITS = (2.0, 8.0)
_PASSING = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """`changed`: a commit was made; `left_out`: files of the folder that did not go up."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    pull_request: str | None = None
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    large: bool = False,
    token: str | None = None,
) -> Published:
    """Make the repository `repo_id` hold what a merged folder holds, in one commit; the folder is taken as sound.

    A card that `write_card` wrote is written anew before, with the repository's name in its snippets and with plots
    where matplotlib is installed; one that was edited by hand goes up as it is. private: of a repository that is not
    there yet. revision: a branch, made when it is not there. create_pr: as a pull request. license: the id to name,
    also where the licences of base and experts do not go together. large: by huggingface_hub's upload of large
    folders, which goes on where it was cut off and may make several commits. token: huggingface_hub's own when absent.

    Raises ValueError for licences that clash, and for what the Hub refuses; OSError where it cannot be reached.
    """
    folder = Path(folder).expanduser()
    _, recipe, _ = read_folder(folder)
    check_name(repo_id)
    if create_pr and revision is not None:
        raise ValueError("found create_pr and a revision: a pull request goes against main. Give one of them")
    licensing = _settled(folder, recipe, license)
    notes = _made_ready(folder, repo_id, licensing)
    named = [source for source in sources_of(recipe).values() if not is_hub_id(source)]
    if named:
        notes.append(f"merge_recipe.yaml names {len(named)} folders of this machine, such as {named[0]}")
    files, left_out = repository_files(folder)
    api = HfApi(token=token)
    with PlainRefusals(repo_id):
        name = tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/pr/"):
            tried(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        before = tried(lambda: api.repo_info(name, revision=revision).sha)
        message = message or f"Upload {folder.resolve().name}"
        send = _send_large if large else _send
        where = {"revision": revision, "create_pr": create_pr, "commit_message": message}
        # a pull request that was opened, and whose answer was lost, must not be opened twice
        made: Any = send(api, name, folder, files, where) if create_pr else tried(
            lambda: send(api, name, folder, files, where)
        )  # fmt: skip
        after: Any = getattr(made, "oid", None) or tried(lambda: api.repo_info(name, revision=revision).sha)
    return Published(
        name, str(getattr(made, "commit_url", f"{api.endpoint}/{name}")), after, after != before,
        getattr(made, "pr_url", None), files, left_out, notes,
    )  # fmt: skip


def check_name(repo_id: str) -> None:
    if re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id) is None:
        raise ValueError(f"found the repository {repo_id!r}, expected name or org/name")


def repository_files(folder: Path) -> tuple[list[str], list[str]]:
    """(what goes up, what is left out) of a folder, relative and sorted; what is left out by its first part."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    kept = sorted(path for path in there if _matches(path, (*_WRITTEN, *_BESIDE)))
    out = {path.split("/")[0] + ("/" if "/" in path else "") for path in there - set(kept)}
    return kept, sorted(out)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    # fnmatch's star takes slashes too
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in patterns)


# licences and card


def _settled(folder: Path, recipe: dict[str, Any], license: str | None) -> Licensing:
    licensing = read_licensing(folder, recipe, license)
    if licensing.clashes and licensing.chosen is None:
        raise ValueError(
            f"{'; '.join(licensing.clashes)}. Ask whoever owns them, and name the license that you may give with "
            "--license; this is no legal advice"
        )
    return licensing


def _made_ready(folder: Path, repo_id: str, licensing: Licensing) -> list[str]:
    """Write the card anew, unless it is somebody's own. Raises ValueError where that names another license."""
    card = folder / CARD
    if not card.is_file() or is_generated(card):
        drawn = can_draw()
        write_card_with(folder, repo_id, licensing, drawn)
        return [] if drawn else ["matplotlib is not installed: the card has no plots"]
    write_licensing(folder, licensing)
    said = of_fields(ModelCard(card.read_text(encoding="utf-8")).data.to_dict()).id
    if licensing.chosen is not None and said != licensing.chosen:
        raise ValueError(
            f"{card} was edited by hand and names the license {said!r}, found --license {licensing.chosen!r}: set it "
            "in its first lines, or have `mmer card` write it anew"
        )
    return [f"{CARD} was edited by hand, and goes up as it is; `mmer card` writes it anew"]


# the upload


def _send(api: HfApi, name: str, folder: Path, files: list[str], where: dict[str, Any]) -> Any:
    operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in files]
    operations += [CommitOperationDelete(path) for path in _gone(api, name, files, where["revision"])]
    return api.create_commit(name, operations, **where)


def _send_large(api: HfApi, name: str, folder: Path, files: list[str], where: dict[str, Any]) -> Any:
    gone, revision = _gone(api, name, files, where["revision"]), where["revision"]
    whole: Any = api
    if not hasattr(api, "upload_large_folder"):
        # huggingface_hub 2: its one upload of folders goes on where it was, and cuts what is large into commits
        return whole.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, delete_patterns=gone or None, **where
        )  # fmt: skip
    if where["create_pr"]:
        raise ValueError("found large and create_pr, which the installed huggingface_hub cannot do together")
    whole.upload_large_folder(name, folder, repo_type="model", revision=revision, allow_patterns=files)
    return api.create_commit(name, [CommitOperationDelete(path) for path in gone], **where) if gone else None


def _gone(api: HfApi, name: str, files: list[str], revision: str | None) -> list[str]:
    there = api.list_repo_files(name, revision=revision)
    return [path for path in there if path not in files and _matches(path, _WRITTEN)]


def tried(call: Callable[[], T]) -> T:
    """What `call` gives, tried again where the Hub or the way to it failed for the moment."""
    for wait in WAITS:
        try:
            return call()
        except (HTTPError, RuntimeError) as error:
            failed = _failed_request(error)
            if failed is None or (isinstance(failed, HfHubHTTPError) and failed.response.status_code not in _PASSING):
                raise
            time.sleep(wait)
    return call()


def _failed_request(error: BaseException | None) -> HTTPError | None:
    """The request that failed: huggingface_hub raises a RuntimeError from it where a file was being uploaded."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return next((one for one in (error, cause) if isinstance(one, HTTPError)), None)


class PlainRefusals:
    """What the Hub refuses, in one line that says what to do."""

    def __init__(self, repo_id: str):
        self.repo_id = repo_id

    def __enter__(self):
        return self

    def __exit__(self, kind: Any, raised: BaseException | None, trace: Any):
        error = _failed_request(raised)
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            said = " ".join((error.server_message or str(error)).split())[:300]
            raise ValueError(f"{self.repo_id}: the Hub answered {status} ({said}). {_advice(status)}") from error
        if isinstance(error, HTTPError):
            raise OSError(
                f"{self.repo_id}: the Hub cannot be reached, or the connection broke ({type(error).__name__}). What "
                "was uploaded is kept there for a while; push again, and only the rest is sent"
            ) from error


def _advice(status: int) -> str:
    if status in (401, 403):
        known = "the token that is set may not write there" if get_token() else "no token is set"
        return f"Here {known}: `hf auth login` with one that may write, or set HF_TOKEN"
    if status == 404:
        return "Look at the name and the revision, and whether the token may see the repository"
    if status == 409:
        return "Somebody else has changed it meanwhile: push again"
    if status in _PASSING:
        return "It was tried several times: push again later; only what is missing is sent"
    return "Push again when that is mended"
