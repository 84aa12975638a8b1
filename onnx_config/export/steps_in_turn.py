"""What rewritten loops call while a model is traced: one step after another, as one operator of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.scan import scan_op
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["Taken", "Text", "all_steps", "can_be_one", "joined", "stacked", "store"]

Sliced = Sequence[tuple[Any, int]]
"""Tensors, each with the axis of which every step takes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What is taken by chunks, of which the last may be a shorter one."""

    length: Any
    """How many tokens there are."""
    size: int
    """How many make a chunk."""
    whole: Any
    """How many chunks come before the last."""


class Taken:
    """What the steps appended to a list, which has as many entries as the graph is asked for."""

    def __init__(self, values: torch.Tensor, text: Text | None = None) -> None:
        self.values = values
        """With the steps along the first axis."""
        self._text = text
        self._last: list[torch.Tensor] = []

    def append(self, value: torch.Tensor) -> None:
        """Add what was made of the last chunk of a text, in place of what the steps made of it filled up."""
        self._last.append(value)

    def stacked(self, dim: int) -> torch.Tensor:
        """Return what the steps made side by side."""
        values = self.values
        if self._text is not None:
            values = torch.cat([values.narrow(0, 0, self._text.whole), torch.stack(self._last)])
        return values.movedim(0, dim)

    def joined(self, dim: int) -> torch.Tensor:
        """Return what the steps made one behind the other."""
        axis = dim % (self.values.dim() - 1)
        values = self.values.movedim(0, axis)
        each = values.shape[axis + 1]
        joined = values.flatten(axis, axis + 1)
        if self._text is None:
            return joined
        joined = torch.cat([joined.narrow(axis, 0, self._text.whole * each), *self._last], axis)
        # Of as many tokens as it is made of, though torch's algebra does not say so.
        return joined.narrow(axis, 0, self._text.length) if each == self._text.size else joined


def can_be_one(count: Any, carried: Sequence[Any], sliced: Sliced, stored: Sliced, lists: Sequence[Any]) -> bool:
    """Return whether a loop runs as often as an axis is long, over tensors that are as long."""
    if not isinstance(count, torch.SymInt) or not all(isinstance(value, torch.Tensor) for value in carried):
        return False
    if any(not isinstance(entries, list) or entries for entries in lists):
        return False
    return all(
        isinstance(tensor, torch.Tensor) and tensor.dim() and statically_known_true(tensor.shape[axis] == count)
        for tensor, axis in (*sliced, *stored)
    )


def all_steps(
    step: Callable[..., tuple[Sequence[Any], Sequence[Any]]],
    carried: Sequence[torch.Tensor],
    sliced: Sliced,
    same: Sequence[Any],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what is left after the last step, and what each step made, along a first axis.

    Args:
        step: Is given what the step before left, one of each sliced tensor, and what is the same for all steps;
            returns what it leaves and what it made.
        carried: What the first step is given.
        sliced: Tensors with the axis along which the steps go.
        same: What is the same for all steps, tensors or not.
    """
    tensors = [value for value in same if isinstance(value, torch.Tensor)]
    first, middle = len(carried), len(carried) + len(sliced)

    def body(*values: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(values[middle:])
        given = [next(rest) if isinstance(value, torch.Tensor) else value for value in same]
        left, made = step(*values[:middle], *given)
        # Nothing that goes out may be what came in.
        return [value.clone() for value in (*left, *made)]

    rows = [tensor.movedim(axis, 0) for tensor, axis in sliced]
    returned = scan_op(body, [value.clone() for value in carried], rows, tuple(tensors))
    return list(returned[:first]), list(returned[first:])


def store(target: torch.Tensor, made: torch.Tensor, axis: int) -> None:
    """Write what the steps made into the tensor that each of them wrote to.

    Raises:
        ValueError: If a step wrote something of fewer axes, which would have been repeated.
    """
    if made.dim() != target.dim():
        raise ValueError(f"a step writes {made.dim() - 1} axes into {target.dim() - 1}")
    target.copy_(made.movedim(0, axis))


def stacked(entries: Any, dim: int = 0) -> torch.Tensor:
    """As `torch.stack`."""
    if isinstance(entries, Taken):
        return entries.stacked(dim)
    return torch.stack(entries, dim)


def joined(entries: Any, dim: int = 0) -> torch.Tensor:
    """As `torch.cat`."""
    if isinstance(entries, Taken):
        return entries.joined(dim)
    return torch.cat(entries, dim)
