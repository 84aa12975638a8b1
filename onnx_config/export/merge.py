"""One decoder of two: a graph that begins a text or goes on with one, as an input says, and holds the weights once.

Loaders of the ecosystem (transformers.js, optimum) look for it under the name ``decoder_model_merged.onnx``. It is an
ONNX ``If`` over the input ``use_cache_branch``; what both branches read of weights lies outside of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx_ir

__all__ = ["SWITCH", "Shared", "branch_of", "merge_decoders"]

SWITCH = "use_cache_branch"
"""Input of the merged graph, of one element: whether there is a past to go on with."""

Shared = dict[tuple[str, tuple[int, ...], str], onnx_ir.Value]
"""Type, shape and digest of a weight -> the weight, which lies outside of all branches."""

_PAST = "past_key_values"
_PRESENT = "present"
_OF_THE_ENCODER = ".encoder."
_PAST_OF_THE_ENCODER = "past_encoder_sequence_length"


def merge_decoders(begun: onnx_ir.Model, continued: onnx_ir.Model) -> onnx_ir.Model:
    """Return one model that computes ``begun`` or ``continued``; both are taken apart for it.

    Its inputs are those of both; whoever begins gives a past of any length, which is not read, and whoever goes on
    the encoder's states, which are not read either. What ``continued`` does not give back of the cache, since it does
    not change, it gives back as it came.

    Args:
        begun: A decoder without a past, whose outputs are ``logits`` and ``present.*``.
        continued: The same decoder with one, whose further inputs are ``past_key_values.*``.
    """
    inputs: dict[str, onnx_ir.Value] = {}
    for value in (*begun.graph.inputs, *continued.graph.inputs):
        inputs.setdefault(value.name or "", onnx_ir.Value(name=value.name, type=value.type, shape=_loose_input(value)))
    switch = onnx_ir.Value(name=SWITCH, type=onnx_ir.TensorType(onnx_ir.DataType.BOOL), shape=onnx_ir.Shape([1]))
    shared: Shared = {}
    outputs = [
        onnx_ir.Value(name=value.name, type=value.type, shape=_loose_output(value)) for value in begun.graph.outputs
    ]
    names = [value.name or "" for value in outputs]
    branches = [
        branch_of(model.graph, name, inputs, names, shared)
        for name, model in (("with_past", continued), ("without_past", begun))
    ]
    squeezed = onnx_ir.node("Squeeze", [switch])
    chosen = onnx_ir.Node(
        "",
        "If",
        [squeezed.outputs[0]],
        attributes=[
            onnx_ir.AttrGraph("then_branch", branches[0]),
            onnx_ir.AttrGraph("else_branch", branches[1]),
        ],
        outputs=outputs,
    )
    graph = onnx_ir.Graph(
        [*inputs.values(), switch],
        outputs,
        nodes=[squeezed, chosen],
        initializers=list(shared.values()),
        opset_imports={**begun.graph.opset_imports, **continued.graph.opset_imports},
        name="merged",
    )
    merged = onnx_ir.Model(graph, ir_version=max(begun.ir_version, continued.ir_version))
    for function in (*begun.functions.values(), *continued.functions.values()):
        merged.functions[function.identifier()] = function
    merged.metadata_props.update(begun.metadata_props)
    return merged


def _loose(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    return None if value.shape is None else onnx_ir.Shape(list(value.shape))


def _loose_input(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    """Return the shape of an input of either branch: a past that is not read is of any length.

    Loaders begin with a past of no tokens, also where the encoder gives a fixed number of states, as that of Whisper.
    """
    if value.shape is None:
        return None
    sizes = list(value.shape)
    name = value.name or ""
    if name.startswith(_PAST) and _OF_THE_ENCODER in name and isinstance(sizes[2], int):
        sizes[2] = onnx_ir.SymbolicDim(_PAST_OF_THE_ENCODER)
    return onnx_ir.Shape(sizes)


def _loose_output(value: onnx_ir.Value) -> onnx_ir.Shape | None:
    """Return the shape of an output of either branch: the decoder's own cache is longer where there was a past."""
    if value.shape is None:
        return None
    grows = (value.name or "").startswith(_PRESENT) and _OF_THE_ENCODER not in (value.name or "")
    sizes = list(value.shape)
    if grows:
        sizes[2] = onnx_ir.SymbolicDim("present_sequence_length")
    return onnx_ir.Shape(sizes)


def branch_of(
    graph: onnx_ir.Graph,
    name: str,
    inputs: dict[str, onnx_ir.Value],
    outputs: Iterable[str],
    shared: Shared,
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
        value = inputs[output.replace(_PRESENT, _PAST, 1)] if found is None else found
        end = onnx_ir.node("Identity", [value])
        end.outputs[0].name = f"{name}/output/{output}"
        end.outputs[0].type, end.outputs[0].shape = value.type, _loose(value)
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
