"""Makes attention over nothing in a graph what it is in PyTorch.

A row whose mask hides every key has no defined attention. PyTorch answers zeros where the mask is a boolean one or
holds infinities, and the mean of all values where it holds the lowest number instead, since that takes from all scores
alike. The exporter answers zeros in both cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["hidden_rows_as_in_torch"]

_PATCHED = ("torch.nn.functional", "scaled_dot_product_attention")


@contextmanager
def hidden_rows_as_in_torch() -> Iterator[None]:
    """Have the exporter set to zero only those rows that PyTorch does."""
    from transformers.exporters.utils import _PATCHES

    patches = _PATCHES["onnx"]
    before = list(patches)
    patches[:] = [(*place, _keeping(made) if tuple(place) == _PATCHED else made) for *place, made in before]
    try:
        yield
    finally:
        patches[:] = before


def _keeping(made: Any) -> Any:
    def factory(original: Any) -> Any:
        exporters_own = made(original)

        def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
            if attn_mask is None or attn_mask.dtype == torch.bool:
                return exporters_own(query, key, value, attn_mask, *args, **kwargs)
            # Sums, as the exporter has them: ONNX Runtime takes the largest of booleans on the CPU only.
            seen = (attn_mask > float("-inf")).to(query.dtype).sum(dim=-1, keepdim=True)
            answer = original(query, key, value, attn_mask, *args, **kwargs)
            return torch.where(seen < 1, torch.zeros((), dtype=answer.dtype, device=answer.device), answer)

        return attention

    return factory
