"""Lets a graph scatter nothing: what a mask picks, is computed with and is put back may be no rows at all.

The exporter numbers the places that a mask marks, and takes for each place, marked or not, one of the values to be put
there. Where there are none, as in a text without a sound, there is nothing to take. A further value ahead of them is
what places that are not marked take; more marked places than values are refused as ever. So it is with
``x.masked_scatter(mask, values)`` and with ``x[mask] = values``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import onnx_ir
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from onnx_config.export.exporter_changes import exporter_changes

__all__ = ["scattered_if_any"]


@contextmanager
def scattered_if_any() -> Iterator[None]:
    """Have the exporter put back what was picked by a mask also where that is nothing, until the exit."""
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE

    put = torch.ops.aten.index_put.default
    with (
        exporter_changes(("torch.Tensor", "masked_scatter", _masked_scatter)),
        patch.dict(_ONNX_TRANSLATION_TABLE, {put: _index_put(_ONNX_TRANSLATION_TABLE[put])}),
    ):
        yield


def _masked_scatter(original: Any) -> Any:
    def masked_scatter(self: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        # Only how many rows were picked by their values may be none.
        if not free_unbacked_symbols(list(source.shape)):
            return original(self, mask, source)  # type: ignore[no-any-return]
        marked = mask.expand_as(self).reshape(-1)
        places = marked.to(torch.int64).cumsum(0) * marked
        values = torch.cat([source.new_zeros(1), source.reshape(-1)])[places]
        return torch.where(marked, values, self.reshape(-1)).reshape(self.shape)

    return masked_scatter


def _index_put(original: Callable[..., Any]) -> Callable[..., Any]:
    # Without annotations: onnxscript would read them as the types of an ONNX function.
    def index_put(self, indices, values, accumulate=False):  # type: ignore[no-untyped-def]
        from onnxscript.onnx_opset import opset18

        mask = indices[0]
        by_mask = len(indices) == 1 and mask is not None and mask.dtype == onnx_ir.DataType.BOOL
        # As many rows as the mask marks have no number of their own; other values are one for all places.
        if not by_mask or accumulate or values.shape is None or not len(values.shape) or _is_number(values.shape[0]):
            return original(self, indices, values, accumulate)
        # Its signatures speak of the values at run time; while a graph is made there are nodes.
        op: Any = opset18
        flat = op.Constant(value_ints=[-1])
        for _ in range(len(self.shape) - len(mask.shape)):
            mask = op.Unsqueeze(mask, flat)
        marked = op.Reshape(op.Expand(mask, op.Shape(self)), flat)
        counted = op.Cast(marked, to=onnx_ir.DataType.INT64)
        places = op.Mul(op.CumSum(counted, op.Constant(value_int=0)), counted)
        ahead = op.CastLike(op.Constant(value_floats=[0.0]), self)
        taken = op.Gather(op.Concat(ahead, op.Reshape(values, flat), axis=0), places)
        return op.Reshape(op.Where(marked, taken, op.Reshape(self, flat)), op.Shape(self))

    return index_put


def _is_number(size: Any) -> bool:
    return isinstance(size, int)
