"""Notices, while a model is traced, that the graph would hold for a text of one chunk only.

A model that fills its text up to whole chunks and works through them counts the chunks by a division. Where the sample
makes one of them, torch takes for granted that there is one, as it does of every size of one: the graph would be right
up to the end of the first chunk. The question by which torch finds out tells how long a chunk is; a sample that makes
two is traced as any number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["OneChunkError", "one_chunk_behind", "refused_one_chunk"]

# Nobody's chunk is longer, and whose is has a text of one chunk.
_LONGEST_CHUNK = 4096


class OneChunkError(Exception):
    """A trace would hold for one chunk of a text only."""

    def __init__(self, size: int, most: int) -> None:
        self.size = size
        """How long the sample's text is."""
        self.most = most
        """How long the longest text of one chunk is."""
        super().__init__(f"a text of {size} is one chunk, as one of {most} is, and the trace would hold for one only")


@contextmanager
def refused_one_chunk(sizes: Collection[int]) -> Iterator[None]:
    """Raise `OneChunkError`, until the exit, where a trace takes for granted that a text of such a size is one chunk.

    Args:
        sizes: The sizes that are the length of a text, as the sample has it; none: nothing is refused.
    """
    original = ShapeEnv._maybe_guard_rel

    def guard(environment: ShapeEnv, expression: Any) -> None:
        if isinstance(expression, sympy.Eq) and expression.rhs != 0:
            # That there are as many rows of chunks as rows says that there is one chunk of each, too.
            counted = expression.lhs / expression.rhs
            if expression.lhs == 1:
                counted = expression.rhs
            for symbol in counted.free_symbols if len(counted.free_symbols) == 1 else ():
                size = int(environment.backed_var_to_val.get(symbol, 0))
                if size in sizes and (most := _longest(counted, symbol, size)) is not None:
                    raise OneChunkError(size, most)
        original(environment, expression)

    with patch.object(ShapeEnv, "_maybe_guard_rel", guard):
        yield


def one_chunk_behind(error: BaseException | None) -> OneChunkError | None:
    """Return what was refused where that ended a trace, whatever was made of it on the way."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OneChunkError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@lru_cache(maxsize=4096)
def _longest(counted: sympy.Expr, symbol: sympy.Symbol, size: int) -> int | None:
    """Return the largest value of a symbol up to which what is counted is one; ``None``: it counts no chunks.

    Chunks are one for several sizes, and two or more beyond; lengths that are equal at some sizes only are none.
    """

    # What is counted in chunks is divided and cut off somewhere; everything else is as large as it says.
    if not counted.has(sympy.Function):
        return None

    def number(value: int) -> sympy.Expr:
        return counted.xreplace({symbol: sympy.Integer(value)})

    if number(size) != 1 or 1 not in (number(size - 1), number(size + 1)):
        return None
    for more in range(size + 1, _LONGEST_CHUNK + 2):
        if (found := number(more)) != 1:
            return more - 1 if found.is_Integer and found > 1 else None
    return None
