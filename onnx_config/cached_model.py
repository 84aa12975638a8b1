"""A model whose cache is plain tensors: those of the past as arguments, those of the present among the outputs.

The model itself is as transformers has it. Every layer is handed its whole past, also one that attends to a window of
it only, whose mask hides the rest: loaders feed all layers alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onnx_config.cache_layout import KEY_OR_VALUE

__all__ = ["CachedModel", "cache_of"]

_ARGUMENT = "past_key_values"


class CachedModel(torch.nn.Module):
    """Calls a model with a cache made of ``past_key_values.<layer>.key|value``, and returns ``present.…`` beside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        """A causal model of transformers, whose ``forward`` takes ``past_key_values``."""

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Return the model's outputs, and its cache after the call.

        The past is given by dotted names, or as one dictionary of dictionaries. Keys and values have the shape
        (batch_size, heads, past_sequence_length, head size) before the call, and ``sequence_length`` more after it.
        """
        past = {name: inputs.pop(name) for name in list(inputs) if KEY_OR_VALUE.fullmatch(name)}
        for number, layer in inputs.pop(_ARGUMENT, {}).items():
            past |= {f"{_ARGUMENT}.{number}.{part}": tensor for part, tensor in layer.items()}
        mask = inputs.get("attention_mask")
        if mask is not None:
            # Of the very length of what is attended to, which torch cannot see from outside.
            text = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
            length = next(iter(past.values())).shape[-2] + text.shape[1]
            inputs["attention_mask"] = mask.narrow(-1, 0, length)
        cache = cache_of(past)
        returned = self.model(**inputs, past_key_values=cache)
        outputs = {name: value for name, value in returned.items() if name != _ARGUMENT}
        for number, layer in enumerate(cache.layers):
            if f"{_ARGUMENT}.{number}.key" in past:
                outputs |= {f"present.{number}.key": layer.keys, f"present.{number}.value": layer.values}
        return outputs


def cache_of(past: Mapping[str, torch.Tensor]) -> Any:
    """Return transformers' cache that holds tensors by the names ``past_key_values.<layer>.key|value``."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    numbers = {int(found[1]) for name in past if (found := KEY_OR_VALUE.fullmatch(name))}
    for number in range(max(numbers) + 1):
        layer = DynamicLayer()
        if number in numbers:
            keys, values = (past[f"{_ARGUMENT}.{number}.{part}"] for part in ("key", "value"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
