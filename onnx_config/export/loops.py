"""Loops over time written in Python, made into one operator of the graph.

A recurrent model goes over its sequence with ``for i in range(seq_len)``, and a trace of that holds for the one length
that it was made at. Where a step reads the ``i``-th part of some tensors, what the step before left, and things that
are the same for all steps, and makes the ``i``-th part of others, the loop is a scan, which ONNX has. Such loops are
found in the source of the model's own module and rewritten while it is traced: as often as a number says they run as
they stand, and as often as an axis is long they become ``torch.ops.higher_order.scan``. Any other loop is left alone.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import torch

from onnx_config.export import chunks_of, steps_in_turn, substitutions, triangular, windows
from onnx_config.export.substitutions import beside_substitution
from onnx_config.export.windows import Windows

__all__ = ["loops_as_scans", "rewritten"]

_HELPER = "_ferry_steps"
_HELPERS = {_HELPER: steps_in_turn, substitutions.HELPER: triangular, windows.HELPER: chunks_of}
"""What rewritten code calls, by the names under which it finds it."""
_MODELS = "transformers.models."
_REFUSED = (
    *(ast.Lambda, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)


class _NoScanError(Exception):
    """A loop is none that could be one operator."""


@contextmanager
def loops_as_scans(model: torch.nn.Module) -> Iterator[None]:
    """Trace the loops over time in a model's own modules as one operator each; the modules are the same afterwards."""
    names = {type(module).__module__ for module in model.modules()}
    changed = False
    with ExitStack() as changes:
        for name in sorted(names):
            module = sys.modules.get(name)
            if module is None or not _is_models(name):
                continue
            for function, code in _rewritten_in(module):
                # Wherever the function is referred to, and however it is wrapped, it is this code that runs.
                changes.callback(setattr, function, "__code__", function.__code__)
                function.__code__ = code
                changes.enter_context(patch.dict(function.__globals__, _HELPERS))
                changed = True
        if changed:
            # What torch remembers of a scan's body it finds again by the names of modules, in another trace too.
            torch._dynamo.reset()
            changes.callback(torch._dynamo.reset)
        yield


def _is_models(name: str) -> bool:
    return name.startswith(_MODELS)


@cache
def _rewritten_in(module: ModuleType) -> tuple[tuple[FunctionType, CodeType], ...]:
    found = {id(function): function for function in _functions(module)}
    codes = [(function, rewritten(function)) for function in found.values()]
    return tuple((function, code) for function, code in codes if code is not None)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Yield the functions and methods that are written in a module, without what is wrapped around them."""
    for value in vars(module).values():
        inside: Iterable[Any] = vars(value).values() if inspect.isclass(value) else (value,)
        for member in inside:
            function = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
            function = getattr(function, "__func__", function)
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def rewritten(function: FunctionType) -> CodeType | None:
    """Return the code of a function with its scans made operators; ``None`` where it has none."""
    code = function.__code__
    if code.co_freevars or "range" not in code.co_names:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return None
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list.clear()
    loops = _Loops(definition, frozenset((*code.co_varnames, *code.co_cellvars)))
    loops.visit(definition)
    if not loops.lists and not loops.changed:
        return None
    _Joins(loops.lists).visit(definition)
    ast.increment_lineno(ast.fix_missing_locations(tree), code.co_firstlineno - 1)
    compiled = compile(tree, code.co_filename, "exec", dont_inherit=True)
    return next(c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == code.co_name)


class _Loops(ast.NodeTransformer):
    """Puts a scan beside each loop that is one."""

    def __init__(self, definition: ast.FunctionDef, local: frozenset[str]) -> None:
        self._definition = definition
        self._local = local
        self.changed = False
        self.lists: set[str] = set()
        """Names of the lists that steps append to."""

    def visit_For(self, node: ast.For) -> ast.AST:
        try:
            scan = self._scan_of(node, node)
        except _NoScanError:
            if (chunks := self._over_chunks(node)) is not None:
                return chunks
            if (both := beside_substitution(node)) is not None:
                self.changed = True
                return both
            return self.generic_visit(node)
        self.changed = True
        return ast.copy_location(scan.beside(node), node)

    def _scan_of(self, loop: ast.For, written: ast.For, more: frozenset[str] = frozenset()) -> _Scan:
        """Return what a loop that stands for the one that is written there consists of.

        Raises:
            _NoScanError: If it is no scan, or what it appends to is used for something else.
        """
        scan = _Scan.of(loop, self._local | more)
        if any(not _only_joined(self._definition, name, written) for name in scan.lists):
            raise _NoScanError
        self.lists |= scan.lists.keys()
        return scan

    def _over_chunks(self, loop: ast.For) -> ast.AST | None:
        """Return a scan over chunks of so many tokens beside a loop; ``None``: it is no such loop."""
        found = Windows.of(loop, self._local)
        if found is None:
            return None
        both, whole = found.beside()
        try:
            scan = self._scan_of(whole, loop, frozenset(("_kept", *found.taken.values())))
        except _NoScanError:
            return None
        chosen = both.body[-1]
        assert isinstance(chosen, ast.If)
        chosen.body[chosen.body.index(whole)] = scan.beside(whole)
        own = {id(node) for node in ast.walk(loop)}
        for node in ast.walk(both):
            if id(node) not in own and isinstance(node, ast.stmt | ast.expr | ast.arg):
                ast.copy_location(node, loop)
        self.changed = True
        return both


class _Joins(ast.NodeTransformer):
    """Lets what the steps appended be put together."""

    def __init__(self, lists: set[str]) -> None:
        self._lists = lists

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if (name := _joined_list(node)) in self._lists and name is not None:
            made = "stacked" if ast.unparse(node.func) == "torch.stack" else "joined"
            node.func = ast.copy_location(_expression(f"{_HELPER}.{made}"), node.func)
        return node


def _joined_list(node: ast.AST) -> str | None:
    """Return the name of the list that a call puts together."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.stack", "torch.cat") and node.args:
        first = node.args[0]
        if isinstance(first, ast.Name) and all(k.arg == "dim" for k in node.keywords):
            return first.id
    return None


def _only_joined(definition: ast.FunctionDef, name: str, loop: ast.For) -> bool:
    """Return whether a list that nothing else knows is put together after a loop and used for nothing else."""
    for statement in _before(definition, loop):
        if name in _names_in(statement, ast.Load):
            return False
        if name in _names_in(statement, ast.Store):
            # Of two names at once, the other one may know it.
            if isinstance(statement, ast.AnnAssign) or (
                isinstance(statement, ast.Assign) and len(statement.targets) == 1
            ):
                break
            return False
    else:
        return False
    for statement in _afterwards(definition, loop):
        joined = {id(n.args[0]) for n in ast.walk(statement) if isinstance(n, ast.Call) and _joined_list(n) == name}
        uses = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name]
        if any(isinstance(use.ctx, ast.Load) and id(use) not in joined for use in uses):
            return False
        if isinstance(statement, ast.Assign) and any(_is_name(target, name) for target in statement.targets):
            # It stands for something else from there on.
            break
    return True


def _around(definition: ast.FunctionDef, loop: ast.For) -> Iterator[tuple[ast.AST, list[ast.stmt], list[ast.stmt]]]:
    """Yield what a loop lies in, from the inside out, each with the statements before and after it there."""
    inner: ast.AST = loop
    while inner is not definition:
        (outer,) = (n for n in ast.walk(definition) if inner in ast.iter_child_nodes(n))
        blocks = [getattr(outer, name, []) for name in ("body", "orelse", "finalbody")]
        for block in (block for block in blocks if inner in block):
            at = block.index(inner)
            yield outer, block[:at], block[at + 1 :]
        inner = outer


def _before(definition: ast.FunctionDef, loop: ast.For) -> Iterator[ast.stmt]:
    """Yield the statements that ran before a loop, the last one first."""
    for _, before, _ in _around(definition, loop):
        yield from reversed(before)


def _afterwards(definition: ast.FunctionDef, loop: ast.For) -> Iterator[ast.stmt]:
    """Yield the statements that may run after a loop, in the order in which they do; around it, those of all turns."""
    for outer, before, after in _around(definition, loop):
        yield from after
        if isinstance(outer, ast.For | ast.While):
            yield from before


def _names_in(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


@dataclass(slots=True)
class _Scan:
    """A loop taken apart."""

    index: str
    count: ast.expr
    local: frozenset[str]
    body: list[ast.stmt] = field(default_factory=list)
    """The statements of one step."""
    assigned: list[str] = field(default_factory=list)
    """Names that a step writes, in its order."""
    carried: list[str] = field(default_factory=list)
    """Those that it reads before."""
    sliced: dict[tuple[str, int], str] = field(default_factory=dict)
    """Tensor and axis of which a step reads one part -> the part's name."""
    same: list[str] = field(default_factory=list)
    """Names that are the same for all steps."""
    asked: set[str] = field(default_factory=set)
    """Those of which a step wants to know the element type or the device only."""
    own: dict[str, str] = field(default_factory=dict)
    """What belongs to something that is the same for all steps, as ``self.weight`` does -> its name in a step."""
    stored: list[tuple[str, int, str]] = field(default_factory=list)
    """Tensor and axis of which a step writes one part, and the name of what it writes."""
    lists: dict[str, str] = field(default_factory=dict)
    """List that a step appends to -> the name of what it appends."""

    @classmethod
    def of(cls, loop: ast.For, local: frozenset[str]) -> _Scan:
        """Return what a loop consists of.

        Raises:
            _NoScanError: If it is no scan.
        """
        call = loop.iter
        if (
            loop.orelse
            or not isinstance(loop.target, ast.Name)
            or not isinstance(call, ast.Call)
            or ast.unparse(call.func) != "range"
            or len(call.args) != 1
            or call.keywords
            or any(isinstance(node, _REFUSED) for node in ast.walk(loop))
        ):
            raise _NoScanError
        scan = cls(index=loop.target.id, count=call.args[0], local=local)
        written = {name for statement in loop.body for name in _written(statement)}
        for statement in loop.body:
            scan._add(statement, written)
        # What a step writes to is nothing that a step reads.
        owners = {owner.split(".")[0] for owner in scan.own}
        read = {*scan.same, *scan.carried, *(name for name, _ in scan.sliced), *owners}
        scan.same += sorted(scan.asked - read)
        targets = [*(name for name, _, _ in scan.stored), *scan.lists]
        if not scan.sliced or len(set(targets)) < len(targets) or read & set(targets) or written & set(targets):
            raise _NoScanError
        return scan

    def _add(self, statement: ast.stmt, written: set[str]) -> None:
        match statement:
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=target)) as place], value=value):
                axis, rest = _part(place.slice, self.index)
                if axis is None or any(not _is_whole(element) for element in rest):
                    raise _NoScanError
                name = f"_made_{len(self.stored)}"
                self.body.append(_assign(name, self._read(value, written)))
                self.stored.append((target, axis, name))
            case ast.Assign(targets=[target], value=value):
                self.body.append(ast.Assign(targets=[target], value=self._read(value, written)))
                self.assigned += [name for name in _written(statement) if name not in self.assigned]
            case ast.AugAssign(target=ast.Name(id=name), op=operation, value=value):
                self._note_read(name, written)
                read = ast.BinOp(left=ast.Name(id=name, ctx=ast.Load()), op=operation, right=self._read(value, written))
                self.body.append(_assign(name, read))
                self.assigned += [name] if name not in self.assigned else []
            case ast.Expr(
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=entries), attr="append"), args=[value], keywords=[])
            ):
                name = f"_entry_{len(self.lists)}"
                if entries in self.lists:
                    raise _NoScanError
                self.body.append(_assign(name, self._read(value, written)))
                self.lists[entries] = name
            case _:
                raise _NoScanError

    def _read(self, value: ast.expr, written: set[str]) -> ast.expr:
        read: ast.expr = _Reads(self, written).visit(ast.parse(ast.unparse(value), mode="eval").body)
        return read

    def _note_read(self, name: str, written: set[str]) -> None:
        if name == self.index:
            raise _NoScanError
        if name in written:
            if name not in self.assigned and name not in self.carried:
                self.carried.append(name)
        elif name in self.local and name not in self.same:
            self.same.append(name)

    def beside(self, loop: ast.For) -> ast.If:
        """Return the loop as it stands and as an operator, and the question which it is to be."""
        parameters = [*self.carried, *self.sliced.values(), *self.same, *self.own.values()]
        made = [*(name for _, _, name in self.stored), *self.lists.values()]
        lost = [name for name in self.assigned if name not in self.carried]
        sliced = _tuple(f"({name}, {axis})" for name, axis in self.sliced)
        stored = _tuple(f"({name}, {axis})" for name, axis, _ in self.stored)
        carried, lists, same = _tuple(self.carried), _tuple(self.lists), _tuple([*self.same, *self.own])
        question = ", ".join([ast.unparse(self.count), carried, sliced, stored, lists])
        lines = [
            f"if {_HELPER}.can_be_one({question}):",
            f"    def _step({', '.join(parameters)}):",
            f"        return {carried}, {_tuple(made)}",
            f"    _left, _all = {_HELPER}.all_steps(_step, {carried}, {sliced}, {same})",
            *(f"    {name} = _left[{at}]" for at, name in enumerate(self.carried)),
            *(f"    {_HELPER}.store({name}, _all[{at}], {axis})" for at, (name, axis, _) in enumerate(self.stored)),
            *(
                f"    {name} = {_HELPER}.Taken(_all[{at}])"
                for at, name in enumerate(self.lists, start=len(self.stored))
            ),
            # Whoever reads what the last step left in passing is told that it is not there.
            *(f"    {name} = None; del {name}" for name in lost),
            "else:",
            "    pass",
        ]
        (both,) = ast.parse("\n".join(lines)).body
        assert isinstance(both, ast.If)
        step = both.body[0]
        assert isinstance(step, ast.FunctionDef)
        step.body[:0] = self.body
        both.orelse = [loop]
        own = {id(node) for node in ast.walk(loop)}
        for node in ast.walk(both):
            if id(node) not in own and hasattr(node, "lineno"):
                ast.copy_location(node, loop)
        return both


class _Reads(ast.NodeTransformer):
    """Replaces the part of a tensor that a step reads by a name of its own, and notes what else is read."""

    def __init__(self, scan: _Scan, written: set[str]) -> None:
        self._scan = scan
        self._written = written

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        axis, rest = _part(node.slice, self._scan.index)
        if axis is None:
            return self.generic_visit(node)
        if not isinstance(node.value, ast.Name) or node.value.id in self._written:
            raise _NoScanError
        if node.value.id not in self._scan.local or not all(_is_basic(element) for element in rest):
            raise _NoScanError
        part = self._scan.sliced.setdefault((node.value.id, axis), f"_part_{len(self._scan.sliced)}")
        name = ast.Name(id=part, ctx=ast.Load())
        if not rest:
            return name
        return ast.Subscript(value=name, slice=ast.Tuple(elts=rest, ctx=ast.Load()), ctx=ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        name = node.value.id if isinstance(node.value, ast.Name) else None
        if name in self._scan.local and name not in self._written and node.attr in ("dtype", "device"):
            assert name is not None
            self._scan.asked.add(name)
            return node
        owner: ast.expr = node
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        # What a tensor tells of itself a step is told by its own one.
        same = self._scan.local - self._written - {self._scan.index}
        if isinstance(owner, ast.Name) and owner.id in same and not hasattr(torch.Tensor, node.attr):
            part = self._scan.own.setdefault(ast.unparse(node), f"_own_{len(self._scan.own)}")
            return ast.Name(id=part, ctx=ast.Load())
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute):
            # A method is asked for each time.
            node.func.value = self.visit(node.func.value)
        else:
            node.func = self.visit(node.func)
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self._scan._note_read(node.id, self._written)
        return node


def _part(index: ast.expr, name: str) -> tuple[int | None, list[ast.expr]]:
    """Return which axis a subscript takes the ``name``-th part of, ``None`` for none, and what it does beside.

    >>> _part(ast.parse("x[:, i, None]", mode="eval").body.slice, "i")[0]
    1
    """
    elements = list(index.elts) if isinstance(index, ast.Tuple) else [index]
    at = [i for i, element in enumerate(elements) if isinstance(element, ast.Name) and element.id == name]
    if len(at) != 1:
        return None, elements
    before, after = elements[: at[0]], elements[at[0] + 1 :]
    rest = [*before, *after]
    if any(_is_constant(element, ...) for element in before):
        return -1 - sum(not _is_constant(element, None) for element in after), rest
    return sum(not _is_constant(element, None) for element in before), rest


def _is_constant(element: ast.expr, value: object) -> bool:
    return isinstance(element, ast.Constant) and element.value is value


def _is_whole(element: ast.expr) -> bool:
    whole = isinstance(element, ast.Slice) and element.lower is None and element.upper is None and element.step is None
    return whole or _is_constant(element, ...)


def _is_basic(element: ast.expr) -> bool:
    return isinstance(element, ast.Slice | ast.Constant)


def _written(statement: ast.stmt) -> list[str]:
    """Return the names that a statement assigns to."""
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _assign(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=value)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _tuple(items: Iterable[str]) -> str:
    return "(" + "".join(f"{item}, " for item in items) + ")"
