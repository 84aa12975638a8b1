"""What ``huggingface_hub`` raises, as errors of ours."""

from __future__ import annotations

import errno

from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError

__all__ = ["HubErrors", "translate_hub_error"]


class HubErrors:
    """Translate what ``huggingface_hub`` raises."""

    def __init__(self, model_id: str, revision: str | None) -> None:
        self.model_id = model_id
        self.revision = revision

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error, Exception):
            raise translate_hub_error(error, self.model_id, self.revision) from error


def translate_hub_error(error: Exception, model_id: str, revision: str | None = None) -> FerryError:
    """Return the error of ours that says what the Hub, or the way to it, did not give."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # huggingface_hub's HTTP client is httpx or httpx2 by release; its errors' root stands above the Hub's own.
    client_errors = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    what = f"{model_id!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, FerryError):
        return error
    if isinstance(error, GatedRepoError):
        return InputError(
            f"The Hub has {what}, but it is gated. Accept its terms on the Hub and set HF_TOKEN.",
            kind=ErrorKind.NOT_FOUND,
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"The Hub has no {what}. Check the branch, tag or commit.", kind=ErrorKind.NOT_FOUND)
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"The Hub has no public model {what}. Check the spelling; for a private one set HF_TOKEN.",
            kind=ErrorKind.NOT_FOUND,
        )
    if isinstance(error, HFValidationError):
        return InputError(f"{model_id!r} is neither a folder nor a Hub id: {error}")
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        # The Hub did answer; that the file is not in the cache either is no news.
        return translate_hub_error(error.__cause__, model_id, revision)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return TransientError(
            f"{what} was to be read from the Hub, which could not be reached ({type(error).__name__}). "
            "Check the network and HF_HUB_OFFLINE, or give a local folder.",
            kind=ErrorKind.NETWORK,
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"The Hub's {what} lacks a file: {error}", kind=ErrorKind.NOT_FOUND)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return TransientError(
            f"The disk is full while downloading {what}. Free space and run again.", kind=ErrorKind.STORE
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status in {401, 403}:
            return InputError(f"The Hub refuses {what} (HTTP {status}). Set HF_TOKEN.", kind=ErrorKind.NOT_FOUND)
        if status == 404:
            return InputError(f"The Hub has no {what} (HTTP 404). Check the spelling.", kind=ErrorKind.NOT_FOUND)
        return TransientError(f"The Hub answered HTTP {status} for {what}. Run again later.", kind=ErrorKind.NETWORK)
    if isinstance(error, (*client_errors, OSError)):
        return TransientError(
            f"The Hub could not be reached for {what}: {type(error).__name__}: {error}. "
            "Check the network and run again.",
            kind=ErrorKind.NETWORK,
        )
    return TransientError(
        f"Reading {what} from the Hub failed: {type(error).__name__}: {error}. Run again later.",
        kind=ErrorKind.NETWORK,
    )
