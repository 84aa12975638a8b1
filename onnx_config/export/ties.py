"""Makes a graph choose among equal values as PyTorch does, where all are equal.

Which of several equal values a top-k takes is nobody's rule: ONNX Runtime takes the first ones, PyTorch those that
its partial sorting leaves in front. A mixture of experts whose router was never trained has nothing but equal scores,
and another choice means other experts. The order for a row of equal values depends on its length alone, so the graph
looks at each row in that order; rows without equal values come out the same either way.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TieWatch", "ties_as_in_torch"]

_LONGEST = 4096


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
