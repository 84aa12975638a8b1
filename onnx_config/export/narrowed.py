"""Lets a trace end where it holds for fewer sizes than were declared, and tells which ones it holds for.

torch refuses such a trace when all of it is done, and suggests to declare fewer sizes. Nothing of the program would be
another then; what it holds for is compared with what was declared afterwards in any case. A size that turned out to be
a constant, or to be another axis' size, is refused as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import sympy

from onnx_config.export.one_symbol import Place, place_of

__all__ = ["narrowed_sizes_told"]

_END = "produce_guards_and_solve_constraints"
"""What torch calls when it has run a model."""


@contextmanager
def narrowed_sizes_told(
    constant: Callable[[Collection[Place]], None] = lambda places: None,
) -> Iterator[Callable[[Any], Any]]:
    """Have torch refuse no trace for the range of a size until the exit; gives a function from a size to its range.

    Args:
        constant: Is given, at the end of a trace, which sizes of inputs are numbers; what it raises ends the trace.
    """
    from torch.export import _trace

    original: Callable[..., None] = getattr(_trace, _END)
    ended: list[Any] = []

    def end(**parts: Any) -> None:
        environment = parts["fake_mode"].shape_env
        ended[:] = [environment]
        constant([place_of(source) for source, *size in _sizes(environment) if _is_one_number(environment, *size)])
        if _declared_stay(environment, parts["equalities_inputs"]):
            environment.frozen = True
        else:
            original(**parts)

    def range_of(size: Any) -> Any:
        return ended[0].bound_sympy(size)

    with patch.object(_trace, _END, end):
        yield range_of


def _sizes(environment: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield where each size of an input is from, the size, and what was declared of it."""
    from torch._dynamo.source import TensorProperty, TensorPropertySource

    for tracked in environment.tracked_fakes:
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for position, constraint in enumerate(constraints):
            source = TensorPropertySource(tracked.source, TensorProperty.SIZE, position)
            yield source, tracked.fake.shape[position], constraint


def _symbol(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _is_one_number(environment: Any, size: Any, constraint: Any) -> bool:
    """Return whether a size is a number, or of one that was declared to be of a range, only one is left."""
    symbol = _symbol(size)
    if symbol.is_number or not isinstance(symbol, sympy.Symbol) or constraint is None:
        return bool(symbol.is_number)
    declared = constraint.vr & environment._default_value_range()
    return bool(environment.var_to_range[symbol].is_singleton() and not declared.is_singleton())


def _declared_stay(environment: Any, equal: Any) -> bool:
    """Return whether each size that was declared is a symbol of its own with a range."""
    if equal is not None and equal.derived_equalities:
        # An axis that is a multiple of another one becomes it only when torch has looked.
        return False
    sources: dict[sympy.Expr, Any] = {}
    for source, size, constraint in _sizes(environment):
        if constraint is None:
            continue
        symbol = _symbol(size)
        if not isinstance(symbol, sympy.Symbol) or environment.var_to_range[symbol].is_singleton():
            return False
        first = sources.setdefault(symbol, source)
        if first is not source and not equal.is_equal(first, source):
            return False
    return True
