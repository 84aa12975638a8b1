"""One graph of two, which takes the one way or the other: an ONNX ``If`` whose branches share their weights.

What both branches read of weights lies outside of them, each weight once, whichever graph it came with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir
from onnx_ir.passes.common import NameFixPass

__all__ = ["Condition", "either_way"]

_Shared = dict[tuple[str, tuple[int, ...], str], onnx_ir.Value]
"""Type, shape and digest of a weight -> the weight, which lies outside of all branches."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What decides which of two ways a graph takes."""

    nodes: Sequence[onnx_ir.Node]
    """What computes it, outside of both."""
    holds: onnx_ir.Value
    """Whether the first way is taken."""
    constants: Sequence[onnx_ir.Value] = ()
    """What the nodes read beside inputs and weights."""


def either_way(
    first: onnx_ir.Model,
    second: onnx_ir.Model,
    names: tuple[str, str],
    condition: Callable[[Mapping[str, onnx_ir.Value], onnx_ir.Graph], Condition],
    *,
    instead: Mapping[str, str] = MappingProxyType({}),
) -> onnx_ir.Model:
    """Return one model that computes ``first`` where a condition holds, else ``second``; both are taken apart for it.

    Its inputs are those of both and its outputs those of ``second``.

    Args:
        first: The graph of what the condition holds for.
        second: The graph of all else.
        names: What the two ways are called in names of nodes.
        condition: Is given the inputs by name and the branch that ``first`` became, from which it may take nodes.
        instead: Output -> the input that is given back in its place by a way that does not compute it.
    """
    inputs: dict[str, onnx_ir.Value] = {}
    for value in (*second.graph.inputs, *first.graph.inputs):
        inputs.setdefault(value.name or "", _like(value))
    short = {value.name: value for value in first.graph.outputs}
    outputs = [_of_both(value, short.get(value.name)) for value in second.graph.outputs]
    wanted = [value.name or "" for value in outputs]
    shared: _Shared = {}
    branches = [
        _branch_of(model.graph, side, inputs, wanted, shared=shared, instead=instead)
        for side, model in zip(names, (first, second), strict=True)
    ]
    found = condition(inputs, branches[0])
    chosen = onnx_ir.Node(
        "",
        "If",
        [found.holds],
        attributes=[
            onnx_ir.AttrGraph("then_branch", branches[0]),
            onnx_ir.AttrGraph("else_branch", branches[1]),
        ],
        outputs=outputs,
    )
    graph = onnx_ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=[*found.nodes, chosen],
        initializers=[*found.constants, *shared.values()],
        opset_imports={**first.graph.opset_imports, **second.graph.opset_imports},
        name=second.graph.name,
    )
    merged = onnx_ir.Model(graph, ir_version=max(first.ir_version, second.ir_version))
    for function in (*first.functions.values(), *second.functions.values()):
        merged.functions[function.identifier()] = function
    merged.metadata_props.update(second.metadata_props)
    NameFixPass()(merged)
    return merged


def _branch_of(
    graph: onnx_ir.Graph,
    name: str,
    inputs: dict[str, onnx_ir.Value],
    outputs: Iterable[str],
    *,
    shared: _Shared,
    instead: Mapping[str, str],
) -> onnx_ir.Graph:
    """Turn a graph into a branch that reads ``inputs`` and shared weights from outside, with ``outputs`` in order."""
    for value in graph.inputs:
        value.replace_all_uses_with(inputs[value.name or ""], replace_graph_outputs=True)
    own = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None  # an initializer has one
        key = (str(tensor.dtype), tuple(int(size) for size in tensor.shape.numpy()), _digest(tensor))
        if key not in shared:
            shared[key] = onnx_ir.Value(
                name=f"{name}/{value.name}", type=value.type, shape=value.shape, const_value=tensor
            )
        value.replace_all_uses_with(shared[key], replace_graph_outputs=True)
        own.append(value.name or "")
    for initializer in own:
        del graph.initializers[initializer]
    given = {value.name: value for value in graph.outputs}
    nodes = list(graph)
    # Computed inside, under names of their own: the names of the outputs are those of the whole.
    ends = []
    for output in outputs:
        found = given.get(output)
        value = inputs[instead[output]] if found is None else found
        end = onnx_ir.node("Identity", [value])
        end.outputs[0].name = f"{name}/output/{output}"
        end.outputs[0].type, end.outputs[0].shape = value.type, _shape_of(value)
        nodes.append(end)
        ends.append(end.outputs[0])
    for node in list(graph):
        graph.remove(node)
    for node in nodes:
        _prefix(node, name)
    return onnx_ir.Graph([], ends, nodes=nodes, name=name)


def _prefix(node: onnx_ir.Node, prefix: str) -> None:
    """Give what a node computes, and itself, names that the other branch does not have."""
    if node.name:
        node.name = f"{prefix}/{node.name}"
    for value in node.outputs:
        if value.name and not value.name.startswith(f"{prefix}/"):
            value.name = f"{prefix}/{value.name}"


def _digest(tensor: onnx_ir.TensorProtocol) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def _of_both(many: onnx_ir.Value, few: onnx_ir.Value | None) -> onnx_ir.Value:
    """Return an output with sizes as a reader wants them: each way has a formula of its own for the same size."""
    value = _like(many)
    if few is None or few.shape is None or value.shape is None or len(few.shape) != len(value.shape):
        return value
    pairs = zip(few.shape, value.shape, strict=True)
    value.shape = onnx_ir.Shape(
        [a if isinstance(b, int) or (not isinstance(a, int) and len(str(a)) < len(str(b))) else b for a, b in pairs]
    )
    return value


def _like(value: onnx_ir.Value) -> onnx_ir.Value:
    return onnx_ir.Value(name=value.name, type=value.type, shape=_shape_of(value))


def _shape_of(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    return None if value.shape is None else onnx_ir.Shape(list(value.shape))
