"""A model whose cache is plain tensors: those of the past as arguments, those of the present among the outputs.

The model itself is as transformers has it. Every layer that attends is handed its whole past, also one that attends to
a window of it only, whose mask hides the rest: loaders feed all layers alike. A layer that keeps a state of a fixed
size is handed that, and zeros where a text begins.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from functools import cache as remembered
from typing import Any

import torch

from onnx_config.cache_layout import KEY_OR_VALUE, kept_part, layer_number
from onnx_config.errors import ErrorKind, ModelError

__all__ = ["CachedModel", "cache_of", "flattened", "held_in"]

_ARGUMENT = "past_key_values"
_PRESENT = "present"
_ATTRIBUTES = {"key": "keys", "value": "values"}
_NOTHING = "dummy"
_Parts = dict[tuple[str, int | None], torch.Tensor]
_LAYER_KINDS = ("full_attention", "indexed_attention", "linear_attention", "hybrid")


class CachedModel(torch.nn.Module):
    """Calls a model with a cache made of ``past_key_values.<layer>.<state>``, and returns ``present.…`` beside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        """A causal model of transformers, whose ``forward`` takes its cache."""
        self._argument = _cache_argument(model)
        self._holders = _holders(model)

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
        past |= flattened(inputs.pop(_ARGUMENT, {}), _ARGUMENT)
        keys = [tensor for name, tensor in past.items() if KEY_OR_VALUE.fullmatch(name)]
        mask = inputs.get("attention_mask")
        if mask is not None and keys:
            # Of the very length of what is attended to, which torch cannot see from outside.
            text = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
            length = keys[0].shape[-2] + text.shape[1]
            inputs["attention_mask"] = mask.narrow(-1, 0, length)
        filled = torch.compiler.is_exporting() or not _begins(past)
        own = {
            name: self._holders[part[:2]] for name in past if (part := kept_part(name)) and part[:2] in self._holders
        }
        cache = cache_of(past, apart=own, filled=filled)
        for name, (module, attribute) in own.items():
            setattr(module, attribute, past[name].clone() if filled else None)
        try:
            returned = self.model(**inputs, **{self._argument: cache})
            present = held_in(cache, past) | {name: getattr(*holder) for name, holder in own.items()}
        finally:
            for module, attribute in own.values():
                setattr(module, attribute, None)
        outputs = {name: value for name, value in returned.items() if name != self._argument}
        return outputs | {name.replace(_ARGUMENT, _PRESENT, 1): tensor for name, tensor in present.items()}


def _holders(model: torch.nn.Module) -> dict[tuple[int, str], tuple[torch.nn.Module, str]]:
    """Return number of a layer and name of a state -> module and attribute, of states that modules hold themselves."""
    found: dict[tuple[int, str], tuple[torch.nn.Module, str]] = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if value is None and not attribute.startswith("_") and (number := layer_number(path)) is not None:
                found.setdefault((number, attribute), (module, attribute))
    return found


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


def cache_of(past: Mapping[str, torch.Tensor], *, apart: Container[str] | None = None, filled: bool = True) -> Any:
    """Return transformers' cache that holds tensors by the names ``past_key_values.<layer>.<state>``.

    Args:
        past: The tensors; no tensor of a layer means that the layer keeps nothing.
        apart: Names of those that are not put into it, since the model keeps them elsewhere; all others have to be
            where the model looks for them. ``None``: no model looks for them.
        filled: Whether they are put into it; ``False``: the cache is that of a text that begins.

    Raises:
        ModelError: If the model cannot be looking for one in a cache (``unsupported``).
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    by_layer: dict[int, _Parts] = {}
    for name, tensor in past.items():
        if (part := kept_part(name)) is not None:
            held = by_layer.setdefault(part[0], {})
            if apart is None or name not in apart:
                held[part[1:]] = tensor
    attends_only = all(KEY_OR_VALUE.fullmatch(name) for name in past)
    for number in range(max(by_layer) + 1):
        held = by_layer.get(number, {})
        if not held and attends_only:
            # One that shall attend to something else later, such as an image.
            layer = _new_layer("full_attention")
        else:
            layer = _layer_for(frozenset(attribute for attribute, _ in held))
        if layer is None and apart is not None:
            raise ModelError(
                f"No layer of a cache of transformers holds {', '.join(sorted(a for a, _ in held))}.",
                kind=ErrorKind.UNSUPPORTED,
            )
        if layer is None:
            layer = _OtherLayer(held)
        elif filled:
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


class _OtherLayer:
    """What a layer keeps elsewhere than in a cache, as a layer of one."""

    is_compileable = False
    is_initialized = True
    supports_early_init = False

    def __init__(self, held: _Parts) -> None:
        for (attribute, number), tensor in held.items():
            setattr(self, attribute, tensor if number is None else {**getattr(self, attribute, {}), number: tensor})

    def get_max_length(self) -> int:
        """Return -1: it has no length."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take other rows, as beams do."""
        for attribute, value in vars(self).items():
            many = (
                {n: tensor.index_select(0, beam_idx) for n, tensor in value.items()}
                if isinstance(value, dict)
                else None
            )
            setattr(self, attribute, value.index_select(0, beam_idx) if many is None else many)


def _layer_for(parts: frozenset[str]) -> Any:
    """Return a layer of transformers that has room for ``parts``, and for as little else as can be; else ``None``."""
    wanted = {_ATTRIBUTES.get(part, part) for part in parts}
    fitting = [kind for kind, room in _room().items() if wanted <= room]
    return _new_layer(min(fitting, key=lambda kind: len(_room()[kind]))) if fitting else None


@remembered
def _room() -> dict[str, frozenset[str]]:
    """Return what each kind of layer has room for, of those that forget nothing."""
    room = {kind: frozenset(vars(_new_layer(kind))) for kind in _LAYER_KINDS}
    return {**room, _NOTHING: frozenset()}


def _new_layer(kind: str) -> Any:
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    return DYNAMIC_LAYER_TYPE_MAPPING[kind]()


def _fill(layer: Any, held: _Parts) -> None:
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


def flattened(value: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a dictionary of dictionaries by dotted names that begin with ``name``."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    return {key: tensor for part, held in value.items() for key, tensor in flattened(held, f"{name}.{part}").items()}
