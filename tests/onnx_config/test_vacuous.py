"""Equations between sizes that say nothing do not stop torch; those that say something leave one size, as ever."""

from __future__ import annotations

import pytest
import sympy
from torch.fx.experimental.symbolic_shapes import DimConstraints

from onnx_config.export.vacuous import no_vacuous_equations

SIZE = sympy.Symbol("s0", positive=True, integer=True)
RANGE = {SIZE >= 89, SIZE <= 251}


class Source:
    """Where torch has a size from."""

    name = "ids.size()[1]"


def constraints(equation: sympy.Basic) -> DimConstraints:
    """Return what a trace asks of a size: a range, and an equation."""
    made = DimConstraints({SIZE: [Source()]}, {SIZE: 99}, set(), {})  # type: ignore[dict-item]  # has a name
    made._symbols_with_equalities.add(SIZE)
    made._univariate_inequalities[SIZE] = {*RANGE, equation}
    return made


def test_an_equation_that_holds_for_all_sizes_is_none() -> None:
    equation = sympy.Eq(8 * ((SIZE + 5) / 8), SIZE + 5, evaluate=False)
    with pytest.raises(AssertionError, match="Expected an equality constraint"):
        constraints(equation).solve()
    with no_vacuous_equations():
        found = constraints(equation)
        found.solve()
    assert not any("==" in result for result in found._static_results)


def test_an_equation_that_leaves_one_size_fixes_it() -> None:
    with no_vacuous_equations():
        found = constraints(sympy.Eq(SIZE, 99))
        found.solve()
    assert "ids.size()[1] == 99" in found._static_results
