"""Keeps sizes symbolic where a model's code reckons with numbers that it keeps as tensors without axes.

An audio codec's convolutions keep their kernels' sizes and strides so, and reckon from them how much a sound has to be
filled up. What is reckoned of a size and a tensor is a tensor, whose value no trace knows; of a size and a number it is
a size. Such a tensor is computed from the config alone, so that while a model is traced its number stands in its place.
What is rounded up is kept as a quotient, and is whole numbers again once it is multiplied.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["numbers_of_tensors"]


class _Number(int):
    """A whole number that is taken for the tensor without axes that held it."""

    def item(self) -> int:
        return int(self)

    def __getattr__(self, name: str) -> Any:
        # Whatever else a tensor has, that of its number has too; torch's functions are not to take it for one.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.full((), int(self), dtype=torch.int64), name)

    def __rtruediv__(self, other: Any) -> Any:
        return _Quotient(other, int(self)) if _is_whole(other) else NotImplemented


def _plainly(name: str, *, reflected: bool) -> Any:
    """Return an operator of `_Number` that reckons with the number itself: a symbol takes no other."""
    operation = getattr(operator, name)

    def plainly(self: _Number, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented
        return operation(other, int(self)) if reflected else operation(int(self), other)

    return plainly


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(_Number, f"__{_name}__", _plainly(_name, reflected=False))
    setattr(_Number, f"__r{_name}__", _plainly(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Number, f"__{_name}__", _plainly(_name, reflected=False))


class _Quotient:
    """A quotient of whole numbers, of which the first may be a symbol, that is reckoned with exactly.

    >>> (torch.ceil(_Quotient(7, 4) + 1).to(torch.int64) - 1) * 4
    8
    >>> torch.floor(_Quotient(7, 4)).item()
    1
    """

    def __init__(self, over: Any, under: int) -> None:
        self.over, self.under = over, under

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ceil and not kwargs:
            quotient = args[0]
            # A remainder is known to be less than what it is one of, which a rounded quotient is not known to be.
            return _Quotient(quotient.over + -quotient.over % quotient.under, quotient.under)
        if func is torch.floor and not kwargs:
            quotient = args[0]
            return _Quotient(quotient.over - quotient.over % quotient.under, quotient.under)
        return NotImplemented

    def item(self) -> Any:
        """Return the whole number that it was rounded to."""
        return self.over // self.under

    def to(self, *_: Any, **__: Any) -> _Quotient:
        return self

    long = int = to

    def __add__(self, other: Any) -> Any:
        return _Quotient(self.over + other * self.under, self.under) if _is_whole(other) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + -other if _is_whole(other) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        if not _is_whole(other):
            return NotImplemented
        whole = isinstance(other, int) and not other % self.under
        return self.over * (other // self.under) if whole else self.item() * other

    __rmul__ = __mul__


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _of_plain(original: Any) -> Any:
    def of_plain(first: Any, second: Any) -> Any:
        return original(first, int(second) if isinstance(second, _Number) else second)

    return of_plain


def _numbers(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, int]]:
    """Yield module, name and value of whole numbers that modules keep as tensors, and no checkpoint holds."""
    for module in model.modules():
        kept = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        for name, tensor in (kept | vars(module)).items():
            plain = isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Buffer)
            if plain and tensor.dim() == 0 and tensor.dtype == torch.int64 and not tensor.is_meta:
                yield module, name, int(tensor)


@contextmanager
def numbers_of_tensors(model: torch.nn.Module) -> Iterator[None]:
    """Let a model's modules have numbers in the place of such tensors until the exit."""
    with ExitStack() as stack:
        for module, name, value in list(_numbers(model)):
            if name in module._buffers:
                stack.callback(module._buffers.__setitem__, name, module._buffers.pop(name))
                stack.callback(vars(module).pop, name)
                vars(module)[name] = _Number(value)
            else:
                stack.enter_context(patch.dict(vars(module), {name: _Number(value)}))
        for name in ("__sym_max__", "__sym_min__"):
            stack.enter_context(patch.object(torch.SymInt, name, _of_plain(getattr(torch.SymInt, name))))
        yield
