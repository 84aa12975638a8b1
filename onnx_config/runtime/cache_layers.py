"""transformers' cache objects as what graphs take and give: keys and values, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from onnx_config.runtime.graph_session import GraphInput

__all__ = ["PlainCache", "empty_past", "held", "refill"]


class PlainCache:
    """What generates with graphs whose cache grows: a size fixed before is of no use to them, nor are its masks."""

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Have transformers make the cache that grows, whatever kind was asked for: the text is the same."""
        from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

        asked = generation_config.cache_implementation
        if asked in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            generation_config.cache_implementation = None
        try:
            return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]
        finally:
            generation_config.cache_implementation = asked


def empty_past(wanted: GraphInput, rows: int) -> torch.Tensor:
    """Return a past of no length, or of the length that a graph insists on, for a text that begins."""
    _, heads, steps, width = (size if isinstance(size, int) else None for size in wanted.shape)
    return torch.zeros(rows, heads or 1, steps or 0, width or 1, dtype=wanted.dtype)


def held(cache: Any, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the keys and values that ``cache`` has in layer ``number``; ``None`` where it is empty there."""
    layers = [] if cache is None else cache.layers
    layer = layers[number] if number < len(layers) else None
    if layer is None or not layer.is_initialized or not layer.get_seq_length():
        return None
    return layer.keys, layer.values


def refill(cache: DynamicCache | None, layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Return a cache with these keys and values by layer: the one given, since whoever generates keeps that.

    Layers that would forget, such as those of a window, or hold a size fixed before, give way to plain ones: a graph
    takes its whole past.
    """
    filled = DynamicCache() if cache is None else cache
    while len(filled.layers) <= max(layers):
        filled.layers.append(DynamicLayer())
    for number, (keys, values) in layers.items():
        layer = filled.layers[number]
        if type(layer) is not DynamicLayer:
            layer = filled.layers[number] = DynamicLayer()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
    return filled
