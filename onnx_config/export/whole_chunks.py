"""What fills a length up to whole chunks, said so that torch can reckon with it.

Models write it as the remainder of a remainder, ``(64 - length % 64) % 64``, or of a negative length, ``-length % 64``,
and to torch's algebra the sum of that and the length is then no multiple of 64: a text in chunks gets chunks of a size
that is a formula, and each question about it takes longer. As what lacks to the next multiple it is the same number,
and the sum is a multiple by its looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["reckoned_by_chunks"]


@contextmanager
def reckoned_by_chunks() -> Iterator[None]:
    """Have what lacks to a whole number of chunks be said so, until the exit."""
    original = torch.SymInt.__mod__
    divided: dict[tuple[Any, int], torch.SymInt] = {}

    def mod(number: torch.SymInt, chunk: Any) -> Any:
        if type(chunk) is int and chunk > 0 and number.node.expr.as_coeff_Mul()[0] == -1:
            length = -number
            return (length + (chunk - 1)) // chunk * chunk - length
        left = original(number, chunk)
        if type(chunk) is not int or chunk < 1 or not isinstance(left, torch.SymInt):
            return left
        lacking = chunk - number.node.expr
        if (length := divided.get((lacking, chunk))) is not None:
            return (length + (chunk - 1)) // chunk * chunk - length
        divided[left.node.expr, chunk] = number
        return left

    with patch.object(torch.SymInt, "__mod__", mod):
        yield
