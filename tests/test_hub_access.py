"""What is asked of the Hub again and what is not, by errors made up; test_hub_flow.py has the real ones."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from merging_mmer import hub_access


class ConnectError(HTTPError):
    """Named as the one that huggingface_hub's own library has."""


class RemoteProtocolError(HTTPError):
    """The same for a connection that broke."""


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind("what it said\nin two lines", response=SimpleNamespace(status_code=status, headers={}, request=None))


def wrapped(error: Exception) -> LocalEntryNotFoundError:
    """As snapshot_download wraps what it could not do."""
    outer = LocalEntryNotFoundError("cannot find it")
    outer.__cause__ = error
    return outer


@pytest.fixture
def waited(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(hub_access.time, "sleep", waits.append)
    return waits


def asked(*errors: Exception):
    """A call that raises these, one after the other, and then gives 7."""
    left = list(errors)

    def call() -> int:
        if left:
            raise left.pop(0)
        return 7

    return call


@pytest.mark.parametrize("error", [answered(503), answered(429), wrapped(answered(500)), RemoteProtocolError("cut")])
def test_what_passes_is_asked_again(waited, error):
    assert hub_access.from_hub("org/name", asked(error)) == 7 and waited == [2.0]
    assert hub_access.from_hub("org/name", asked(error, error)) == 7 and waited == [2.0, 2.0, 8.0]
    with pytest.raises(OSError, match="'org/name' is no folder here, and cannot be fetched from the Hub"):
        hub_access.from_hub("org/name", asked(error, error, error))
    assert waited == [2.0, 2.0, 8.0, 2.0, 8.0]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answered(404), ValueError, "answered 404. It does not hold that file"),
        (answered(403, GatedRepoError), ValueError, "answered 403. It is gated"),
        (wrapped(answered(401)), ValueError, "answered 401. There is no such repository, or "),
        (wrapped(ConnectError("nobody there")), OSError, "cannot find it. Look at the connection"),
        (wrapped(OfflineModeIsEnabled("off")), OSError, "HF_HUB_OFFLINE is set"),
        (OSError("disk full"), OSError, "disk full. Start again when that is mended"),
    ],
)
def test_what_does_not_pass_is_told_at_once(waited, error, kind, words):
    with pytest.raises(kind, match=words) as caught:
        hub_access.from_hub("org/name", asked(error))
    assert waited == [] and "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_other_errors_are_bugs_and_stay_what_they_are(waited):
    with pytest.raises(KeyError):
        hub_access.from_hub("org/name", asked(KeyError("x")))
    assert waited == []
