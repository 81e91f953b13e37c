"""The Hub, read: what fails for the moment is tried again, and what is refused says what to do.

Enters: a call of huggingface_hub that reads, and the source as a recipe names it. Leaves: what the call gives.
Invariants: a refusal is one line that names the source; what huggingface_hub has fetched whole is not fetched again,
and of a file that broke off nothing stays that could be taken for the file.
"""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# seconds before each further try, where the Hub or the way to it fails
WAITS = (2.0, 8.0)
_PASSING = (408, 429, 500, 502, 503, 504)
# by name: the library that huggingface_hub makes its requests with is not the same in all its versions
_UNREACHED = ("ConnectError", "ProxyError", "UnsupportedProtocol")

T = TypeVar("T")


def from_hub(source: str, call: Callable[[], T]) -> T:
    """What `call` gives, for the `source` org/name, org/name@revision or org/name/file.

    Raises ValueError for what the Hub refuses, OSError where it fails or cannot be reached.
    """
    for wait in WAITS:
        try:
            return call()
        except (OSError, HTTPError) as error:
            if not _passes(error):
                raise _in_words(source, error) from error
        time.sleep(wait)
    try:
        return call()
    except (OSError, HTTPError) as error:
        raise _in_words(source, error) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from: huggingface_hub wraps what the Hub answered."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status(error: BaseException) -> int | None:
    """What the Hub answered, where it did."""
    return next((one.response.status_code for one in _causes(error) if isinstance(one, HfHubHTTPError)), None)


def _passes(error: BaseException) -> bool:
    """Whether another try may find it mended: a Hub that is busy, a connection that broke. Not one that never was."""
    status = _status(error)
    if status is not None:
        return status in _PASSING
    broke = [one for one in _causes(error) if isinstance(one, HTTPError)]
    return bool(broke) and type(broke[-1]).__name__ not in _UNREACHED


def _in_words(source: str, error: BaseException) -> Exception:
    status = _status(error)
    refused = status is not None and status not in _PASSING
    said = " ".join(str(error).split())[:300]
    found = f"the Hub answered {status}" if status is not None else said
    # the folder comes first: a name with one slash may be either
    message = f"{source!r} is no folder here, and cannot be fetched from the Hub: {found}. {_advice(source, error)}"
    return ValueError(message) if refused else OSError(message)


def _advice(source: str, error: BaseException) -> str:
    causes, status = list(_causes(error)), _status(error)
    name, _, revision = source.partition("@")
    known = "the token that is set may not see it" if get_token() else "no token is set"
    if any(isinstance(one, GatedRepoError) for one in causes):
        return f"It is gated: ask for access on its page, and log in with `hf auth login`; {known}"
    if any(isinstance(one, RevisionNotFoundError) for one in causes):
        return f"There is no revision {revision or 'main'!r} of {name}: give a branch, a tag or a commit that it has"
    if status in (401, 403) or any(isinstance(one, RepositoryNotFoundError) for one in causes):
        return f"There is no such repository, or {known}: look at the name, and log in with `hf auth login`"
    if status == 404:
        return "It does not hold that file: look at the name"
    if status == 429:
        return (
            "It was tried several times. Wait, then start again; who has logged in with `hf auth login` may ask more"
        )
    if status is not None:
        return "It was tried several times. Start again later: what was fetched whole is kept"
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return "HF_HUB_OFFLINE is set: unset it, or fetch it before"
    if any(isinstance(one, LocalEntryNotFoundError) for one in causes):
        return "Look at the connection, and start again: what was fetched whole is kept"
    if any(isinstance(one, HTTPError) for one in causes):
        return "The connection broke. Start again: what was fetched whole is kept"
    return "Start again when that is mended: what was fetched whole is kept"


__all__ = ["from_hub"]
