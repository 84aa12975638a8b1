"""Keeps sizes symbolic where a model's code takes them through Python's ``len``, ``range`` and ``list``, or NumPy.

Python insists that ``len`` of a tensor and the members of a ``range`` are numbers, and NumPy that an array's sizes are,
so that tracing fixes the axis at the size of the sample. While a model is traced, its modules see these names bound to
ones that do the same with a size that is still a symbol. What functions of its package remember by their arguments is
worked out anew: a symbol cannot be looked up, and what is made while tracing is of no use to anybody later.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["Positions", "Rows", "symbolic_builtins"]

_MODELS = "transformers.models."


class Positions:
    """A list of a few numbers followed by evenly spaced ones, whose count may be a symbol.

    >>> positions = Positions([], start=0, step=1, count=7)
    >>> list([-1] + positions[1:-1][::2]), positions[-1], positions[::-1][0]
    ([-1, 1, 3, 5], 6, 6)
    """

    def __init__(self, head: Iterable[Any], *, start: Any, step: Any, count: Any) -> None:
        self.head = builtins.list(head)
        self.start, self.step, self.count = start, step, count

    def length(self) -> Any:
        """Return how many there are, a symbol where the count is one."""
        return builtins.len(self.head) + self.count

    def __len__(self) -> int:
        return int(self.length())

    def __iter__(self) -> Iterator[Any]:
        yield from self.head
        # Whoever wants each of them gets them; the count is then no longer a symbol.
        for index in builtins.range(self.count):
            yield self.start + index * self.step

    def __getitem__(self, key: Any) -> Any:
        first = builtins.len(self.head)
        if isinstance(key, slice):
            return self._slice(key)
        if key < 0:
            # An empty list is an error that a symbol cannot show, as in every graph.
            return self.start + (self.count + key) * self.step
        return self.head[key] if key < first else self.start + (key - first) * self.step

    def _slice(self, key: slice) -> Any:
        first = builtins.len(self.head)
        start, stop, step = key.start or 0, key.stop, key.step or 1
        if key == slice(None, None, -1) and not self.head:
            last = self.start + (self.count - 1) * self.step
            return Positions([], start=last, step=-self.step, count=self.count)
        if start < 0 or step < 1 or (stop is not None and stop >= 0):
            return builtins.list(self)[key]
        head = self.head[start::step]
        # How many of the evenly spaced ones lie before the first that is taken.
        skipped = start - first if start >= first else (start - first) % step
        count = (self.count + (stop or 0) - skipped + step - 1) // step
        return Positions(head, start=self.start + skipped * self.step, step=self.step * step, count=count)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, builtins.list):
            return NotImplemented
        return Positions([*other, *self.head], start=self.start, step=self.step, count=self.count)

    def tensor(self, **options: Any) -> torch.Tensor:
        """Return what ``torch.tensor`` makes of such a list."""
        tail = self.start + self.step * torch.arange(self.count, **options)
        return torch.cat([torch.tensor(self.head, dtype=tail.dtype, device=tail.device), tail]) if self.head else tail


class Rows:
    """A list of the rows of a tensor, whose count may be a symbol.

    >>> rows = Rows(torch.zeros(3, 2))
    >>> len(rows), rows[-1].shape, [row.shape for row in rows][0]
    (3, torch.Size([2]), torch.Size([2]))
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        """The rows as they lie one after another."""

    def length(self) -> Any:
        """Return how many there are, a symbol where the count is one."""
        return self.tensor.shape[0]

    def __len__(self) -> int:
        return int(self.length())

    def __iter__(self) -> Iterator[Any]:
        # Whoever wants each of them gets them; the count is then no longer a symbol.
        return iter(self.tensor)

    def __getitem__(self, key: Any) -> Any:
        return Rows(self.tensor[key]) if isinstance(key, slice) else self.tensor[key]


def _joined(original: Any, *, stack: bool) -> Any:
    """Return ``torch.cat`` or ``torch.stack`` that takes `Rows` too, and joins them without taking them apart."""

    def join(tensors: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        # Along the first axis, whether it is named or not; PyTorch takes NumPy's name of it, too.
        along = [*arguments, *(options[name] for name in ("dim", "axis") if name in options)]
        if isinstance(tensors, Rows) and len(along) == len(arguments) + len(options) and not any(along):
            return tensors.tensor if stack else tensors.tensor.flatten(0, 1)
        joined: torch.Tensor = original(tensors, *arguments, **options)
        return joined

    return join


def _len(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.shape[0]
    return value.length() if isinstance(value, (Positions, Rows)) else builtins.len(value)


class _Like(type):
    """Makes a stand-in for a built-in class recognise what that class made."""

    def __instancecheck__(cls, value: Any) -> bool:
        original = cls.__mro__[0].original  # type: ignore[attr-defined]
        return isinstance(value, original) or (original is builtins.list and isinstance(value, Rows))


class _Range(metaclass=_Like):
    original = builtins.range

    def __new__(cls, *arguments: Any) -> Any:
        start, stop, step = (0, *arguments, 1) if builtins.len(arguments) == 1 else (*arguments, 1)[:3]
        if isinstance(step, torch.SymInt) and statically_known_true(stop - start == step):
            # One step over the whole of an axis.
            return builtins.range(1) if isinstance(start, int) and start == 0 else [start]
        if not any(isinstance(a, torch.SymInt) for a in (start, stop)) or not isinstance(step, int) or step < 1:
            return builtins.range(*arguments)
        return Positions([], start=start, step=step, count=(stop - start + step - 1) // step)


class _List(metaclass=_Like):
    original = builtins.list

    def __new__(cls, *arguments: Any) -> Any:
        given = arguments[0] if arguments else None
        if isinstance(given, torch.Tensor) and given.dim() > 1 and isinstance(given.shape[0], torch.SymInt):
            return Rows(given)
        return given if isinstance(given, (Positions, Rows)) else builtins.list(*arguments)


class _Numpy:
    """NumPy, but for arrays of sizes that are symbols and what is made of them: these are tensors."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def zeros(self, shape: Any, dtype: Any = float, **options: Any) -> Any:
        return torch.zeros(shape, dtype=_dtype(dtype)) if _holds_symbols(shape) else np.zeros(shape, dtype, **options)

    def ones(self, shape: Any, dtype: Any = float, **options: Any) -> Any:
        return torch.ones(shape, dtype=_dtype(dtype)) if _holds_symbols(shape) else np.ones(shape, dtype, **options)

    def arange(self, *limits: Any, dtype: Any = None, **options: Any) -> Any:
        if not _holds_symbols(limits):
            return np.arange(*limits, dtype=dtype, **options)
        return torch.arange(*limits, dtype=None if dtype is None else _dtype(dtype))

    def array(self, data: Any, *arguments: Any, **options: Any) -> Any:
        return torch.tensor(data) if _holds_symbols(data) else np.array(data, *arguments, **options)

    def stack(self, arrays: Any, axis: int = 0, **options: Any) -> Any:
        tensors = _tensors(arrays)
        return np.stack(arrays, axis, **options) if tensors is None else torch.stack(tensors, axis)

    def concatenate(self, arrays: Any, axis: int = 0, **options: Any) -> Any:
        tensors = _tensors(arrays)
        return np.concatenate(arrays, axis, **options) if tensors is None else torch.cat(tensors, axis)


def _dtype(dtype: Any) -> torch.dtype:
    """Return torch's name for what NumPy understands by ``dtype``."""
    found: torch.dtype = getattr(torch, np.dtype(dtype).name)
    return found


def _holds_symbols(data: Any) -> bool:
    if isinstance(data, (builtins.list, tuple)):
        return any(map(_holds_symbols, data))
    return isinstance(data, torch.SymInt)


def _tensors(arrays: Any) -> builtins.list[torch.Tensor] | None:
    """Return arrays as tensors where some are; ``None`` where none is."""
    if not isinstance(arrays, (builtins.list, tuple)) or not any(isinstance(a, torch.Tensor) for a in arrays):
        return None
    return [a if isinstance(a, torch.Tensor) else torch.tensor(np.asarray(a).tolist()) for a in arrays]


def _tensor(original: Any) -> Any:
    def tensor(data: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(data, torch.Tensor) and not arguments and not options.get("requires_grad"):
            return data.detach().clone().to(**{k: v for k, v in options.items() if k in ("dtype", "device")})
        if isinstance(data, torch.SymInt):
            return torch.full((), data, **{"dtype": torch.int64, **options})  # type: ignore[call-overload]  # a symbol
        return data.tensor(**options) if isinstance(data, Positions) else original(data, *arguments, **options)

    return tensor


def _remembering(modules: Iterable[Any]) -> Iterator[tuple[Any, str, Any]]:
    """Yield module, name and function without its memory, for all functions of the modules' packages that have one."""
    packages = {module.__name__.rpartition(".")[0] for module in modules}
    for name, module in builtins.list(sys.modules.items()):
        if any(name == package or name.startswith(f"{package}.") for package in packages if package):
            for key, value in builtins.list(vars(module).items()):
                if isinstance(value, _lru_cache_wrapper):
                    yield module, key, value.__wrapped__


@contextmanager
def symbolic_builtins(model: torch.nn.Module) -> Iterator[None]:
    """Bind these names, in the modules of transformers that the model's classes come from, until the exit."""
    modules = [sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()})]
    modules = [module for module in modules if module.__name__.startswith(_MODELS)]
    names: dict[str, Any] = {"len": _len, "range": _Range, "list": _List}
    with ExitStack() as stack:
        for module in modules:
            for name in names.keys() - vars(module).keys():
                stack.enter_context(patch.object(module, name, names[name], create=True))
            for name in [name for name, value in vars(module).items() if value is np]:
                stack.enter_context(patch.object(module, name, _Numpy()))
        for module, name, plain in _remembering(modules):
            stack.enter_context(patch.object(module, name, plain))
        stack.enter_context(patch.object(torch, "tensor", _tensor(torch.tensor)))
        stack.enter_context(patch.object(torch, "cat", _joined(torch.cat, stack=False)))
        stack.enter_context(patch.object(torch, "stack", _joined(torch.stack, stack=True)))
        yield
