"""What PyTorch needs in order to run a model that was written for float32 in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["DoubleOperators"]

# Before 2.10 only the second was there.
_GROUPED = tuple(
    getattr(owner, name)
    for owner, name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(owner, name)
)


class DoubleOperators(TorchFunctionMode):
    """Gives float64 to operators that have none, or that take other numbers for it.

    Models make masks with ``.float()`` or in the type of their weights as declared. On the CPU, PyTorch 2.13 takes a
    float32 mask for float64 queries without a word and reads its bytes as numbers of the other type. The product by
    which mixtures of experts compute refuses float64, so that no such model had an error of its own to compare by.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            if len(args) > 3:
                args = (*args[:3], _like(args[3], args[0]), *args[4:])
            elif "attn_mask" in kwargs:
                kwargs = {**kwargs, "attn_mask": _like(kwargs["attn_mask"], args[0] if args else kwargs["query"])}
        elif func in _GROUPED and _is_by_rows(*args, **kwargs):
            return _by_rows(*args, **kwargs)
        return func(*args, **kwargs)


def _like(mask: Any, query: torch.Tensor) -> Any:
    return mask.to(query.dtype) if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask


def _is_by_rows(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor | None = None, **options: Any) -> bool:
    """Return whether groups of rows are multiplied by a matrix each, in float64 and with nothing else asked."""
    plain = all(option is None for option in options.values())
    return plain and offs is not None and mat_a.dtype is torch.float64 and (mat_a.dim(), mat_b.dim()) == (2, 3)


def _by_rows(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    product = mat_a.new_zeros(mat_a.shape[0], mat_b.shape[2])
    start = 0
    for matrix, end in zip(mat_b, offs.tolist(), strict=True):
        product[start:end] = mat_a[start:end] @ matrix
        start = end
    return product
