"""What a model's own code asks of sizes while it is traced: whether one is one, and whether anything was picked.

torch takes it for granted that a size which varies is two or more, so that it answers such a question without asking
back, and what the trace says of its sizes does not show that there was another way to go. Whoever asks is looked at:
torch's operators compare sizes with one all the time, and mean no more by it than that one row can be repeated.

How many tokens were picked for an expert, say, nobody knows while a graph is made, and torch refuses to say whether
there were any. Models ask that to spare themselves work: what is made of none is nothing in a graph as well. So the
answer is that there were some; that it makes no difference is for the comparison to show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = ["compared_with_one", "something_picked"]

_MODELS = "transformers.models."
_QUESTIONS = ("__eq__", "__ne__", "__gt__", "__le__")
_OF_NONE = {"__eq__": False, "__ne__": True, "__gt__": True, "__le__": False}
"""Question about a number and zero -> the answer of a number that is more."""


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
        if type(other) is int and other == 1 and _asks_a_model():
            found.append(size)
        return original(size, other)

    return compare


@contextmanager
def something_picked() -> Iterator[None]:
    """Have code of a model hear, until the exit, that a number of things that nobody knows is not none."""
    with ExitStack() as stack:
        for name, answer in _OF_NONE.items():
            stack.enter_context(patch.object(torch.SymInt, name, _some(getattr(torch.SymInt, name), answer)))
        yield


def _some(original: Any, answer: bool) -> Any:
    def compare(size: torch.SymInt, other: Any) -> Any:
        if type(other) is int and other == 0 and _asks_a_model() and free_unbacked_symbols(size):
            return answer
        return original(size, other)

    return compare


def _asks_a_model() -> bool:
    """Return whether what called the function that called this one is code of a model."""
    return bool(sys._getframe(2).f_globals.get("__name__", "").startswith(_MODELS))
