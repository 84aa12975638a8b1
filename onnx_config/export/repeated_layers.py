"""Repeats the last layers of a traced graph, for those that its trace was spared.

The nodes of a layer are told by the module that torch notes for each. That one period of layers follows from the one
before it as all do is looked at, not believed: node for node, the last is what the last but one is, with its own
weights, on what the period before it gave. A graph of which that is not so is refused, and is to be traced as a whole.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir
import torch

from onnx_config.export.alike_layers import Stack

__all__ = ["NotRepeatedError", "Repetition"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBERS = re.compile(r"(\d+)")
_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


class NotRepeatedError(ValueError):
    """The layers of a traced graph do not follow from one another as those that it lacks would have to."""


@dataclass(kw_only=True)
class Repetition:
    """Completes a graph that was traced of a model without some of its layers."""

    stacks: Sequence[Stack]
    """Lists of layers that were cut short."""

    tensors: Mapping[str, torch.Tensor]
    """The whole model's parameters and buffers, by name."""

    inputs: Sequence[str]
    """Names of all inputs, in order."""

    outputs: Sequence[str]
    """Names of the outputs that there have to be, in order."""

    _inputs: list[_Added] = field(default_factory=list)
    _outputs: list[_Added] = field(default_factory=list)

    def complete(self, model: onnx_ir.Model) -> None:
        """Put the layers into the graph that it lacks; it is as translated, and has not its final names yet.

        Raises:
            NotRepeatedError: If its layers do not repeat.
        """
        graph = model.graph
        for stack in self.stacks:
            stacked = _Stacked(stack, graph, self.tensors)
            stacked.repeat()
            self._inputs += stacked.inputs
            self._outputs += stacked.outputs
        weights = dict(graph.initializers)
        graph.initializers.clear()
        graph.initializers.update({name: weights.pop(name) for name in self.tensors if name in weights} | weights)

    def name(self, model: onnx_ir.Model) -> None:
        """Name the inputs and outputs that were added, after those of the layers that they repeat; put all in order.

        Args:
            model: The graph, whose other inputs and outputs have their names.

        Raises:
            NotRepeatedError: If some are not there that have to be.
        """
        for values, added, wanted in (
            (model.graph.inputs, self._inputs, self.inputs),
            (model.graph.outputs, self._outputs, self.outputs),
        ):
            for one in added:
                values[one.place].name = _next(_plain(values[one.before]), _plain(values[one.last]), one.repeat)
            order = {name: number for number, name in enumerate(wanted)}
            values[:] = sorted(values, key=lambda value: order.get(_plain(value), len(order)))
            if missing := order.keys() - {_plain(value) for value in values}:
                raise NotRepeatedError(f"{', '.join(sorted(missing))} is not in the graph")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    """An input or output of a layer that was added; passes may put another value in its place, and none elsewhere."""

    place: int
    """Its index among the graph's inputs or outputs."""
    before: int
    """Index of the same of the last period but one that was traced."""
    last: int
    """Index of the same of the last that was traced."""
    repeat: int
    """How many periods it comes after that."""


class _Stacked:
    """One list of layers in a graph."""

    def __init__(self, stack: Stack, graph: onnx_ir.Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        self._stack = stack
        self._graph = graph
        self._tensors = tensors
        layers = _layers(graph, stack.path)
        self._periods: tuple[list[onnx_ir.Node], ...] = ([], [], [])
        for node in graph:
            if (layer := layers.get(node)) is not None and layer >= stack.first:
                self._periods[(layer - stack.first) // stack.period].append(node)
        self._is_run = bool(layers)
        self._same: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """Value of the last period but one -> the same of the last."""
        self._handed: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """What the last period reads of the one before it -> what that one reads in its place."""
        self._numbered: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """Weight or input of the last period -> the one before it."""
        self.inputs: list[_Added] = []
        """Inputs of the graph that are new."""
        self.outputs: list[_Added] = []
        """Outputs of the graph that are new."""

    def repeat(self) -> None:
        """Put in the layers that are missing."""
        if not self._is_run:
            return
        _, before, last = self._periods
        self._pair(before, last)
        made_in = [{value for node in _nested(period) for value in node.outputs} for period in self._periods]
        for value in self._handed.values():
            if value not in made_in[0]:
                raise NotRepeatedError(f"{value.name} is no value of the period before")
        outside = self._read_outside(made_in)
        given_each = self._given_each(made_in)
        given = {value: self._same[value] for value in self._handed}
        read = list(dict.fromkeys(_read_from_outside(last)))
        made = [value for node in last for value in node.outputs]
        place, outputs = last[-1], self._graph.outputs
        view = onnx_ir.GraphView(inputs=read, outputs=made, nodes=last)
        for repeat in range(1, self._stack.repeats + 1):
            copied = view.clone()
            for value, inner in zip(read, copied.inputs, strict=True):
                inner.replace_all_uses_with(
                    self._numbered_value(value, repeat) if value in self._numbered else given.get(value, value)
                )
            new = dict(zip(made, copied.outputs, strict=True))
            nodes = list(copied)
            copied.outputs.clear()
            copied.remove(nodes)
            _rename(nodes, f"repeat_{self._stack.path}_{repeat}")
            self._graph.insert_after(place, nodes)
            place = nodes[-1]
            given = {value: new[self._same[value]] for value in self._handed}
            for one, other in given_each.items():
                self.outputs.append(_Added(place=len(outputs), before=one, last=other, repeat=repeat))
                outputs.append(new[outputs[other]])
        for node, index, value in outside:
            node.replace_input_with(index, new[value])
        for index, value in enumerate(list(outputs)):
            if value in new and index not in given_each.values():
                outputs[index] = new[value]
        self._graph.sort()

    def _pair(self, ones: Sequence[onnx_ir.Node], others: Sequence[onnx_ir.Node]) -> None:
        """Hold the nodes of two periods against each other, in their order."""
        if len(ones) != len(others) or not others:
            raise NotRepeatedError(f"{len(ones)} nodes are followed by {len(others)}")
        for one, other in zip(ones, others, strict=True):
            if one.op_identifier() != other.op_identifier() or len(one.outputs) != len(other.outputs):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
            self._same.update(zip(one.outputs, other.outputs, strict=True))
        for one, other in zip(ones, others, strict=True):
            if len(one.inputs) != len(other.inputs) or list(one.attributes) != list(other.attributes):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}, which reads otherwise")
            for mine, its in zip(one.inputs, other.inputs, strict=True):
                self._pair_values(mine, its)
            for name in one.attributes:
                self._pair_attributes(one.attributes[name], other.attributes[name])

    def _pair_attributes(self, one: onnx_ir.Attr, other: onnx_ir.Attr) -> None:
        if one.type != other.type or one.is_ref() or other.is_ref():
            raise NotRepeatedError(f"attribute {one.name} is of another kind")
        if one.type in _GRAPHS:
            graphs = [a.as_graphs() if a.type is _GRAPHS[1] else [a.as_graph()] for a in (one, other)]
            if len(graphs[0]) != len(graphs[1]):
                raise NotRepeatedError(f"attribute {one.name} holds other graphs")
            for mine, its in zip(*graphs, strict=True):
                if len(mine.inputs) != len(its.inputs) or len(mine.outputs) != len(its.outputs) or mine.initializers:
                    raise NotRepeatedError(f"attribute {one.name} holds another graph")
                self._same.update(zip(mine.inputs, its.inputs, strict=True))
                nodes, others = list(mine), list(its)
                if nodes or others:
                    self._pair(nodes, others)
                for value, other_value in zip(mine.outputs, its.outputs, strict=True):
                    self._pair_values(value, other_value)
        elif not _is_equal(one.value, other.value):
            raise NotRepeatedError(f"attribute {one.name} differs")

    def _pair_values(self, one: onnx_ir.Value | None, other: onnx_ir.Value | None) -> None:
        """Hold what two nodes read in the same place against each other."""
        if one is None or other is None:
            if one is not other:
                raise NotRepeatedError("an input is left out")
        elif one in self._same:
            if self._same[one] is not other:
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
        elif one is other:
            return
        elif other in self._same:
            if self._handed.setdefault(other, one) is not one:
                raise NotRepeatedError(f"{other.name} follows two values")
        elif (one.is_initializer() and other.is_initializer()) or (one.is_graph_input() and other.is_graph_input()):
            self._pair_numbered(one, other)
        else:
            raise NotRepeatedError(f"{one.name} is followed by {other.name}, from elsewhere")

    def _pair_numbered(self, one: onnx_ir.Value, other: onnx_ir.Value) -> None:
        kept = self._numbered.setdefault(other, one)
        if kept is not one:
            raise NotRepeatedError(f"{other.name} follows two weights")
        if self._is_written(one) and self._is_written(other):
            if (
                one.const_value is None
                or other.const_value is None
                or not _is_equal(one.const_value, other.const_value)
            ):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
        elif _step(one.name or "", other.name or "") is None:
            raise NotRepeatedError(f"{one.name} is followed by {other.name}")

    def _is_written(self, value: onnx_ir.Value) -> bool:
        """Return whether a value is what the code wrote as a number: under a name of its own for each layer."""
        return value.is_initializer() and value.name not in self._tensors

    def _numbered_value(self, value: onnx_ir.Value, repeat: int) -> onnx_ir.Value:
        """Return the weight or input that has this one's place so many periods later."""
        before = self._numbered[value]
        if self._is_written(value):
            return value
        name = _next(before.name or "", value.name or "", repeat)
        if value.is_graph_input():
            found = next((other for other in self._graph.inputs if other.name == name), None)
            if found is None:
                found = onnx_ir.Value(name=name, shape=value.shape, type=value.type)
                inputs = self._graph.inputs
                one, other = inputs.index(before), inputs.index(value)
                self.inputs.append(_Added(place=len(inputs), before=one, last=other, repeat=repeat))
                inputs.append(found)
            return found
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor, held = self._tensors.get(name), value.const_value
        if tensor is None or held is None or tuple(tensor.shape) != tuple(held.shape.numpy()):
            raise NotRepeatedError(f"{name} is no weight of this shape")
        kind: Callable[..., Any] = type(held)
        found = onnx_ir.Value(name=name, shape=value.shape, type=value.type, const_value=kind(tensor, name=name))
        self._graph.register_initializer(found)
        return found

    def _read_outside(self, made_in: Sequence[set[onnx_ir.Value]]) -> list[tuple[onnx_ir.Node, int, onnx_ir.Value]]:
        """Return who reads values of the last period after it: node, place, value.

        What is made in the periods before may be read only if it is the same for all layers.
        """
        within = {node for period in self._periods for node in _nested(period)}
        found = []
        for number, values in enumerate(made_in):
            for value in values:
                for use in value.uses():
                    if use.node in within:
                        continue
                    if number == 2:
                        found.append((use.node, use.idx, value))
                    elif not _is_of_no_layer(value):
                        raise NotRepeatedError(f"{value.name} is read by {use.node.name} after the last layer")
        return found

    def _given_each(self, made_in: Sequence[set[onnx_ir.Value]]) -> dict[int, int]:
        """Return the graph's outputs that each layer gives: index of that of the last period but one -> of the last."""
        outputs = list(self._graph.outputs)
        found = {}
        for index, value in enumerate(outputs):
            if value in made_in[1]:
                if self._same[value] not in outputs:
                    raise NotRepeatedError(f"{value.name} is an output of one layer only")
                found[index] = outputs.index(self._same[value])
        return found


def _layers(graph: onnx_ir.Graph, path: str) -> dict[onnx_ir.Node, int]:
    """Return which layer of a list each node belongs to, of those that do.

    What the model computes between two layers belongs to the later one, as does what only one layer reads.
    """
    within = re.compile(rf"{re.escape(path)}\.(\d+)(?:\.|$)")
    layers: dict[onnx_ir.Node, int] = {}
    behind: set[onnx_ir.Node] = set()
    nodes = list(graph)
    outermost = {inner: node for node in nodes for inner in _nested([node])}
    for node in nodes:
        layer = _layer(node, within)
        if layer is not None:
            layers[node] = layer
        if layer is not None or any(value.producer() in behind for value in _read(node)):
            behind.add(node)
    given = {value.producer() for value in graph.outputs}
    for node in reversed(nodes):
        if node in layers:
            continue
        readers = {layers.get(outermost[use.node]) for value in node.outputs for use in value.uses()}
        known = readers - {None}
        if known and (node in behind or (len(readers) == 1 and node not in given)):
            layers[node] = min(reader for reader in readers if reader is not None)
    return layers


def _layer(node: onnx_ir.Node, within: re.Pattern[str]) -> int | None:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return None
    found = [within.match(scope) for scope in ast.literal_eval(scopes)[:-1]]
    return next((int(match[1]) for match in found if match), None)


def _nested(nodes: Iterable[onnx_ir.Node]) -> Iterator[onnx_ir.Node]:
    """Yield nodes with those of the graphs that they hold."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type is _GRAPHS[0]:
                yield from _nested(attribute.as_graph())
            elif attribute.type is _GRAPHS[1]:
                for graph in attribute.as_graphs():
                    yield from _nested(graph)


def _read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    for inner in _nested([node]):
        yield from (value for value in inner.inputs if value is not None)


def _read_from_outside(nodes: Sequence[onnx_ir.Node]) -> Iterator[onnx_ir.Value]:
    """Yield what nodes read that neither they nor the graphs that they hold make."""
    within = list(_nested(nodes))
    made = {value for node in within for value in node.outputs}
    for node in within:
        if node.graph is not nodes[0].graph and node.graph is not None:
            made.update(node.graph.inputs)
    yield from (value for node in nodes for value in _read(node) if value not in made)


def _is_of_no_layer(value: onnx_ir.Value) -> bool:
    """Return whether a value was computed without any weight: of sizes, of masks and of what the code wrote."""
    waiting, seen = [value], {value}
    while waiting:
        made = waiting.pop()
        if made.is_initializer():
            return False
        if (node := made.producer()) is not None:
            new = set(_read(node)) - seen
            seen |= new
            waiting += new
    return True


def _rename(nodes: Iterable[onnx_ir.Node], suffix: str) -> None:
    """Give nodes and what they make names of their own."""
    for node in _nested(nodes):
        node.name = f"{node.name}_{suffix}"
        for value in node.outputs:
            value.name = f"{value.name}_{suffix}"


def _plain(value: onnx_ir.Value) -> str:
    return re.sub(r"^(input|output)\.", "", value.name or "")


def _step(one: str, other: str) -> tuple[int, int] | None:
    """Return which part of two names is a number that differs, and by how much; ``None``: they differ otherwise.

    >>> _step("layers.3.weight", "layers.5.weight"), _step("layers.3.weight", "layers.5.bias")
    ((1, 2), None)
    """
    mine, its = _NUMBERS.split(one), _NUMBERS.split(other)
    differing = [n for n, (a, b) in enumerate(itertools.zip_longest(mine, its)) if a != b]
    # Every second part is a number.
    if len(mine) != len(its) or len(differing) != 1 or differing[0] % 2 == 0:
        return None
    return differing[0], int(its[differing[0]]) - int(mine[differing[0]])


def _next(one: str, other: str, repeat: int) -> str:
    """Return the name that goes on as two others do, so many steps later.

    >>> _next("layers.3.weight", "layers.5.weight", 2)
    'layers.9.weight'

    Raises:
        NotRepeatedError: If they differ in something else than one number.
    """
    if (step := _step(one, other)) is None:
        raise NotRepeatedError(f"{one} is followed by {other}")
    parts = _NUMBERS.split(other)
    parts[step[0]] = str(int(parts[step[0]]) + repeat * step[1])
    return "".join(parts)


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two values of attributes, or two constants, are the same."""
    if hasattr(one, "numpy") and hasattr(other, "numpy"):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one is other or np.array_equal(one.numpy(), other.numpy(), equal_nan=one.dtype.is_floating_point())
    # Of numbers that are none, no two are equal; they are not written into a graph that is to repeat them.
    return bool(one == other)
