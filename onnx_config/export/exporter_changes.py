"""What we have the exporter replace while it traces, beside what it replaces itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Change", "exporter_changes"]

Change = tuple[str, str, Callable[[Any], Any]]
"""Owner by its dotted name, attribute, and what makes the new function of the one before."""


@contextmanager
def exporter_changes(*changes: Change) -> Iterator[None]:
    """Have the exporter make these changes too, until the exit; they are put around those of its own."""
    from transformers.exporters import exporter_onnx  # noqa: F401  # makes its list of changes
    from transformers.exporters.utils import _PATCHES

    patches: list[Any] = _PATCHES["onnx"]
    patches.extend(changes)
    try:
        yield
    finally:
        for change in changes:
            patches.remove(change)
