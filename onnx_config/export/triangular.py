"""What rewritten loops call that solve a triangular system row by row: the same with a few products of matrices.

A loop over ``i`` that adds to row ``i`` of a matrix what its earlier rows make of it leaves, below the diagonal, the
inverse of a unit triangular matrix. A trace of it has two dozen nodes a row, of sixty-three rows, in every layer. The
inverse of two blocks on the diagonal, and with them of the block between, takes two products; after six such steps the
blocks of one number are one matrix of sixty-four. Whether a loop computes just that is tried, not read: in whole
numbers, where nothing is rounded, on random ones, which two different polynomials do not agree on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["inverted_in_place", "inverts"]

Loop = FunctionType
"""Changes the matrices that it is given in place; is also given what limits its numbers."""

_LARGEST = 2**62
_SEED = 5
_MOST_ROWS = 1024
_MOST_AXES = 6


def inverts(loop: Loop, matrices: Any, *limits: Any) -> bool:
    """Return whether a loop leaves the inverse of square matrices of a size that is known."""
    if not isinstance(matrices, torch.Tensor) or not 2 <= matrices.dim() <= _MOST_AXES:
        return False
    rows, columns = matrices.shape[-2:]
    sizes = (rows, columns, *limits)
    if rows != columns or not all(type(size) is int for size in sizes) or not 1 < rows <= _MOST_ROWS:
        return False
    return _inverts(loop.__code__, matrices.dim(), rows, limits)


@cache
def _inverts(code: CodeType, axes: int, rows: int, limits: tuple[int, ...]) -> bool:
    loop = FunctionType(code, {"range": range})
    # What is tried belongs to no trace.
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(_SEED)
        shape = (*(2 for _ in range(axes - 2)), rows, rows)
        given = torch.randint(-_LARGEST, _LARGEST, shape, generator=generator)
        left = given.clone()
        try:
            loop(left, *limits)
        # A loop that does something else with whole numbers is none of these.
        except Exception:  # noqa: BLE001
            return False
        return torch.equal(left, _inverted(given))


def inverted_in_place(matrices: torch.Tensor) -> None:
    """Write below the diagonal of matrices what a loop leaves there that `inverts`."""
    matrices.copy_(_inverted(matrices))


def _inverted(matrices: torch.Tensor) -> torch.Tensor:
    """Return what is left where each row, from the first to the last, has the rows above it added as it says.

    With ``L`` what lies below the diagonal and ``U`` the rest, that is the lower part ``T`` of ``L (I + T + U)``, and
    where nothing lies above, the inverse of ``I - L`` without its diagonal.
    """
    rows = matrices.shape[-1]
    lower, upper = matrices.tril(-1), matrices.triu()
    inverse = unit = torch.eye(rows, dtype=matrices.dtype, device=matrices.device)
    for between in _between(rows, matrices.device):
        block = lower * between.to(matrices.dtype)
        # Blocks of one number are their own inverse.
        inverse = unit + block if inverse is unit else inverse + inverse @ block @ inverse
    return upper + inverse @ (lower + lower @ upper).tril(-1)


def _between(rows: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield where the blocks lie that join two on the diagonal, of 1, 2, 4, ... rows."""
    at = torch.arange(rows, device=device)
    size = 1
    while size < rows:
        block = at // size
        odd = (block % 2 == 1)[:, None]
        yield odd & (block[:, None] == block[None, :] + 1)
        size *= 2
