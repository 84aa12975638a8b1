"""A Prefect server that is asked and told, rather than run flows on: for deployments and their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from flows.prefect_environment import quiet_prefect
from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError
from tasks.retry import is_transient, patience_with

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

__all__ = ["connected", "until_answered"]

Answer = TypeVar("Answer")

_ANSWER_SECONDS = 20.0
_QUOTED_CHARACTERS = 300


@contextmanager
def connected(command: str) -> Iterator[SyncPrefectClient]:
    """Yield a client of the server that ``PREFECT_API_URL`` or Prefect's profile names.

    Args:
        command: Who asks, for messages.

    Raises:
        InputError: If no server is named, or it refuses what it is told (``bad_input``).
        TransientError: If it does not answer (``network``).
    """
    quiet_prefect()
    from prefect import get_client
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_API_URL, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        raise InputError(
            f"{command} needs a Prefect server, and none is named: PREFECT_API_URL is not set. Start one with "
            "`prefect server start`, type `export PREFECT_API_URL=http://127.0.0.1:4200/api` (or log in to Prefect "
            f"Cloud with `prefect cloud login`), and run {command} again."
        )
    with temporary_settings({PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS}), get_client(sync_client=True) as client:
        if (silence := client.api_healthcheck()) is not None:
            raise TransientError(
                f"{command} needs a Prefect server, and the one at {url} does not answer ({_said(silence)}). Start it "
                "with `prefect server start`, or set PREFECT_API_URL to one that runs, such as "
                f"http://127.0.0.1:4200/api, and run {command} again.",
                kind=ErrorKind.NETWORK,
            ) from silence
        # It is there, so it is waited for should it be silent later.
        patience_with(url).call(lambda: None, passes=is_transient)
        with _server_errors(url, command):
            yield client


def until_answered(client: SyncPrefectClient, command: str, ask: Callable[[], Answer]) -> Answer:
    """Return what ``ask`` returns, called again while the server is silent or too busy to answer, for about a minute.

    What it tells the server must be the same told twice as told once. ``command`` is who asks.

    Raises:
        InputError: If the server refuses it (``bad_input``).
        TransientError: If it does not answer (``network``).
    """
    url = str(client.api_url)

    def once() -> Answer:
        with _server_errors(url, command):
            return ask()

    return patience_with(url).call(once, passes=is_transient)


@contextmanager
def _server_errors(url: str, command: str) -> Iterator[None]:
    from httpx import HTTPError, HTTPStatusError

    try:
        yield
    except FerryError:
        raise
    except HTTPStatusError as error:
        if error.response.is_client_error:
            raise InputError(
                f"The Prefect server at {url} refuses what {command} told it: HTTP {error.response.status_code}: "
                f"{error.response.text[:_QUOTED_CHARACTERS]}. Compare its version with the one installed here."
            ) from error
        raise _away(url, error) from error
    except HTTPError as error:
        raise _away(url, error) from error


def _away(url: str, error: Exception) -> TransientError:
    return TransientError(
        f"The Prefect server at {url} went away: {_said(error)}. What it was told until then it keeps; run again.",
        kind=ErrorKind.NETWORK,
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:_QUOTED_CHARACTERS]}"
