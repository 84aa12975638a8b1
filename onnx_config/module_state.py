"""Undo what a forward pass leaves behind in a model's modules.

Some models write into themselves while they run (Swin shrinks its windows to a small image and keeps
them so), and would then answer the next call otherwise than a fresh model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["preserved_state"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Restore on exit which attributes, parameters, buffers and submodules each module has.

    What a tensor holds is not copied: a buffer that is written in place keeps what was written.
    """
    kept: list[tuple[torch.nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = []
    for module in model.modules():
        plain = dict(module.__dict__)
        kept.append((module, plain, {name: dict(plain[name]) for name in _CONTAINERS}))
    try:
        yield
    finally:
        for module, plain, containers in kept:
            module.__dict__.clear()
            module.__dict__.update(plain)
            for name, content in containers.items():
                container = module.__dict__[name]
                container.clear()
                container.update(content)
