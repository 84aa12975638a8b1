"""Layers of a model that differ in nothing but their weights, of which a trace needs to see a few only.

Three times what repeats is kept: the first may still make what the others share, and of the other two one follows the
other as all later ones do, which `onnx_config.export.repeated_layers` looks at in the traced graph before it repeats
the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from onnx_config.cache_layout import layer_number

__all__ = ["Stack", "alike_layers", "shortened", "without_layers"]

_LEAST_SPARED = 3
_LONGEST_PERIOD = 8
_KEPT_PERIODS = 3
_CACHE = "past_key_values."
_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Layers in a list of which every one, or every so many, are alike.

    >>> stack = Stack(path="model.layers", layers=26, first=2, period=6)
    >>> stack.kept, stack.repeats
    (20, 1)
    """

    path: str
    """Of the list, among the model's modules."""

    layers: int
    """How many there are."""

    first: int
    """Index of the first that is like a later one; from it on, whole periods follow up to the end."""

    period: int
    """After how many layers they repeat."""

    @property
    def kept(self) -> int:
        """How many layers a trace needs."""
        return self.first + _KEPT_PERIODS * self.period

    @property
    def repeats(self) -> int:
        """How often the last period is repeated after that."""
        return (self.layers - self.kept) // self.period


def alike_layers(model: torch.nn.Module, inputs: Iterable[str]) -> tuple[Stack, ...]:
    """Return the lists of layers in ``model`` of which a trace can leave some out; empty: it is to see all.

    Args:
        model: A model whose parameters are there, with or without their values.
        inputs: Names of what it is called with. Where a cache is among them, a list of as many layers has to be, too.
    """
    stacks: list[Stack] = []
    said = list(_listed(model))
    for path, module in model.named_modules():
        if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            continue
        if any(path.startswith(f"{stack.path}.") for stack in stacks):
            continue
        layers = list(module)
        stack = _stack_of(path, layers, [values for values in said if len(values) == len(layers)])
        stacks += [] if stack is None else [stack]
    cached = _cached_layers(inputs)
    if not cached:
        return tuple(stacks)
    holding = [stack for stack in stacks if stack.layers == max(cached.values()) + 1]
    # Encoders and decoders of as many layers are told apart by nothing, and are cut to the same.
    deepest = max(holding, key=lambda stack: stack.kept, default=None)
    if deepest is None or any((deepest.kept - stack.kept) % stack.period for stack in holding):
        return ()
    moved = {s.path: replace(s, first=s.first + deepest.kept - s.kept) for s in holding}
    return tuple(moved.get(stack.path, stack) for stack in stacks)


@contextmanager
def shortened(model: torch.nn.Module, stacks: Iterable[Stack]) -> Iterator[None]:
    """Take the layers that a trace need not see out of their lists, until the exit."""
    taken = []
    for stack in stacks:
        modules = model.get_submodule(stack.path)._modules
        taken.append((modules, dict(modules)))
        for number in range(stack.kept, stack.layers):
            del modules[str(number)]
    try:
        yield
    finally:
        for modules, all_of_them in taken:
            modules.clear()
            modules.update(all_of_them)


def without_layers(stacks: Iterable[Stack], names: Collection[str]) -> list[str]:
    """Return the names of what a model without those layers is called with.

    >>> stacks = [Stack(path="layers", layers=6, first=0, period=1)]
    >>> without_layers(stacks, ["input_ids", *(f"past_key_values.{number}.key" for number in range(6))])
    ['input_ids', 'past_key_values.0.key', 'past_key_values.1.key', 'past_key_values.2.key']
    """
    cached = _cached_layers(names)
    count = max(cached.values(), default=0) + 1
    kept = max((stack.kept for stack in stacks if stack.layers == count), default=count)
    return [name for name in names if cached.get(name, 0) < kept]


def _cached_layers(names: Iterable[str]) -> dict[str, int]:
    """Return which layer each input is kept by, of those that are a cache's."""
    numbers = {name: layer_number(name) for name in names if name.startswith(_CACHE)}
    return {name: number for name, number in numbers.items() if number is not None}


def _stack_of(path: str, layers: list[torch.nn.Module], listed: list[Any]) -> Stack | None:
    """Return how layers repeat, if so many can be left out that it is worth it."""
    if len(layers) < _KEPT_PERIODS + _LEAST_SPARED or not any(True for _ in layers[-1].children()):
        return None
    found = None
    for period in range(1, _LONGEST_PERIOD + 1):
        first = len(layers) - period
        while first > 0 and _follow(layers, listed, first - 1, period):
            first -= 1
        stack = Stack(path=path, layers=len(layers), first=first + (len(layers) - first) % period, period=period)
        spared = stack.repeats * period
        if spared >= _LEAST_SPARED and (found is None or spared > found.repeats * found.period):
            found = stack
    return found


def _follow(layers: list[torch.nn.Module], listed: list[Any], number: int, period: int) -> bool:
    """Return whether the layer of this number is like the one a period later, in what lists say of it, too."""
    later = number + period
    return all(said[number] == said[later] for said in listed) and _is_alike(
        layers[number], layers[later], (number, later)
    )


def _listed(model: torch.nn.Module) -> Iterator[Collection[Any]]:
    """Yield the lists in the config of a model and in those of its parts: what they say of each layer is among them."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    for config in configs.values():
        yield from (value for value in vars(config).values() if isinstance(value, (list, tuple)))


def _is_alike(one: torch.nn.Module, other: torch.nn.Module, numbers: tuple[int, int]) -> bool:
    """Return whether two modules differ in nothing but what their tensors hold and which number they have."""
    if type(one) is not type(other) or one.training != other.training:
        return False
    if not all(_are_alike(getattr(one, kind), getattr(other, kind)) for kind in ("_parameters", "_buffers")):
        return False
    mine, its = ({k: v for k, v in vars(m).items() if k not in _OWN} for m in (one, other))
    if mine.keys() != its.keys() or not all(_is_equal(mine[name], its[name], numbers) for name in mine):
        return False
    children, others = dict(one.named_children()), dict(other.named_children())
    return list(children) == list(others) and all(_is_alike(children[n], others[n], numbers) for n in children)


def _are_alike(ones: Mapping[str, torch.Tensor | None], others: Mapping[str, torch.Tensor | None]) -> bool:
    return list(ones) == list(others) and all(
        (one is None) == (other is None)
        and (one is None or other is None or (one.shape == other.shape and one.dtype == other.dtype))
        for one, other in zip(ones.values(), others.values(), strict=True)
    )


def _is_equal(one: Any, other: Any, numbers: tuple[int, int]) -> bool:
    """Return whether two attributes are the same, or are each the number of its layer."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    # Not that one is off and the next is on, which compares as 0 and 1 do.
    if type(one) is int and (one, other) == numbers:
        return True
    if isinstance(one, float):
        # Such as a rate of dropout. One that counts stands in the graph, where two layers differ by it.
        return True
    if isinstance(one, _PLAIN):
        return bool(one == other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_is_equal(a, b, numbers) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_equal(one[key], other[key], numbers) for key in one)
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, partial):
        return all(
            _is_equal(getattr(one, part), getattr(other, part), numbers) for part in ("func", "args", "keywords")
        )
    # A module that is kept as a plain attribute is nobody's child.
    return isinstance(one, torch.nn.Module) and _is_alike(one, other, numbers)
