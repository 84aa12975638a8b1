"""Undo what a forward pass leaves behind in a model's modules.

Some models write into themselves while they run (Swin shrinks its windows to a small image and keeps
them so; models that record hidden states hang hooks on their layers), and would then answer the next
call otherwise than a fresh model does.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["forgotten_caches", "preserved_state"]

_CONTAINERS = frozenset((dict, OrderedDict, list, set))


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Restore on exit which attributes, parameters, buffers, submodules and hooks each module has.

    Dictionaries, lists and sets among the attributes get back what they held, to a depth of one. What a
    tensor holds is not copied: a buffer that is written in place keeps what was written.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    filled: list[tuple[Any, Any]] = []
    empty: list[Any] = []
    for module in model.modules():
        plain = dict(module.__dict__)
        kept.append((module.__dict__, plain))
        for value in plain.values():
            if type(value) in _CONTAINERS:
                # Most of the thousands are empty, and stay so.
                if value:
                    filled.append((value, _content(value)))
                else:
                    empty.append(value)
    try:
        yield
    finally:
        for attributes, plain in kept:
            attributes.clear()
            attributes.update(plain)
        for container, content in filled:
            _refill(container, content)
        for container in empty:
            if container:
                container.clear()


def _content(container: Any) -> tuple[Any, ...]:
    """Return what a container holds; a copy of the container itself would cost far more, an ordered one above all."""
    if not container:
        return ()
    return tuple(container.items()) if isinstance(container, dict) else tuple(container)


def _refill(container: Any, content: tuple[Any, ...]) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


@contextmanager
def forgotten_caches(model: torch.nn.Module) -> Iterator[None]:
    """Empty, before and after, what the modelling code keeps from call to call in caches of functions.

    Such a cache belongs to the process (BEiT's relative positions by window, say), so that what one model left
    there, fake tensors or those of another device, would be handed to the next.
    """
    caches = [cache for module in {type(m).__module__ for m in model.modules()} for cache in _caches_of(module)]

    def empty() -> None:
        for cache in caches:
            cache.cache_clear()

    empty()
    try:
        yield
    finally:
        empty()


def _caches_of(module: str) -> Iterator[Any]:
    """Yield the ``lru_cache`` functions of a module of transformers: its own, its methods', and those wrapped."""
    if not module.startswith("transformers.models."):
        return
    for value in list(vars(sys.modules[module]).values()):
        members = list(vars(value).values()) if isclass(value) and value.__module__ == module else [value]
        for member in members:
            function = getattr(member, "__func__", member)
            if hasattr(function, "cache_clear"):
                yield function
            elif isinstance(function, FunctionType):
                yield from (c.cell_contents for c in function.__closure__ or () if _is_cache(c))


def _is_cache(cell: Any) -> bool:
    try:
        return hasattr(cell.cell_contents, "cache_clear")
    except ValueError:
        # A name that its function has not bound yet.
        return False
