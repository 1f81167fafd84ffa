"""Promises: one question to the Hub, at most; a wrong name is an error, and any failure to connect is not."""

from __future__ import annotations

from typing import ClassVar

import pytest
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from loralloc.errors import UserError
from loralloc.tasks import hub


class FakeApi:
    """Stands for `HfApi`: counts its calls and raises what it is told to."""

    token: str | bool | None = None
    error: Exception | None = None
    calls: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, token: str | bool | None) -> None:
        type(self).token = token

    def repo_info(self, name: str, *, repo_type: str, timeout: float) -> None:
        assert timeout <= 10
        self.calls.append((name, repo_type))
        if self.error is not None:
            raise self.error


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "error", None)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    return FakeApi


def test_the_hub_is_asked_once(api: type[FakeApi]) -> None:
    assert hub.is_reachable("owner/name", "dataset")
    assert api.calls == [("owner/name", "dataset")]
    assert api.token is None
    hub.is_reachable("owner/name", "model", "hf_own")
    assert api.token == "hf_own"


def test_the_hub_is_not_asked_offline(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    assert not hub.is_reachable("owner/name", "model")
    assert api.calls == []


@pytest.mark.parametrize("error", [OSError("no route to host"), TimeoutError(), RuntimeError("proxy")])
def test_no_connection_is_not_an_error(api: type[FakeApi], error: Exception) -> None:
    api.error = error
    assert not hub.is_reachable("owner/name", "model")


def test_a_name_that_the_hub_does_not_know(api: type[FakeApi]) -> None:
    # Built without its HTTP response, which is all that its constructor is for.
    api.error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    message = 'The Hub has no model "owner/name" that you may read. Check the spelling; .* run `hf auth login` first'
    with pytest.raises(UserError, match=message):
        hub.is_reachable("owner/name", "model")


def test_a_name_that_cannot_be_one(api: type[FakeApi]) -> None:
    api.error = HFValidationError("bad name")
    with pytest.raises(UserError, match='"a b" is neither a path on this machine nor the name of a dataset'):
        hub.is_reachable("a b", "dataset")


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        (True, "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it"),
        (False, "The Hub cannot be reached: connect"),
    ],
)
def test_the_cure_depends_on_the_cause(monkeypatch: pytest.MonkeyPatch, offline: bool, message: str) -> None:
    monkeypatch.setattr(hub, "is_offline_mode", lambda: offline)
    assert hub.out_of_reach().startswith(message)
