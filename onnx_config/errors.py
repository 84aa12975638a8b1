"""Every error that a conversion can end in.

::

    FerryError
    ├── InputError        your input: fix the call, the manifest or the folder
    │     bad_input, not_found
    ├── TransientError    try again: the world outside was not there
    │     network, store, catalog
    ├── ModelError        this model cannot, with these versions
    │     unsupported, export_failed, runtime_failed, mismatch
    ├── ResourceError     this machine could not, or the process died
    │     out_of_memory, timeout, crashed
    └── InternalError     our bug
          internal

The kind decides what happens next: whether a step is retried, whether a later batch tries again.
A message says what was asked, what was found and what to do.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "ErrorKind",
    "FerryError",
    "InputError",
    "InternalError",
    "ModelError",
    "ResourceError",
    "TransientError",
    "error_of_kind",
]


class ErrorKind(StrEnum):
    """The closed set of reasons why a model is not converted."""

    BAD_INPUT = "bad_input"
    NOT_FOUND = "not_found"
    NETWORK = "network"
    UNSUPPORTED = "unsupported"
    EXPORT_FAILED = "export_failed"
    RUNTIME_FAILED = "runtime_failed"
    MISMATCH = "mismatch"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    STORE = "store"
    CATALOG = "catalog"
    INTERNAL = "internal"

    @property
    def transient(self) -> bool:
        """Whether the same step is tried again at once, since the cause lies outside the model."""
        return self in (ErrorKind.NETWORK, ErrorKind.STORE, ErrorKind.CATALOG)

    @property
    def retried_alone(self) -> bool:
        """Whether the model gets one more try with no other model running beside it."""
        return self in (ErrorKind.OUT_OF_MEMORY, ErrorKind.TIMEOUT)

    @property
    def remembered(self) -> bool:
        """Whether the same model, options and versions would fail the same way again.

        A batch reports such a failure again instead of repeating the work.
        """
        return self in (
            ErrorKind.BAD_INPUT,
            ErrorKind.UNSUPPORTED,
            ErrorKind.EXPORT_FAILED,
            ErrorKind.RUNTIME_FAILED,
            ErrorKind.MISMATCH,
        )


class FerryError(Exception):
    """A conversion error with its kind; one readable paragraph as its message."""

    kinds: tuple[ErrorKind, ...] = tuple(ErrorKind)

    def __init__(self, message: str, *, kind: ErrorKind | None = None) -> None:
        if kind is None:
            kind = self.kinds[0]
        if kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} has kinds {[k.value for k in self.kinds]}, not {kind.value!r}")
        super().__init__(message)
        self.kind = kind
        """What happens next: see `ErrorKind`."""
        self.message = " ".join(message.split())
        """What was asked, what was found, what to do; one paragraph."""

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, tuple[str, ErrorKind]]:
        return _rebuild, (self.message, self.kind)


class InputError(FerryError):
    """What was asked for cannot be read, or is not there."""

    kinds = (ErrorKind.BAD_INPUT, ErrorKind.NOT_FOUND)


class TransientError(FerryError):
    """Network, store or catalog did not answer; the same call may succeed later."""

    kinds = (ErrorKind.NETWORK, ErrorKind.STORE, ErrorKind.CATALOG)


class ModelError(FerryError):
    """This model cannot be converted with the versions installed."""

    kinds = (ErrorKind.UNSUPPORTED, ErrorKind.EXPORT_FAILED, ErrorKind.RUNTIME_FAILED, ErrorKind.MISMATCH)


class ResourceError(FerryError):
    """The process ran out of memory or time, or died."""

    kinds = (ErrorKind.OUT_OF_MEMORY, ErrorKind.TIMEOUT, ErrorKind.CRASHED)


class InternalError(FerryError):
    """A bug of onnx-ferry itself."""

    kinds = (ErrorKind.INTERNAL,)


_CLASSES: tuple[type[FerryError], ...] = (InputError, TransientError, ModelError, ResourceError, InternalError)


def error_of_kind(kind: ErrorKind, message: str) -> FerryError:
    """Return the error of the class that ``kind`` belongs to.

    >>> type(error_of_kind(ErrorKind.TIMEOUT, "export took longer than 3600 s")).__name__
    'ResourceError'
    """
    for cls in _CLASSES:
        if kind in cls.kinds:
            return cls(message, kind=kind)
    raise ValueError(f"no error class has kind {kind!r}")


def _rebuild(message: str, kind: ErrorKind) -> FerryError:
    return error_of_kind(kind, message)
