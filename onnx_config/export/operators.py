"""Keeps sizes symbolic in operators that torch traces with the sample's sizes only.

``max_pool1d`` reads the length of what it pools as a number; as a two-dimensional pooling of one row it does not.
``div`` makes a tensor of a quotient of two sizes, whose value nobody knows while a graph is made; ``linspace`` makes as
many numbers as for the sample, ``eye`` is taken apart into ones of the sample's size, and a list of sizes becomes a
tensor of the sample's. Pooling to a number of cells reads
which cells lie at which sizes of the sample. What is counted from the end by a size is counted from the start, and a
range that is as long as an axis picks what a tensor of its numbers does. An axis that is squeezed where it has one
step, and has more, stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from onnx_config.export.symbolic import Positions

__all__ = ["symbolic_operators"]


_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_ONE_ROW = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


def _max_pool1d(original: Any) -> Any:
    def max_pool1d(
        input: torch.Tensor,  # noqa: A002  # torch's name, used as a keyword
        *arguments: Any,
        **options: Any,
    ) -> Any:
        given = {**dict(zip(_POOLING, arguments, strict=False)), **options}
        if given.get("return_indices") or not any(isinstance(size, torch.SymInt) for size in input.shape):
            return original(input, *arguments, **options)
        rows: dict[str, Any] = {
            name: (edge, _one(given[name])) for name, edge in _ONE_ROW.items() if given.get(name) is not None
        }
        pooled = torch.nn.functional.max_pool2d(input.unsqueeze(-2), ceil_mode=given.get("ceil_mode", False), **rows)
        return pooled.squeeze(-2)

    return max_pool1d


def _adaptive_avg_pool(axes: int) -> Any:
    """Return what makes a pooling of the last ``axes`` axes to so many cells each one that holds at all sizes."""

    def made(original: Any) -> Any:
        def adaptive_avg_pool(
            input: torch.Tensor,  # noqa: A002  # torch's name, used as a keyword
            output_size: Any,
        ) -> Any:
            wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * axes
            sizes = input.shape[-axes:]
            symbols = any(isinstance(size, torch.SymInt) for size in (*sizes, *wanted))
            # One cell alone is the mean of all.
            if not symbols or len(wanted) != axes or all(isinstance(w, int) and w == 1 for w in wanted):
                return original(input, output_size)
            pooled = input
            for axis, (size, cells) in enumerate(zip(sizes, wanted, strict=True), start=-axes):
                if cells is not None:
                    within = _cells(size, cells, input.dtype, input.device)
                    sums = torch.matmul(pooled.transpose(axis, -1), within) / within.sum(dim=0)
                    pooled = sums.transpose(axis, -1)
            return pooled

        return adaptive_avg_pool

    return made


def _cells(size: Any, cells: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Return a table (size, cells) of ones where a place lies in a cell; neighbours may share a place."""
    length, count = (_number(number, torch.int64, device) for number in (size, cells))
    cell = torch.arange(cells, device=device)
    place = torch.arange(size, device=device).unsqueeze(-1)
    first, behind = cell * length // count, ((cell + 1) * length + count - 1) // count
    return ((place >= first) & (place < behind)).to(dtype)


def _div(original: Any) -> Any:
    def div(first: Any, second: Any, **options: Any) -> Any:
        sizes = (first, second)
        # Sizes are not negative, so that both kinds of rounding are one.
        rounded = options.get("rounding_mode") in ("trunc", "floor")
        if rounded and any(isinstance(s, torch.SymInt) for s in sizes) and not isinstance(first + second, torch.Tensor):
            return first // second
        return original(first, second, **options)

    return div


def _linspace(original: Any) -> Any:
    def linspace(start: Any, end: Any, steps: Any, **options: Any) -> Any:
        known = {"dtype", "device", "requires_grad"}
        symbols = any(isinstance(value, (torch.SymInt, torch.SymFloat)) for value in (start, end, steps))
        if not symbols or options.keys() - known or options.get("requires_grad"):
            return original(start, end, steps, **options)
        dtype, device = options.get("dtype") or torch.get_default_dtype(), options.get("device")
        if not dtype.is_floating_point:
            return original(start, end, steps, **options)
        first, last = (
            value if isinstance(value, torch.Tensor) else _number(value, dtype, device) for value in (start, end)
        )
        index = torch.arange(steps, dtype=dtype, device=device)
        behind = _number(steps - 1, dtype, device)
        # One number alone is the first; PyTorch counts from whichever end is nearer.
        step = (last - first) / behind.clamp(min=1)
        half = _number(steps // 2, dtype, device).clamp(min=1)
        return torch.where(index < half, first + step * index, last - step * (behind - index))

    return linspace


def _eye(original: Any) -> Any:
    def eye(n: Any, m: Any = None, **options: Any) -> Any:
        rows, columns = n, n if m is None else m
        known = {"dtype", "device", "requires_grad"}
        symbols = any(isinstance(size, torch.SymInt) for size in (rows, columns))
        if not symbols or options.keys() - known or options.get("requires_grad"):
            return original(*((n,) if m is None else (n, m)), **options)
        row, column = (torch.arange(size, device=options.get("device")) for size in (rows, columns))
        return (row.unsqueeze(-1) == column).to(options.get("dtype") or torch.get_default_dtype())

    return eye


def _tensor_of(original: Any) -> Any:
    def tensor_of(data: Any, **options: Any) -> Any:
        if not isinstance(data, (list, tuple)) or not _has_symbol(data):
            return original(data, **options)
        dtype = options.get("dtype") or (torch.get_default_dtype() if _has_fraction(data) else torch.int64)
        return _stacked(data, dtype, options.get("device"))

    return tensor_of


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple)):
        for entry in data:
            yield from _leaves(entry)
    else:
        yield data


def _has_symbol(data: Any) -> bool:
    """Return whether some numbers of nested lists are symbols, and all are numbers."""
    leaves = list(_leaves(data))
    symbols = (torch.SymInt, torch.SymFloat)
    return any(isinstance(n, symbols) for n in leaves) and all(isinstance(n, (int, float, *symbols)) for n in leaves)


def _has_fraction(data: Any) -> bool:
    return any(isinstance(number, (float, torch.SymFloat)) for number in _leaves(data))


def _stacked(data: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    if isinstance(data, (list, tuple)):
        return torch.stack([_stacked(entry, dtype, device) for entry in data])
    return _number(data, dtype, device)


def _number(value: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Return a number that may be a symbol as a tensor."""
    return torch.full((), value, dtype=dtype, device=device)


def _from_numpy(original: Any) -> Any:
    def from_numpy(array: Any) -> torch.Tensor:
        # A constant with a value; the other one would have a shape only.
        types = {"float32": torch.float32, "float64": torch.float64, "int32": torch.int32, "int64": torch.int64}
        dtype = types.get(str(array.dtype))
        return original(array) if dtype is None or not array.size else torch.tensor(array.tolist(), dtype=dtype)

    return from_numpy


def _taken(original: Any) -> Any:
    def taken(tensor: torch.Tensor, key: Any) -> Any:
        key = _with_tensors(tensor, key)
        keys = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(k, slice) and _is_from_end(k) for k in keys):
            return original(tensor, key)
        if any(isinstance(k, (torch.Tensor, list, bool)) for k in keys):
            return original(tensor, key)
        return original(tensor, tuple(_from_start(tensor, keys)))

    return taken


def _written(original: Any) -> Any:
    def written(tensor: torch.Tensor, key: Any, value: Any) -> None:
        original(tensor, _with_tensors(tensor, key), value)

    return written


def _with_tensors(tensor: torch.Tensor, key: Any) -> Any:
    """Return a key with tensors in the place of ranges as long as an axis (``x[range(batch), ends]``)."""
    if isinstance(key, Positions):
        return key.tensor(device=tensor.device)
    if isinstance(key, tuple) and any(isinstance(k, Positions) for k in key):
        return tuple(k.tensor(device=tensor.device) if isinstance(k, Positions) else k for k in key)
    return key


def _is_from_end(key: slice) -> bool:
    return _counted(key.start, 0) is not key.start or _counted(key.stop, 0) is not key.stop


def _from_start(tensor: torch.Tensor, keys: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the keys with what they count from the end counted from the start.

    A model that cuts off what it filled up with does so only where that is something, and a graph has no such question:
    to leave out the last none is to take nothing when it is counted from the end, and all when from the start.
    """
    axes = [k for k in keys if k is not None and k is not Ellipsis]
    axis = 0
    for key in keys:
        if isinstance(key, slice):
            size = tensor.shape[axis]
            yield slice(_counted(key.start, size), _counted(key.stop, size), key.step)
        else:
            yield key
        if key is not None:
            axis += tensor.dim() - len(axes) if key is Ellipsis else 1


def _counted(end: Any, size: Any) -> Any:
    """Return one end of a slice, counted from the start where it is a size counted from the end."""
    return size + end if isinstance(end, torch.SymInt) and statically_known_true(end < 0) else end


def _remainder(original: Any) -> Any:
    def remainder(first: torch.Tensor, second: Any) -> Any:
        # The operator takes a number or a tensor, and a size that is a symbol is neither to it.
        if isinstance(second, torch.SymInt):
            second = torch.full((), second, dtype=torch.int64)  # type: ignore[call-overload]  # a symbol
        return original(first, second)

    return remainder


def _reversed_floor_division(original: Any) -> Any:
    def reversed_floor_division(second: torch.Tensor, first: Any) -> Any:
        # The translation of the operator reads the type of the first one, which a number does not have.
        if isinstance(first, (int, float)) and second.is_floating_point():
            return torch.full((), first, dtype=second.dtype, device=second.device) // second
        return original(second, first)

    return reversed_floor_division


def _squeezed(original: Any) -> Any:
    def squeeze(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        axis = arguments[0] if arguments else options.get("dim")
        # A symbol stands for no size of one; the operator of the graph takes no other.
        if isinstance(axis, int) and tensor.dim() and (isinstance(n := tensor.shape[axis], torch.SymInt) or n != 1):
            return tensor.view_as(tensor)
        return original(tensor, *arguments, **options)

    return squeeze


class _Context:
    """What a function with a derivative of its own keeps for it: nothing is derived in a graph."""

    def save_for_backward(self, *_: Any) -> None: ...

    def mark_dirty(self, *_: Any) -> None: ...

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def _apply(original: Any) -> Any:
    plain = original.__func__

    def apply(cls: Any, *arguments: Any, **options: Any) -> Any:
        # Those with ``setup_context`` have a forward without a context.
        if cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context:
            return plain(cls, *arguments, **options)
        return cls.forward(_Context(), *arguments, **options)

    return classmethod(apply)


def _one(value: Any) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)


def _bound_functions(model: torch.nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Return where modules keep ``apply`` of functions with a derivative of their own."""
    plain = vars(torch.autograd.Function)["apply"].__func__
    return [
        (part.__dict__, name, value)
        for part in model.modules()
        for name, value in vars(part).items()
        if isinstance(value, MethodType) and value.__func__ is plain
    ]


@contextmanager
def symbolic_operators(model: torch.nn.Module) -> Iterator[None]:
    """Replace such operators until the exit, also where the model's modules keep them."""
    functional = torch.nn.functional
    places: tuple[tuple[Any, str, Any], ...] = (
        (functional, "max_pool1d", _max_pool1d),
        (functional, "adaptive_avg_pool1d", _adaptive_avg_pool(1)),
        (functional, "adaptive_avg_pool2d", _adaptive_avg_pool(2)),
        (torch, "div", _div),
        (torch, "linspace", _linspace),
        (torch, "eye", _eye),
        (torch, "as_tensor", _tensor_of),
        (torch, "tensor", _tensor_of),
        (torch, "from_numpy", _from_numpy),
        # Not of all tensors: each would be a sequence to Python ever after, and a number a list to torch.tensor.
        (FakeTensor, "__getitem__", _taken),
        (FunctionalTensor, "__getitem__", _taken),
        (FakeTensor, "__setitem__", _written),
        (FunctionalTensor, "__setitem__", _written),
        (torch.Tensor, "__mod__", _remainder),
        (torch.Tensor, "squeeze", _squeezed),
        (torch, "squeeze", _squeezed),
        (torch.Tensor, "__rfloordiv__", _reversed_floor_division),
        (torch.autograd.Function, "apply", _apply),
    )
    bound = _bound_functions(model)
    with ExitStack() as stack:
        for owner, name, made in places:
            stack.enter_context(patch.object(owner, name, made(getattr(owner, name))))
        for values, name, value in bound:
            stack.enter_context(patch.dict(values, {name: _apply(value).__get__(None, value.__self__)}))
        yield
