"""Undo what a forward pass leaves behind in a model's modules.

Some models write into themselves while they run (Swin shrinks its windows to a small image and keeps
them so; models that record hidden states hang hooks on their layers), and would then answer the next
call otherwise than a fresh model does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["preserved_state"]

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Restore on exit which attributes, parameters, buffers, submodules and hooks each module has.

    Dictionaries, lists and sets among the attributes get back what they held, to a depth of one. What a
    tensor holds is not copied: a buffer that is written in place keeps what was written.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]] = []
    for module in model.modules():
        plain = dict(module.__dict__)
        containers = [(value, copy(value)) for value in plain.values() if type(value) in _CONTAINERS]
        kept.append((module.__dict__, plain, containers))
    try:
        yield
    finally:
        for attributes, plain, containers in kept:
            attributes.clear()
            attributes.update(plain)
            for container, content in containers:
                # Most of the thousands are empty, and were.
                if container or content:
                    _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
