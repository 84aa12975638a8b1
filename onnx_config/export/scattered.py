"""Lets a graph scatter nothing: what a mask picks, is computed with and is put back may be no rows at all.

The exporter numbers the places that a mask marks, and takes for each place, marked or not, one of the values to be put
there. Where there are none, as in a text without a sound, there is nothing to take. A further value ahead of them is
what places that are not marked take; more marked places than values are refused as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = ["scattered_if_any"]


@contextmanager
def scattered_if_any() -> Iterator[None]:
    """Have the exporter put back what was picked by a mask also where that is nothing, until the exit."""
    from transformers.exporters.utils import _PATCHES

    patches: list[Any] = _PATCHES["onnx"]
    ours = ("torch.Tensor", "masked_scatter", _masked_scatter)
    # Later ones are put around those before.
    patches.append(ours)
    try:
        yield
    finally:
        patches.remove(ours)


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
