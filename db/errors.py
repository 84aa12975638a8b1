"""What the catalog raises.

::

    CatalogError              the database did not do what was asked
    └── CatalogVersionError   the database was written by a newer onnx-ferry

`CatalogError.transient` tells "try again" from the rest.
"""

from __future__ import annotations

__all__ = ["CatalogError", "CatalogVersionError"]


class CatalogError(Exception):
    """The catalog cannot be read or written; one readable paragraph as its message, without a password."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        """What was asked, what was found, what to do; one paragraph."""
        self.transient = transient
        """Whether the same call may succeed later: the database was locked, full of connections or away."""

    def __str__(self) -> str:
        return self.message


class CatalogVersionError(CatalogError):
    """The catalog has a schema that this version of onnx-ferry does not know."""
