"""Equal values among which a top-k chooses: in a graph as in PyTorch where all are equal, else the first of them.

Which of several equal values a top-k takes is nobody's rule: ONNX Runtime takes the first ones, PyTorch those that
its partial sorting leaves in front. A mixture of experts whose router was never trained has nothing but equal scores,
and another choice means other experts. The order for a row of equal values depends on its length alone, so the graph
looks at each row in that order; rows without equal values come out the same either way.

Of a row in which only some are equal, PyTorch's choice depends on all of its values and on how it sorts, and its
documentation promises none ("the indices of tied elements are not guaranteed to be stable"). Such rows come of scores
that are cut off at zero. ONNX does promise one, the first. `first_of_equal` lets PyTorch choose so too, which gives one
of the answers that the model may give, and the one that a graph has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OpenChoices", "TieWatch", "first_of_equal", "ties_as_in_torch"]

_LONGEST = 4096
_TOPK = (torch.topk, torch.Tensor.topk)
# Masks are filled with the lowest number of the element type, or close to it.
_HIDDEN = 1e30


class TieWatch(TorchDispatchMode):
    """Notes, while a model runs, whether a top-k had to choose among equal values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chose = False
        """Whether a top-k took some of a row and left others."""
        self.seen = False
        """Whether some row that it chose from was equal all over."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default and not self.seen:
            values, count = args[0], args[1]
            dim = args[2] if len(args) > 2 else -1
            if values.dim() and values.numel() and count < values.shape[dim]:
                self.chose = True
                self.seen = bool((values.amax(dim) == values.amin(dim)).any())
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One call of a top-k."""

    values: torch.Tensor
    count: int
    dim: int
    largest: bool

    @classmethod
    def of(cls, input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any) -> _Choice:  # noqa: A002
        """Read the arguments as PyTorch does."""
        return cls(values=input, count=k, dim=dim, largest=largest)

    def open_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each row, with the axis of size 1, whether some of several equal values are taken and others not.

        First of the rows in which only some are equal, then of those that are equal all over. A choice among what a
        mask has hidden is none.
        """
        values, dim = self.values, self.dim
        if not values.dim() or not 0 < self.count < values.shape[dim] or not values.numel():
            none = torch.zeros((), dtype=torch.bool)
            return none, none
        best = values.topk(self.count + 1, dim, self.largest).values
        last, left = best.narrow(dim, self.count - 1, 1), best.narrow(dim, self.count, 1)
        opened = (last == left) & (last.abs() < _HIDDEN)
        level = values.amax(dim, keepdim=True) == values.amin(dim, keepdim=True)
        return opened & ~level, opened & level

    def with_the_first(self, taken: Any, opened: torch.Tensor) -> Any:
        """Return what was ``taken``, in the rows that are ``opened`` with the first of equal values."""
        ordered = self.values.sort(dim=self.dim, descending=self.largest, stable=True)
        values, places = (part.narrow(self.dim, 0, self.count) for part in ordered)
        return torch.return_types.topk((torch.where(opened, values, taken[0]), torch.where(opened, places, taken[1])))


class OpenChoices(TorchFunctionMode):
    """Notes, while a model runs, whether a top-k took some of several equal values and left others of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        """In how many rows of which only some are equal."""
        self.level_rows = 0
        """In how many rows that are equal all over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TOPK:
            some, level = _choice(args, kwargs).open_rows()
            self.rows += int(some.sum())
            self.level_rows += int(level.sum())
        return func(*args, **(kwargs or {}))


class first_of_equal(TorchFunctionMode):  # noqa: N801  # used as a context manager only
    """Lets a top-k take the first of equal values, as ONNX has it; of rows that are equal all over only if asked to.

    What a graph takes of the latter depends on whether their size is fixed in it, see `ties_as_in_torch`.
    """

    def __init__(self, *, level: bool) -> None:
        super().__init__()
        self._level = level

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return taken
        choice = _choice(args, kwargs)
        some, level = choice.open_rows()
        opened = some | level if self._level else some
        return choice.with_the_first(taken, opened) if bool(opened.any()) else taken


def _choice(args: Any, kwargs: Any) -> _Choice:
    # `sorted`, the last one, changes nothing about which are taken.
    return _Choice.of(*args[:4], **(kwargs or {}))


def ties_as_in_torch() -> Any:
    """Have the exporter translate ``topk`` so that rows of equal values come out as in PyTorch on the CPU."""
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE

    return patch.dict(_ONNX_TRANSLATION_TABLE, {torch.ops.aten.topk.default: _topk})


# Without annotations: onnxscript would read them as the types of an ONNX function.
def _topk(self, k, dim=-1, largest=True, sorted=True):  # type: ignore[no-untyped-def]  # noqa: A002
    from onnxscript.onnx_opset import opset18

    # Its signatures speak of the values at run time; while a graph is made there are nodes.
    op: Any = opset18
    size = self.shape[dim] if self.shape is not None and len(self.shape) else None
    order = _order(size, k, largest=largest, sorted=sorted) if isinstance(size, int) and isinstance(k, int) else None
    counts = op.Constant(value_ints=[k]) if isinstance(k, int) else op.Reshape(k, op.Constant(value_ints=[1]))
    if order is None:
        return op.TopK(self, counts, axis=dim, largest=int(largest), sorted=int(sorted))
    places = op.Constant(value_ints=order)
    values, found = op.TopK(
        op.Gather(self, places, axis=dim), counts, axis=dim, largest=int(largest), sorted=int(sorted)
    )
    return values, op.Gather(places, found, axis=0)


def _order(size: int, count: int, *, largest: bool, sorted: bool) -> list[int] | None:  # noqa: A002
    """Return in which order PyTorch takes from ``size`` equal values; ``None`` where from the first to the last."""
    if not 0 < count < size <= _LONGEST:
        return None
    # Called while a model is being traced; here numbers are wanted, not nodes.
    with torch.utils._python_dispatch._disable_current_modes():
        taken = torch.zeros(size).topk(count, largest=largest, sorted=sorted).indices.numpy()
    order = [*taken.tolist(), *np.setdiff1d(np.arange(size), taken).tolist()]
    return None if order == list(range(size)) else order
