"""Makes attention over nothing in a graph what it is in PyTorch, and all attention as plain as it can be.

A row whose mask hides every key has no defined attention. PyTorch answers zeros where the mask is a boolean one or
holds infinities, and the mean of all values where it holds the lowest number instead, since that takes from all scores
alike. The exporter answers zeros in both cases.

Where a mask hides nothing, transformers makes none for causal attention, and leaves it to the layers to look at the
past alone. Layers that say of themselves that they are not causal then see all: PyTorch attends in one way to padded
texts, and in another to the others. A traced graph would hold the former only.

The translation of attention swaps the last two axes of keys of any rank: it reads their sizes, makes one axis of all
the first ones, transposes, and takes them apart again. For keys of four axes one transposition does, which ONNX
Runtime merges with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["attention_as_in_torch", "hidden_rows_as_in_torch", "keys_transposed_at_once", "seen_ahead_as_in_torch"]

_TRANSLATIONS = (
    "_aten_scaled_dot_product_attention_no_mask_onnx",
    "_aten_scaled_dot_product_attention_float_mask_onnx",
)
_PATCHED = ("torch.nn.functional", "scaled_dot_product_attention")


@contextmanager
def attention_as_in_torch(model: torch.nn.Module) -> Iterator[None]:
    """Have attention traced and translated so until the exit."""
    with hidden_rows_as_in_torch(), seen_ahead_as_in_torch(model), keys_transposed_at_once():
        yield


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


@contextmanager
def seen_ahead_as_in_torch(model: torch.nn.Module) -> Iterator[None]:
    """Have causal masks that hide nothing else hide nothing at all, of a model none of whose layers is causal."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    causal = {part.is_causal for part in model.modules() if isinstance(getattr(part, "is_causal", None), bool)}
    if causal != {False}:
        yield
        return
    original = FUNCTIONS["sdpa"]
    FUNCTIONS["sdpa"] = _seeing_ahead(original)
    try:
        yield
    finally:
        FUNCTIONS["sdpa"] = original


def _seeing_ahead(original: Any) -> Any:
    def mask(*, attention_mask: Any = None, allow_is_causal_skip: bool = True, **options: Any) -> Any:
        made = original(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options)
        # As `transformers.masking_utils._ignore_causal_mask_sdpa` asks, of the values too.
        skips = allow_is_causal_skip and options.get("local_size") is None
        if not skips or made is None or attention_mask is None or attention_mask.dim() != 2:
            return made
        padded = (attention_mask == 0).to(torch.int64).sum()
        past = options["kv_length"] - options["q_length"]
        return made | ((padded + past) == 0)

    return mask


@contextmanager
def keys_transposed_at_once() -> Iterator[None]:
    """Have attention translated so until the exit; a release that translates it otherwise goes on doing that."""
    with ExitStack() as stack:
        with suppress(ImportError, AttributeError):
            from onnxscript import opset18 as opset  # as there
            from onnxscript.function_libs.torch_lib.ops import nn

            for name in _TRANSLATIONS:
                stack.enter_context(patch.object(nn, name, _plainly(getattr(nn, name), opset)))
        yield


def _plainly(original: Any, op: Any) -> Any:
    def translate(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        *mask, scale, dropout = rest
        # A key that was repeated for groups of queries has no shape yet, and four axes as all that are translated.
        if dropout or (key.shape is not None and len(key.shape) != 4):
            return original(query, key, value, *rest)
        # Both sides are scaled, as there: the product of large numbers may be too large before it is.
        root = op.CastLike(op.Sqrt(scale), key)
        scores = op.MatMul(op.Mul(query, root), op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), root))
        for added in mask:
            scores = op.Add(scores, added)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return translate
