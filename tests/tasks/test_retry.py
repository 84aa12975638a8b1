"""A server that is silent for a while is called again; one that is gone holds up a batch once."""

from __future__ import annotations

import time

import pytest

from tasks import retry
from tasks.retry import Patience, patience_with


class SilentError(Exception):
    pass


class Server:
    """Fails so many times; ``None``: always."""

    def __init__(self, failures: int | None) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.failures is None or self.calls <= self.failures:
            raise SilentError
        return "answer"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(retry, "FIRST_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.4)


def is_silent(error: Exception) -> bool:
    return isinstance(error, SilentError)


def test_a_server_that_comes_back_answers() -> None:
    server = Server(3)
    assert Patience().call(server, passes=is_silent) == "answer"
    assert server.calls == 4


def test_another_error_is_not_waited_for() -> None:
    server = Server(None)
    with pytest.raises(SilentError):
        Patience().call(server, passes=lambda _: False)
    assert server.calls == 1


def seconds_of(patience: Patience) -> float:
    started = time.monotonic()
    with pytest.raises(SilentError):
        patience.call(Server(None), passes=is_silent)
    return time.monotonic() - started


def test_one_that_has_answered_before_is_waited_for_longer() -> None:
    patience = Patience()
    assert seconds_of(patience) < 0.2
    patience.call(Server(0), passes=is_silent)
    assert 0.2 < seconds_of(patience) < 0.6


def test_one_that_is_gone_is_waited_for_once() -> None:
    patience = Patience()
    patience.call(Server(0), passes=is_silent)
    seconds_of(patience)
    assert seconds_of(patience) < 0.05


def test_each_server_has_its_own_silence() -> None:
    assert patience_with("one") is patience_with("one")
    assert patience_with("one") is not patience_with("two")
