"""A Prefect server that is too busy to answer, or gone for a while, is asked again; what it refuses is not."""

from __future__ import annotations

import httpx
import pytest

from flows.prefect_connection import until_answered
from onnx_config.errors import ErrorKind, FerryError
from tasks import retry


class Client:
    """As much of one as is looked at."""

    def __init__(self, name: str) -> None:
        self.api_url = f"http://{name}/api"


class Server:
    """Answers so in turn: a status, or that there is nobody; at the end, well."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if not self.answers:
            return "done"
        status = self.answers.pop(0)
        request = httpx.Request("POST", "http://server/api/deployments/")
        if status is None:
            raise httpx.ConnectError("refused", request=request)
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, text="busy"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(retry, "FIRST_PATIENCE_SECONDS", 0.5)


def ask(server: Server, name: str) -> str:
    return until_answered(Client(name), "ferry deploy", server)  # type: ignore[arg-type]  # as much as is looked at


@pytest.mark.parametrize(
    "answers",
    [pytest.param([], id="well"), pytest.param([503, 503], id="busy"), pytest.param([None, 500, None], id="restarted")],
)
def test_a_server_that_comes_back_is_told_again(answers: list[int | None], request: pytest.FixtureRequest) -> None:
    server = Server(*answers)
    assert ask(server, request.node.name) == "done"
    assert server.calls == len(answers) + 1


@pytest.mark.parametrize(
    ("answers", "kind", "words", "calls"),
    [
        pytest.param([422] * 99, ErrorKind.BAD_INPUT, "refuses what ferry deploy told it: HTTP 422: busy", 1, id="no"),
        pytest.param([None] * 99, ErrorKind.NETWORK, "went away: ConnectError: refused", None, id="gone"),
    ],
)
def test_what_does_not_pass_is_said(
    answers: list[int | None], kind: ErrorKind, words: str, calls: int | None, request: pytest.FixtureRequest
) -> None:
    server = Server(*answers)
    with pytest.raises(FerryError, match=words) as caught:
        ask(server, request.node.name)
    assert caught.value.kind is kind
    assert server.calls == calls or (calls is None and server.calls > 1)
