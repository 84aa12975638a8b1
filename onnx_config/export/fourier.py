"""Writes Fourier transforms of few numbers as products with a table of cosines and one of sines.

Where their count is no power of two, ONNX Runtime makes the transform by way of a longer one, with angles in float32
that grow with the square of the count: that is off by more than all of a model's layers. The tables have only as many
values as there are numbers, worked out in float64, and a product with them is as exact as PyTorch's transform. The
exporter's own way back from half a spectrum, moreover, is right for even counts only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from onnx_config.export.exporter_changes import exporter_changes

__all__ = ["transforms_by_tables"]

_MOST = 4096
"""Of more numbers than this, a table of all pairs is too large."""

_Transform = Callable[[torch.Tensor, Any, str | None], torch.Tensor | None]


@contextmanager
def transforms_by_tables(model: torch.nn.Module) -> Iterator[None]:
    """Have the exporter trace the transforms of ``torch.fft`` so, also where modules keep them, until the exit."""
    made: dict[str, Callable[[Any], Any]] = {
        "fft": partial(_along_any_axis, partial(_whole, inverse=False)),
        "ifft": partial(_along_any_axis, partial(_whole, inverse=True)),
        "rfft": partial(_along_any_axis, _half),
        "irfft": partial(_along_any_axis, _from_half),
        "fftn": partial(_along_axes, partial(_whole, inverse=False)),
        "ifftn": partial(_along_axes, partial(_whole, inverse=True)),
    }
    kept = {getattr(torch.fft, name): change(getattr(torch.fft, name)) for name, change in made.items()}
    with ExitStack() as stack:
        stack.enter_context(exporter_changes(*(("torch.fft", name, change) for name, change in made.items())))
        for part in model.modules():
            for name, value in list(vars(part).items()):
                if (replaced := _replaced(value, kept)) is not None:
                    stack.enter_context(patch.dict(part.__dict__, {name: replaced}))
        yield


def _replaced(value: Any, kept: Mapping[Any, Any]) -> Any:
    """Return a function in the place of one that a module keeps; ``None``: it is none of these."""
    if isinstance(value, partial) and value.func in kept:
        return partial(kept[value.func], *value.args, **value.keywords)
    return kept.get(value) if callable(value) and isinstance(value, Hashable) else None


def _along_any_axis(transform: _Transform, original: Any) -> Any:
    """Return a function with the arguments of torch's, for a transform along the last axis that may decline."""

    def transformed(
        input: torch.Tensor,  # noqa: A002  # torch's name, used as a keyword
        n: Any = None,
        dim: int = -1,
        norm: str | None = None,
        *,
        axis: int | None = None,
    ) -> Any:
        along = dim if axis is None else axis
        result = transform(input.movedim(along, -1), n, norm)
        return original(input, n, along, norm) if result is None else result.movedim(-1, along)

    return transformed


def _along_axes(transform: _Transform, original: Any) -> Any:
    """Return a function with the arguments of torch's, for a transform of one axis after the other."""

    def transformed(
        input: torch.Tensor,  # noqa: A002  # torch's name, used as a keyword
        s: Any = None,
        dim: Any = None,
        norm: str | None = None,
    ) -> Any:
        if s is not None:
            return original(input, s, dim, norm)
        axes = range(input.dim()) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
        result = input
        for axis in reversed(axes):
            made = transform(result.movedim(axis, -1), None, norm)
            if made is None:
                return original(input, s, dim, norm)
            result = made.movedim(-1, axis)
        return result

    return transformed


def _whole(values: torch.Tensor, n: Any, norm: str | None, *, inverse: bool) -> torch.Tensor | None:
    count = values.shape[-1] if n is None else n
    given = _cut(values, count)
    if given is None or not _is_few(count):
        return None
    cosines, sines = _tables(given, count, given.shape[-1], count)
    sines = sines if inverse else -sines
    if given.is_complex():
        real = given.real @ cosines - given.imag @ sines
        imaginary = given.real @ sines + given.imag @ cosines
    else:
        real, imaginary = given @ cosines, given @ sines
    return torch.complex(*(_scaled(part, count, norm, inverse=inverse) for part in (real, imaginary)))


def _half(values: torch.Tensor, n: Any, norm: str | None) -> torch.Tensor | None:
    count = values.shape[-1] if n is None else n
    given = _cut(values, count)
    if given is None or not _is_few(count):
        return None
    cosines, sines = _tables(given, count, given.shape[-1], count // 2 + 1)
    return torch.complex(*(_scaled(given @ table, count, norm, inverse=False) for table in (cosines, -sines)))


def _from_half(values: torch.Tensor, n: Any, norm: str | None) -> torch.Tensor | None:
    count = 2 * (values.shape[-1] - 1) if n is None else n
    given = _cut(values, count // 2 + 1)
    if given is None or not _is_few(count):
        return None
    cosines, sines = _tables(given, count, given.shape[-1], count)
    # All frequencies but the first one, and the last one of an even count, stand for their mirror images too.
    index = torch.arange(given.shape[-1], device=given.device)
    alone = (index == 0) | (index * 2 == _number(count, torch.int64, given.device))
    weights = (2 - alone.to(cosines.dtype)).unsqueeze(-1)
    return _scaled(given.real @ (cosines * weights) - given.imag @ (sines * weights), count, norm, inverse=True)


def _cut(values: torch.Tensor, count: Any) -> torch.Tensor | None:
    """Return at most ``count`` of the last axis: what lacks to them counts as zeros; ``None``: it is not known."""
    given = values.shape[-1]
    if statically_known_true(given <= count):
        return values
    return values[..., :count] if statically_known_true(given > count) else None


def _is_few(count: Any) -> bool:
    if isinstance(count, torch.SymInt):
        return bool(count.node.shape_env.bound_sympy(count.node.expr).upper <= _MOST)
    return bool(count <= _MOST)


def _tables(values: torch.Tensor, count: Any, rows: Any, columns: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and the sine of each row's number times each column's, in ``count`` parts of a circle."""
    device = values.device
    circle = torch.arange(count, dtype=torch.float64, device=device)
    circle = circle * (2 * math.pi) / _number(count, torch.float64, device)
    products = torch.arange(rows, device=device).unsqueeze(-1) * torch.arange(columns, device=device)
    places = torch.remainder(products, _number(count, torch.int64, device))
    return circle.cos().to(values.real.dtype)[places], circle.sin().to(values.real.dtype)[places]


def _scaled(sums: torch.Tensor, count: Any, norm: str | None, *, inverse: bool) -> torch.Tensor:
    if norm != "ortho" and inverse is not (norm in (None, "backward")):
        return sums
    divisor = _number(count, sums.dtype, sums.device)
    return sums / (divisor.sqrt() if norm == "ortho" else divisor)


def _number(count: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Return a number that may be a symbol as a tensor."""
    return torch.full((), count, dtype=dtype, device=device)
