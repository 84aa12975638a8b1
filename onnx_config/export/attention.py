"""Makes attention over nothing in a graph what it is in PyTorch, and all attention as plain as it can be.

A row whose mask hides every key has no defined attention. PyTorch answers zeros where the mask is a boolean one or
holds infinities, and the mean of all values where it holds the lowest number instead, since that takes from all scores
alike. The exporter answers zeros in both cases.

Where a mask hides nothing, transformers makes none for causal attention, and leaves it to the layers to look at the
past alone. Layers that say of themselves that they are not causal then see all: PyTorch attends in one way to padded
texts, and in another to the others. A traced graph would hold the former only. So it is the other way round: where a
mask that lets all see all hides nothing, there is none, and layers that do not say that they are not causal look at the
past alone (the images of Phi-4).

The translation takes states of four axes, where PyTorch takes any: what lies before the heads becomes one axis.

The translation of attention swaps the last two axes of keys of any rank: it reads their sizes, makes one axis of all
the first ones, transposes, and takes them apart again. For keys of four axes one transposition does, which ONNX
Runtime merges with the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["attention_as_in_torch"]

_TRANSLATIONS = (
    "_aten_scaled_dot_product_attention_no_mask_onnx",
    "_aten_scaled_dot_product_attention_float_mask_onnx",
)
_AXES = 4
_PATCHED = ("torch.nn.functional", "scaled_dot_product_attention")


@contextmanager
def attention_as_in_torch() -> Iterator[None]:
    """Have attention traced and translated so until the exit."""
    with _hidden_rows_as_in_torch(), _seen_ahead_as_in_torch(), _keys_transposed_at_once():
        yield


@contextmanager
def _hidden_rows_as_in_torch() -> Iterator[None]:
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
            if query.dim() != _AXES:
                heads = [_of_four_axes(states) for states in (query, key, value)]
                attended = attention(*heads, _mask_of_four_axes(attn_mask, query), *args, **kwargs)
                return attended.reshape(*query.shape[:-1], value.shape[-1])
            if attn_mask is None or attn_mask.dtype == torch.bool:
                return exporters_own(query, key, value, attn_mask, *args, **kwargs)
            # Sums, as the exporter has them: ONNX Runtime takes the largest of booleans on the CPU only.
            seen = (attn_mask > float("-inf")).to(query.dtype).sum(dim=-1, keepdim=True)
            answer = original(query, key, value, attn_mask, *args, **kwargs)
            return torch.where(seen < 1, torch.zeros((), dtype=answer.dtype, device=answer.device), answer)

        return attention

    return factory


def _of_four_axes(states: torch.Tensor) -> torch.Tensor:
    """Return states (..., heads, length, width) as (rows, heads, length, width): what the translation takes."""
    missing = max(0, _AXES - states.dim())
    return states[(None,) * missing].flatten(0, -_AXES)


def _mask_of_four_axes(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    # One of fewer axes fits as it stands.
    if mask is None or mask.dim() < _AXES:
        return mask
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -_AXES)


@contextmanager
def _seen_ahead_as_in_torch() -> Iterator[None]:
    """Have layers that are not causal see all where a causal mask hides nothing else, and causal ones never."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    made: dict[int, _Skippable] = {}
    with ExitStack() as stack:
        for functions, change in ((ALL_MASK_ATTENTION_FUNCTIONS, _kept), (ALL_ATTENTION_FUNCTIONS, _seeing_ahead)):
            original = functions["sdpa"]
            stack.callback(functions.__setitem__, "sdpa", original)
            functions["sdpa"] = change(original, made)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Skippable:
    """A mask in the place of which there would be none if it hid nothing."""

    mask: torch.Tensor
    hides_nothing: Callable[[], torch.Tensor]
    """Returns whether it is so."""
    causal: bool
    """Whether it hides what comes later."""


def _kept(original: Any, made: dict[int, _Skippable]) -> Any:
    """Return what makes masks, and keeps those that `transformers.masking_utils` would have spared."""

    def mask(*, attention_mask: Any = None, allow_is_causal_skip: bool = True, **options: Any) -> Any:
        for_all = bool(options.get("allow_is_bidirectional_skip"))
        if for_all and attention_mask is None and options.get("local_size") is None:
            # Of images, say: nothing can be hidden. Only in a trace would transformers make a mask of ones.
            return None
        found = original(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options)
        skips = (allow_is_causal_skip or for_all) and options.get("local_size") is None
        if skips and found is not None and attention_mask is not None and attention_mask.dim() == 2:
            past = 0 if for_all else options["kv_length"] - options["q_length"]
            made[id(found)] = _Skippable(
                mask=found,
                hides_nothing=lambda: ((attention_mask == 0).to(torch.int64).sum() + past) == 0,
                causal=not for_all,
            )
        return found

    return mask


def _seeing_ahead(original: Any, made: Mapping[int, _Skippable]) -> Any:
    """Return attention that asks of such a mask what PyTorch would have asked."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **options: Any
    ) -> Any:
        kept = made.get(id(attention_mask))
        told = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if told is None else told
        if kept is not None and kept.causal and not causal:
            attention_mask = kept.mask | kept.hides_nothing()
        elif kept is not None and causal and not kept.causal:
            attention_mask = kept.mask & (_earlier(query, key) | ~kept.hides_nothing())
        return original(module, query, key, value, attention_mask, *rest, **options)

    return attention


def _earlier(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return which keys a causal layer of PyTorch's sees without a mask: those up to itself, and all if it is alone."""
    queries, keys = (torch.arange(states.shape[2], device=states.device) for states in (query, key))
    return (queries[:, None] >= keys) | (queries.sum() == 0)


@contextmanager
def _keys_transposed_at_once() -> Iterator[None]:
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
