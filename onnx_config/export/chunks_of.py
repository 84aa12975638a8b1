"""What rewritten loops call that take so many tokens of a text after the other: its chunks as a further axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from onnx_config.export.steps_in_turn import Taken, Text

__all__ = ["Chunks", "after", "chunks"]

Places = Callable[[Any], tuple[Sequence[tuple[Any, Any]], Sequence[Any]]]
"""Returns for a step where its chunks begin and end, and the other numbers that it reads."""


class Chunks:
    """Tensors whose text is taken by chunks."""

    def __init__(
        self, count: torch.SymInt, size: int, tensors: Sequence[tuple[torch.Tensor, int]], sizes: Sequence[int]
    ) -> None:
        self.count = count
        """How many chunks there are, the last with what the text leaves of it."""
        tensor, axis = tensors[0]
        length = tensor.shape[axis]
        whole = statically_known_true(length == count * size)
        before = count if whole else (length - 1) // size
        self.rest: tuple[torch.SymInt | int, ...] = () if whole else (before,)
        """The number of the last chunk, where it may be a shorter one."""
        self.kept = torch.arange(count, device=tensor.device) < before  # type: ignore[call-overload]  # a symbol
        """Of each chunk, whether it is a whole one."""
        self._size, self._tensors, self._sizes = size, tensors, sizes
        self._lacking = count * size - length
        self._text = Text(length=length, size=size, whole=before)

    def size(self, at: int) -> int:
        """Return one of the numbers that all steps read."""
        return self._sizes[at]

    def of(self, at: int) -> torch.Tensor:
        """Return the chunks of a tensor along a first axis."""
        tensor, axis = self._tensors[at]
        axis %= tensor.dim()
        if self.rest:
            ends: list[int] = [0, 0] * (tensor.dim() - axis - 1)
            tensor = torch.nn.functional.pad(tensor, [*ends, 0, self._lacking])  # type: ignore[list-item]  # a symbol
        shape = [*tensor.shape[:axis], self.count, self._size, *tensor.shape[axis + 1 :]]
        return tensor.reshape(shape).movedim(axis, 0)

    def entries(self, made: Any) -> Any:
        """Return what the steps appended to a list, but for the last chunk's where that is gone through once more."""
        if not self.rest:
            return made
        return Taken(made.values, self._text) if isinstance(made, Taken) else made[:-1]


def chunks(count: Any, places: Places, tensors: Sequence[tuple[Any, int]]) -> Chunks | None:
    """Return the chunks that a loop takes in turn; ``None``: it is another loop.

    Args:
        count: How many there are.
        places: Tells of a step where its chunks lie.
        tensors: What is taken by chunks, each with the axis of its text.
    """
    if not isinstance(count, torch.SymInt) or not all(isinstance(t, torch.Tensor) and t.dim() for t, _ in tensors):
        return None
    lengths = [tensor.shape[axis] for tensor, axis in tensors]
    length = _in_sample(lengths[0])
    (first, sizes), (second, others) = places(0), places(1)
    begin, size = map(_in_sample, first[0])
    # A chunk that ends where the text does may be a shorter one.
    if begin != 0 or not 0 < size < length or not all(statically_known_true(n == lengths[0]) for n in lengths):
        return None
    if not statically_known_true(count == (lengths[0] + (size - 1)) // size):
        return None
    end = min(2 * size, length)
    if any(tuple(map(_in_sample, ends)) != (0, size) for ends in first):
        return None
    if any(tuple(map(_in_sample, ends)) != (size, end) for ends in second):
        return None
    numbers = [_in_sample(number) for number in sizes]
    if any(_in_sample(b) not in ((a, end - size) if a == size else (a,)) for a, b in zip(numbers, others, strict=True)):
        return None
    return Chunks(count, size, tensors, numbers)


def _in_sample(number: Any) -> int:
    """Return a number as it is of the sample, taking nothing for granted."""
    return int(number.node.hint if isinstance(number, torch.SymInt) else number)


def after(kept: torch.Tensor, state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return what a step leaves; what it was given, where it goes through no whole chunk."""
    return torch.where(kept, state, before)
