"""What PyTorch needs in order to run a model that was written for float32 in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["DoubleMasks"]


class DoubleMasks(TorchFunctionMode):
    """Gives attention a mask of the element type that its queries have.

    Models make masks with ``.float()`` or in the type of their weights as declared. On the CPU, PyTorch 2.13 takes a
    float32 mask for float64 queries without a word and reads its bytes as numbers of the other type.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            if len(args) > 3:
                args = (*args[:3], _like(args[3], args[0]), *args[4:])
            elif "attn_mask" in kwargs:
                kwargs = {**kwargs, "attn_mask": _like(kwargs["attn_mask"], args[0] if args else kwargs["query"])}
        return func(*args, **kwargs)


def _like(mask: Any, query: torch.Tensor) -> Any:
    return mask.to(query.dtype) if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask
