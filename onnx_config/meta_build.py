"""Builds a class on the meta device: all of its modules, none of its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["built_on_meta"]

_FILLS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("bernoulli_", "exponential_", "fill_", "log_normal_", "normal_", "random_", "uniform_", "zero_")
) | {torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.constant_, torch.nn.init.kaiming_uniform_}
"""What gives a tensor other numbers and returns it; those of ``torch.nn.init`` that a mode gets to see."""


class _NoNumbers(DeviceContext):
    """Makes tensors on the meta device, and spares filling them: that takes most of the time, and has no effect.

    A mode of the thread rather than a patch, so that a model which another thread builds is filled as ever.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # as above


def built_on_meta(cls: Callable[[Any], torch.nn.Module], config: PreTrainedConfig | None) -> torch.nn.Module:
    """Return ``cls(config)`` with parameters that have shapes and types, and no numbers.

    ``config`` stays as it is; building may write into it (the attention it chose, say), so that a copy is given.

    Raises:
        Exception: Whatever the class raises when it cannot be built from the config.
    """
    config = copy.deepcopy(config)
    with _NoNumbers():
        return cls(config)
