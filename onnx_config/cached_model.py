"""A model whose cache is plain tensors: those of the past as arguments, those of the present among the outputs.

The model itself is as transformers has it. Every layer that attends is handed its whole past, also one that attends to
a window of it only, whose mask hides the rest: loaders feed all layers alike. A layer that keeps a state of a fixed
size is handed that, and zeros where a text begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache as remembered
from typing import Any

import torch

from onnx_config.cache_layout import KEY_OR_VALUE, kept_part
from onnx_config.errors import ErrorKind, ModelError

__all__ = ["CachedModel", "cache_of", "held_in"]

_ARGUMENT = "past_key_values"
_PRESENT = "present"
_ATTRIBUTES = {"key": "keys", "value": "values"}
_NOTHING = "dummy"
_LAYER_KINDS = ("full_attention", "indexed_attention", "linear_attention", "hybrid")


class CachedModel(torch.nn.Module):
    """Calls a model with a cache made of ``past_key_values.<layer>.<state>``, and returns ``present.…`` beside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        """A causal model of transformers, whose ``forward`` takes its cache."""
        self._argument = _cache_argument(model)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Return the model's outputs, and its cache after the call.

        The past is given by dotted names, or as one dictionary of dictionaries. Keys and values have the shape
        (batch_size, heads, past_sequence_length, head size) before the call, and ``sequence_length`` more after it;
        states are of one size. Outside of a trace, a text that begins is one to the model too: it gets a cache that
        holds nothing, rather than states of zeros.
        """
        past = {name: inputs.pop(name) for name in list(inputs) if kept_part(name) is not None}
        past |= _flattened(inputs.pop(_ARGUMENT, {}), _ARGUMENT)
        keys = [tensor for name, tensor in past.items() if KEY_OR_VALUE.fullmatch(name)]
        mask = inputs.get("attention_mask")
        if mask is not None and keys:
            # Of the very length of what is attended to, which torch cannot see from outside.
            length = keys[0].shape[-2] + inputs["input_ids"].shape[-1]
            inputs["attention_mask"] = mask.narrow(-1, 0, length)
        cache = cache_of(past, filled=torch.compiler.is_exporting() or not _begins(past))
        returned = self.model(**inputs, **{self._argument: cache})
        outputs = {name: value for name, value in returned.items() if name != self._argument}
        present = held_in(cache, past)
        return outputs | {name.replace(_ARGUMENT, _PRESENT, 1): tensor for name, tensor in present.items()}


def _cache_argument(model: torch.nn.Module) -> str:
    """Return what ``forward`` calls its cache."""
    from inspect import signature

    from transformers.generation.utils import ALL_CACHE_NAMES

    names = signature(model.forward).parameters
    return next((name for name in ALL_CACHE_NAMES if name in names), _ARGUMENT)


def _begins(past: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a cache with states is that of a text that begins; one without tells by its length."""
    states = any(KEY_OR_VALUE.fullmatch(name) is None for name in past)
    return states and not any(bool(tensor.numel()) and bool(tensor.any()) for tensor in past.values())


def cache_of(past: Mapping[str, torch.Tensor], *, filled: bool = True) -> Any:
    """Return transformers' cache that holds tensors by the names ``past_key_values.<layer>.<state>``.

    Args:
        past: The tensors; no tensor of a layer means that the layer keeps nothing.
        filled: Whether they are put into it; ``False``: the cache is that of a text that begins.
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    by_layer: dict[int, dict[tuple[str, int | None], torch.Tensor]] = {}
    for name, tensor in past.items():
        if (part := kept_part(name)) is not None:
            by_layer.setdefault(part[0], {})[part[1:]] = tensor
    attends_only = all(KEY_OR_VALUE.fullmatch(name) for name in past)
    for number in range(max(by_layer) + 1):
        held = by_layer.get(number, {})
        layer = _layer_for(frozenset(attribute for attribute, _ in held), attends_only=attends_only)
        if filled:
            _fill(layer, held)
        cache.layers.append(layer)
    return cache


def held_in(cache: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return what ``cache`` holds of ``names`` such as ``past_key_values.0.key``."""
    found = {}
    for name in names:
        part = kept_part(name)
        if part is None or part[0] >= len(cache.layers):
            continue
        number, attribute, which = part
        value = getattr(cache.layers[number], _ATTRIBUTES.get(attribute, attribute), None)
        tensor = value.get(which or 0) if isinstance(value, dict) else value
        if tensor is not None:
            found[name] = tensor
    return found


def _layer_for(parts: frozenset[str], *, attends_only: bool) -> Any:
    """Return a layer of transformers that has room for ``parts``, and for as little else as can be.

    Raises:
        ModelError: If there is none (``unsupported``).
    """
    if not parts and attends_only:
        # One that shall attend to something else later, such as an image.
        parts = frozenset(_ATTRIBUTES)
    wanted = {_ATTRIBUTES.get(part, part) for part in parts}
    fitting = [kind for kind, room in _room().items() if wanted <= room]
    if not fitting:
        raise ModelError(
            f"No layer of a cache of transformers holds {', '.join(sorted(parts))} together.",
            kind=ErrorKind.UNSUPPORTED,
        )
    return _new_layer(min(fitting, key=lambda kind: len(_room()[kind])))


@remembered
def _room() -> dict[str, frozenset[str]]:
    """Return what each kind of layer has room for, of those that forget nothing."""
    room = {kind: frozenset(vars(_new_layer(kind))) for kind in _LAYER_KINDS}
    return {**room, _NOTHING: frozenset()}


def _new_layer(kind: str) -> Any:
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    return DYNAMIC_LAYER_TYPE_MAPPING[kind]()


def _fill(layer: Any, held: Mapping[tuple[str, int | None], torch.Tensor]) -> None:
    """Put tensors into a new layer, as its own ``update`` leaves them there."""
    if {("key", None), ("value", None)} <= held.keys():
        keys, values = held["key", None], held["value", None]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    for (attribute, number), tensor in held.items():
        if attribute in _ATTRIBUTES:
            continue
        slots = getattr(layer, attribute)
        if not isinstance(slots, dict):
            layer.lazy_initialization_indexer(tensor)
            setattr(layer, attribute, tensor)
            continue
        # Layers write into their states, and whoever gave this one may not expect it.
        slots[number or 0] = tensor.clone()
        getattr(layer, f"is_{attribute}_initialized")[number or 0] = True
        layer.has_previous_state[number or 0] = True
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if attribute == "conv_states":
            layer.conv_kernel_size[number or 0] = tensor.shape[-1]


def _flattened(value: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    return {key: tensor for part, held in value.items() for key, tensor in _flattened(held, f"{name}.{part}").items()}
