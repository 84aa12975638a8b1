"""Which sizes a model's own code compares with one while it is traced.

torch takes it for granted that a size which varies is two or more, so that it answers such a question without asking
back, and what the trace says of its sizes does not show that there was another way to go. Whoever asks is looked at:
torch's operators compare sizes with one all the time, and mean no more by it than that one row can be repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["compared_with_one"]

_MODELS = "transformers.models."
_QUESTIONS = ("__eq__", "__ne__", "__gt__", "__le__")


@contextmanager
def compared_with_one() -> Iterator[list[torch.SymInt]]:
    """Note, until the exit, the sizes that code of a model compares with one; a symbol may get another name yet."""
    found: list[torch.SymInt] = []
    with ExitStack() as stack:
        for name in _QUESTIONS:
            stack.enter_context(patch.object(torch.SymInt, name, _noting(getattr(torch.SymInt, name), found)))
        yield found


def _noting(original: Any, found: list[torch.SymInt]) -> Any:
    def compare(size: torch.SymInt, other: Any) -> Any:
        # True and the number one are equal, and nobody compares a size with the former.
        if type(other) is int and other == 1 and sys._getframe(1).f_globals.get("__name__", "").startswith(_MODELS):
            found.append(size)
        return original(size, other)

    return compare
