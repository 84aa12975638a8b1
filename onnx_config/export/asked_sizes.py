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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = ["asked_of_sizes"]

_MODELS = "transformers.models."
_QUESTIONS = {"__eq__": False, "__ne__": True, "__gt__": True, "__le__": False}
"""Question about a size and a number -> the answer if the size is larger."""


@contextmanager
def asked_of_sizes() -> Iterator[list[torch.SymInt]]:
    """Note, until the exit, the sizes that code of a model compares with one, and answer it what torch would not.

    A symbol that is noted may get another name yet.
    """
    found: list[torch.SymInt] = []
    with ExitStack() as stack:
        for name, larger in _QUESTIONS.items():
            stack.enter_context(patch.object(torch.SymInt, name, _heard(getattr(torch.SymInt, name), larger, found)))
        yield found


def _heard(original: Any, larger: bool, found: list[torch.SymInt]) -> Any:
    def compare(size: torch.SymInt, other: Any) -> Any:
        # True and the number one are equal, and nobody compares a size with the former.
        if type(other) is int and other in (0, 1) and _is_of_a_model(sys._getframe(1).f_globals):
            if other == 1:
                found.append(size)
            elif free_unbacked_symbols(size):
                return larger
        return original(size, other)

    return compare


def _is_of_a_model(code: Mapping[str, Any]) -> bool:
    return str(code.get("__name__", "")).startswith(_MODELS)
