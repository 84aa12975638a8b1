"""Repeats the last layers of a traced graph, for those that its trace was spared.

The nodes of a layer are told by the module that torch notes for each. That one period of layers follows from the one
before it as all do is looked at, not believed: node for node, the last is what the last but one is, with its own
weights, on what the period before it gave. A graph of which that is not so is refused, and is to be traced as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir
import torch

from onnx_config.export.alike_layers import Stack
from onnx_config.export.layer_nodes import is_of_no_layer, layers_of_nodes
from onnx_config.export.node_pairs import NodePairs, NotRepeatedError, next_name
from onnx_config.export.node_reads import nested, read_from_outside

__all__ = ["Repetition"]


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
                values[one.place].name = next_name(_plain(values[one.before]), _plain(values[one.last]), one.repeat)
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
        layers = layers_of_nodes(graph, stack.path)
        self._periods: tuple[list[onnx_ir.Node], ...] = ([], [], [])
        for node in graph:
            if (layer := layers.get(node)) is not None and layer >= stack.first:
                self._periods[(layer - stack.first) // stack.period].append(node)
        self._is_run = bool(layers)
        self._pairs = NodePairs(tensors)
        self.inputs: list[_Added] = []
        """Inputs of the graph that are new."""
        self.outputs: list[_Added] = []
        """Outputs of the graph that are new."""

    def repeat(self) -> None:
        """Put in the layers that are missing."""
        if not self._is_run:
            return
        _, before, last = self._periods
        self._pairs.pair(before, last)
        made_in = [{value for node in nested(period) for value in node.outputs} for period in self._periods]
        for value in self._pairs.handed.values():
            if value not in made_in[0]:
                raise NotRepeatedError(f"{value.name} is no value of the period before")
        outside = self._read_outside(made_in)
        given_each = self._given_each(made_in)
        given = {value: self._pairs.same[value] for value in self._pairs.handed}
        read = list(dict.fromkeys(read_from_outside(last)))
        made = [value for node in last for value in node.outputs]
        place, outputs = last[-1], self._graph.outputs
        view = onnx_ir.GraphView(inputs=read, outputs=made, nodes=last)
        for repeat in range(1, self._stack.repeats + 1):
            copied = view.clone()
            for value, inner in zip(read, copied.inputs, strict=True):
                inner.replace_all_uses_with(
                    self._numbered_value(value, repeat) if value in self._pairs.numbered else given.get(value, value)
                )
            new = dict(zip(made, copied.outputs, strict=True))
            nodes = list(copied)
            copied.outputs.clear()
            copied.remove(nodes)
            _rename(nodes, f"repeat_{self._stack.path}_{repeat}")
            self._graph.insert_after(place, nodes)
            place = nodes[-1]
            given = {value: new[self._pairs.same[value]] for value in self._pairs.handed}
            for one, other in given_each.items():
                self.outputs.append(_Added(place=len(outputs), before=one, last=other, repeat=repeat))
                outputs.append(new[outputs[other]])
        for node, index, value in outside:
            node.replace_input_with(index, new[value])
        for index, value in enumerate(list(outputs)):
            if value in new and index not in given_each.values():
                outputs[index] = new[value]
        self._graph.sort()

    def _numbered_value(self, value: onnx_ir.Value, repeat: int) -> onnx_ir.Value:
        """Return the weight or input that has this one's place so many periods later."""
        before = self._pairs.numbered[value]
        if self._pairs.is_written(value):
            return value
        name = next_name(before.name or "", value.name or "", repeat)
        if value.is_graph_input():
            found = next((other for other in self._graph.inputs if other.name == name), None)
            if found is None:
                found = onnx_ir.Value(name=name, shape=value.shape and value.shape.copy(), type=value.type)
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
        weight = kind(tensor, name=name)
        found = onnx_ir.Value(name=name, shape=value.shape and value.shape.copy(), type=value.type, const_value=weight)
        self._graph.register_initializer(found)
        return found

    def _read_outside(self, made_in: Sequence[set[onnx_ir.Value]]) -> list[tuple[onnx_ir.Node, int, onnx_ir.Value]]:
        """Return who reads values of the last period after it: node, place, value.

        What is made in the periods before may be read only if it is the same for all layers.
        """
        within = {node for period in self._periods for node in nested(period)}
        first, before, last = made_in
        for value in first | before:
            if any(use.node not in within for use in value.uses()) and not is_of_no_layer(value, self._graph):
                raise NotRepeatedError(f"{value.name} is read after the last layer")
        return [(use.node, use.idx, value) for value in last for use in value.uses() if use.node not in within]

    def _given_each(self, made_in: Sequence[set[onnx_ir.Value]]) -> dict[int, int]:
        """Return the graph's outputs that each layer gives: index of that of the last period but one -> of the last."""
        outputs = list(self._graph.outputs)
        found = {}
        for index, value in enumerate(outputs):
            if value in made_in[1]:
                if self._pairs.same[value] not in outputs:
                    raise NotRepeatedError(f"{value.name} is an output of one layer only")
                found[index] = outputs.index(self._pairs.same[value])
        return found


def _rename(nodes: Iterable[onnx_ir.Node], suffix: str) -> None:
    """Give nodes and what they make names of their own."""
    for node in nested(nodes):
        node.name = f"{node.name}_{suffix}"
        for value in node.outputs:
            value.name = f"{value.name}_{suffix}"


def _plain(value: onnx_ir.Value) -> str:
    return re.sub(r"^(input|output)\.", "", value.name or "")
