"""Keeps the number of a tensor's elements symbolic where a model's code asks its shape for it.

``pixel_values.shape[1:].numel()`` is worked out outside of Python, of numbers only, so that a trace takes the sides of
images for those of the sample. While a model is traced, the function that asks so multiplies the sizes instead.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

__all__ = ["products_of_shapes", "rewritten"]

_HELPER = "_ferry_product"


def _product(sizes: Iterable[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


class _Products(ast.NodeTransformer):
    """Lets sizes be multiplied where a part of a shape is asked how many elements it has."""

    def __init__(self) -> None:
        self.changed = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Subscript(value=ast.Attribute(attr="shape")) as part, attr="numel"),
                args=[],
                keywords=[],
            ):
                self.changed = True
                made = ast.Call(func=ast.Name(id=_HELPER, ctx=ast.Load()), args=[part], keywords=[])
                return ast.copy_location(made, node)
        return node


def rewritten(function: Any) -> CodeType | None:
    """Return the code of a function that multiplies sizes itself; ``None`` where it asks no shape.

    >>> rewritten(lambda x: x.shape)
    """
    code: CodeType = function.__code__
    if "numel" not in code.co_names or code.co_freevars:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list.clear()
    products = _Products()
    products.visit(definition)
    if not products.changed:
        return None
    ast.increment_lineno(ast.fix_missing_locations(tree), code.co_firstlineno - 1)
    compiled = compile(tree, code.co_filename, "exec", dont_inherit=True)
    return next(c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == code.co_name)


@contextmanager
def products_of_shapes(method: Callable[..., Any]) -> Iterator[None]:
    """Have a method of a model multiply sizes itself, until the exit."""
    function: Any = inspect.unwrap(getattr(method, "__func__", method))
    function = getattr(function, "__func__", function)
    code = rewritten(function)
    if code is None:
        yield
        return
    before, known = function.__code__, function.__globals__
    function.__code__, known[_HELPER] = code, _product
    try:
        yield
    finally:
        function.__code__ = before
        known.pop(_HELPER, None)
