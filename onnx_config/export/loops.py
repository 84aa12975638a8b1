"""Python's loops over the steps of a text, made one ONNX ``Scan``.

Recurrent models go through a text in Python, ``for step in range(length)``, so that a trace unrolls the loop for the
length that it was made with. While such a model is traced, its functions are replaced by the same functions with these
loops as `torch`'s ``scan``, where the length is a symbol: what a turn leaves to the next one is carried, and what it
appends to a list, or writes to its own place of a tensor, is stacked. A loop that does anything else stays as it is.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["Stacked", "scanned_loops"]

_MODELS = "transformers.models."
_HELPERS = ("_ferry_symbolic", "_ferry_scan", "_ferry_at", "_ferry_list", "_ferry_put")


class Stacked(list[Any]):
    """A list of as many tensors as there are steps: one tensor, the steps first, which ``torch.stack`` takes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        """(steps, …)"""


def _is_symbolic(count: Any) -> bool:
    return isinstance(count, torch.SymInt)


def _scan(body: Callable[..., Any], count: Any, carried: tuple[Any, ...]) -> Any:
    """Return what the last of ``count`` turns of ``body`` leaves, and what all of them give, the turns first."""
    from torch._higher_order_ops.scan import scan

    # A carry of its own, where there is none: torch asks for one.
    start = carried or (torch.zeros(()),)

    def turn(carry: tuple[Any, ...], index: torch.Tensor) -> tuple[Any, Any]:
        left, given = body(index.reshape(1), *(carry if carried else ()))
        # What goes out may not be what came in.
        kept = tuple(new.to(old.dtype) for new, old in zip(left, carry, strict=True)) if carried else carry
        return tuple(tensor.clone() for tensor in kept), tuple(tensor.clone() for tensor in given)

    last, stacked = scan(turn, tuple(tensor.clone() for tensor in start), torch.arange(count))
    return (last if carried else ()), tuple(stacked)


def _at(tensor: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.index_select(axis, index).squeeze(axis)


def _put(tensor: torch.Tensor, stacked: torch.Tensor, axis: int) -> torch.Tensor:
    return stacked.movedim(0, axis).to(tensor.dtype)


def _stack(original: Any) -> Any:
    def stack(tensors: Any, dim: int = 0, **options: Any) -> torch.Tensor:
        if isinstance(tensors, Stacked):
            return tensors.tensor.movedim(0, dim)
        stacked: torch.Tensor = original(tensors, dim, **options)
        return stacked

    return stack


@contextmanager
def scanned_loops(model: torch.nn.Module) -> Iterator[None]:
    """Replace such loops in the modules of transformers that the model's classes come from, until the exit."""
    modules = [sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()})]
    helpers = dict(zip(_HELPERS, (_is_symbolic, _scan, _at, Stacked, _put), strict=True))
    replaced: list[tuple[FunctionType, CodeType]] = []
    with ExitStack() as stack:
        for module in modules:
            if not module.__name__.startswith(_MODELS) or not module.__file__:
                continue
            codes = _scanned_codes(module.__file__)
            if not codes:
                continue
            for name, helper in helpers.items():
                stack.enter_context(patch.object(module, name, helper, create=True))
            for function in _functions(vars(module), module.__name__):
                code = codes.get((function.__code__.co_name, function.__code__.co_firstlineno))
                if code is not None and not function.__code__.co_freevars:
                    replaced.append((function, function.__code__))
                    function.__code__ = code
        if replaced:
            stack.enter_context(patch.object(torch, "stack", _stack(torch.stack)))
            # What torch remembers of a body would look for the helpers in a module that has them no longer.
            torch._dynamo.reset()
            stack.callback(torch._dynamo.reset)
        try:
            yield
        finally:
            for function, code in replaced:
                function.__code__ = code


def _functions(values: dict[str, Any], module: str) -> Iterator[FunctionType]:
    """Yield the functions that a module defines, its classes' methods too, also those that a decorator holds."""
    seen: set[int] = set()
    waiting = list(values.values())
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if inspect.isclass(value) and value.__module__ == module:
            waiting.extend(vars(value).values())
        elif isinstance(value, FunctionType):
            waiting.append(getattr(value, "__wrapped__", None))
            waiting.extend(cell.cell_contents for cell in value.__closure__ or () if _is_bound(cell))
            if value.__module__ == module:
                yield value


def _is_bound(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType)
    except ValueError:
        # A name that its function has not bound yet.
        return False


@cache
def _scanned_codes(path: str) -> dict[tuple[str, int], CodeType]:
    """Return the code of the functions in a file that have such loops, by name and first line, with ``scan``."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _rewrite(node):
            wanted.add((node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])))
    if not wanted:
        return {}
    waiting = [compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)]
    codes = {}
    while waiting:
        code = waiting.pop()
        waiting.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        if (key := (code.co_name, code.co_firstlineno)) in wanted:
            codes[key] = code
    return codes


def _rewrite(function: ast.FunctionDef) -> bool:
    """Change the loops of a function in place; return whether there were any."""
    found = False
    arguments = {a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}

    def visit(statements: list[ast.stmt]) -> None:
        nonlocal found
        for position, statement in enumerate(statements):
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                continue
            if isinstance(statement, ast.For):
                before = arguments | _stored_before(function, statement)
                if (scanned := _Loop(statement, before).scanned()) is not None:
                    statements[position] = scanned
                    found = True
                continue
            for block in ("body", "orelse", "finalbody"):
                visit(getattr(statement, block, []))

    visit(function.body)
    return found


def _stored_before(function: ast.FunctionDef, loop: ast.For) -> set[str]:
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return {node.id for node in names if node.lineno < loop.lineno}


class _UnlikeError(Exception):
    """The loop does what a scan cannot."""


class _Loop(ast.NodeTransformer):
    """One loop, whose body becomes that of a scan."""

    def __init__(self, loop: ast.For, before: set[str]) -> None:
        self._loop, self._before = loop, before
        self._index = ""
        self._lists: list[str] = []
        self._places: list[tuple[str, int]] = []

    def scanned(self) -> ast.stmt | None:
        """Return the statement that takes the loop's place; ``None``: it stays."""
        loop = self._loop
        if not isinstance(loop.target, ast.Name) or loop.orelse or (count := _count(loop.iter)) is None:
            return None
        self._index = loop.target.id
        stored = {
            n.id for s in loop.body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        carried = sorted(stored & self._before - {self._index})
        carried = [name for name in carried if _read_first(loop.body, name)]
        original = ast.unparse(loop)
        try:
            body = [self._statement(statement) for statement in ast.parse(original).body[0].body]  # type: ignore[attr-defined]
        except _UnlikeError:
            return None
        given = [*self._lists, *(name for name, _ in self._places)]
        if not given and not carried:
            return None
        lines = [f"if _ferry_symbolic({count}):", f"    def _ferry_body({', '.join([self._index, *carried])}):"]
        lines += [f"        {line}" for statement in body for line in ast.unparse(statement).splitlines()]
        lines.append(f"        return ({_tuple(carried)}, {_tuple([f'_ferry_of_{name}' for name in given])})")
        results = [f"_ferry_of_{name}" for name in given]
        lines.append(
            f"    ({_tuple(carried)}, {_tuple(results)}) = _ferry_scan(_ferry_body, {count}, {_tuple(carried)})"
        )
        lines += [f"    {name} = _ferry_list(_ferry_of_{name})" for name in self._lists]
        lines += [f"    {name} = _ferry_put({name}, _ferry_of_{name}, {axis})" for name, axis in self._places]
        lines += ["else:", *(f"    {line}" for line in original.splitlines())]
        made = ast.parse("\n".join(lines)).body[0]
        for node in ast.walk(made):
            if hasattr(node, "lineno"):
                node.lineno = node.end_lineno = loop.lineno  # type: ignore[attr-defined]
        return made

    def _statement(self, statement: ast.stmt) -> ast.stmt:
        """Return one statement of the body as it stands in the scan's."""
        if any(isinstance(node, _LEAVING) for node in ast.walk(statement)):
            raise _UnlikeError
        if isinstance(statement, ast.Expr) and (appended := _appended(statement.value)) is not None:
            name, value = appended
            if name not in self._before or name in self._lists:
                raise _UnlikeError
            self._lists.append(name)
            return ast.Assign(targets=[ast.Name(f"_ferry_of_{name}", ast.Store())], value=self.visit(value), lineno=1)
        if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            raise _UnlikeError
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            # A turn may not change in place what the one before left.
            old = ast.Name(statement.target.id, ast.Load())
            value = ast.BinOp(left=old, op=statement.op, right=statement.value)
            statement = ast.Assign(targets=[statement.target], value=value, lineno=1)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if len(targets) == 1 and isinstance(targets[0], ast.Subscript) and isinstance(statement, ast.Assign):
            axis = self._axis(targets[0])
            holder = targets[0].value
            if axis is None or not isinstance(holder, ast.Name) or holder.id in {name for name, _ in self._places}:
                raise _UnlikeError
            self._places.append((holder.id, axis))
            target = ast.Name(f"_ferry_of_{holder.id}", ast.Store())
            return ast.Assign(targets=[target], value=self.visit(statement.value), lineno=1)
        if not all(isinstance(node, (ast.Name, ast.Tuple, ast.expr_context)) for t in targets for node in ast.walk(t)):
            raise _UnlikeError
        changed: ast.stmt = self.generic_visit(statement)  # type: ignore[assignment]
        return changed

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Take the step of the turn out of a tensor."""
        node = self.generic_visit(node) if not self._reads_index(node) else node  # type: ignore[assignment]
        if not self._reads_index(node):
            return node
        axis = self._axis(node)
        if axis is None:
            raise _UnlikeError
        taken = ast.Call(
            func=ast.Name("_ferry_at", ast.Load()),
            args=[self.visit(node.value), ast.Name(self._index, ast.Load()), ast.Constant(axis)],
            keywords=[],
        )
        # What else the brackets say is said of what is left; an axis that is made stays where it was.
        rest = [part for part in _parts(node.slice) if not self._is_index(part)]
        if all(_is_full(part) for part in rest):
            return taken
        slices: ast.expr = rest[0] if len(rest) == 1 else ast.Tuple(rest, ast.Load())
        return ast.Subscript(value=taken, slice=slices, ctx=ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Let a turn ask what kind of tensor it writes to."""
        return node if isinstance(node.value, ast.Name) and node.attr in _KINDS else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Refuse a number of the turn that is used as one, and what other turns have given."""
        if node.id == self._index or node.id in self._lists or node.id in {name for name, _ in self._places}:
            raise _UnlikeError
        return node

    def _reads_index(self, node: ast.Subscript) -> bool:
        return any(isinstance(n, ast.Name) and n.id == self._index for n in ast.walk(node.slice))

    def _is_index(self, part: ast.expr) -> bool:
        return isinstance(part, ast.Name) and part.id == self._index

    def _axis(self, node: ast.Subscript) -> int | None:
        """Return which axis the brackets take one step of; ``None``: they do something else."""
        parts = _parts(node.slice)
        at = [position for position, part in enumerate(parts) if self._is_index(part)]
        if len(at) != 1 or not all(_is_full(part) for part in parts[: at[0]]):
            return None
        after = parts[at[0] + 1 :]
        return at[0] if all(_is_full(part) or _is_none(part) for part in after) else None


_KINDS = ("dtype", "device")
_LEAVING = (ast.Break, ast.Continue, ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr, ast.Lambda)


def _count(value: ast.expr) -> str | None:
    """Return how often a loop over ``value`` turns."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name) or value.func.id != "range":
        return None
    arguments: Sequence[ast.expr] = value.args
    if len(arguments) == 2 and isinstance(arguments[0], ast.Constant) and arguments[0].value == 0:
        arguments = arguments[1:]
    return ast.unparse(arguments[0]) if len(arguments) == 1 and not value.keywords else None


def _read_first(body: Sequence[ast.stmt], name: str) -> bool:
    """Return whether a turn reads ``name`` before it sets it, which is what the turn before left."""
    for statement in body:
        added_to = statement.target if isinstance(statement, ast.AugAssign) else None
        if isinstance(added_to, ast.Name) and added_to.id == name:
            return True
        names = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name]
        if any(isinstance(n.ctx, ast.Load) for n in names):
            return True
        if names:
            return False
    return False


def _appended(value: ast.expr) -> tuple[str, ast.expr] | None:
    """Return name and element of ``name.append(element)``."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "append":
        holder = value.func.value
        if isinstance(holder, ast.Name) and len(value.args) == 1 and not value.keywords:
            return holder.id, value.args[0]
    return None


def _parts(brackets: ast.expr) -> list[ast.expr]:
    return list(brackets.elts) if isinstance(brackets, ast.Tuple) else [brackets]


def _is_full(part: ast.expr) -> bool:
    return isinstance(part, ast.Slice) and part.lower is None and part.upper is None and part.step is None


def _is_none(part: ast.expr) -> bool:
    return isinstance(part, ast.Constant) and part.value is None


def _tuple(names: Sequence[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})" if names else "()"
