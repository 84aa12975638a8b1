"""One graph of two traces: of a model that goes on with one token, and of the same model that reads many.

Models that keep states compute the two in different ways: a step of a recurrence, and all steps of it at once. Which
one is taken is an ONNX ``If`` over the number of tokens; what both read of weights lies outside of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir
from onnx_ir.passes.common import NameFixPass

from onnx_config.export.merge import Shared, branch_of
from onnx_config.spec import ModelSpec

__all__ = ["at_one_token", "one_token_spec"]

_STEPS = "sequence_length"
_IDS = "input_ids"


def one_token_spec(spec: ModelSpec) -> ModelSpec:
    """Return ``spec`` for one token at a time; what covers the past too is as long as ever."""
    inputs = tuple(replace(t, shape=tuple(1 if size == _STEPS else size for size in t.shape)) for t in spec.inputs)
    return replace(spec, inputs=inputs, sizes={**spec.sizes, _STEPS: 1})


def at_one_token(one: onnx_ir.Model, many: onnx_ir.Model) -> onnx_ir.Model:
    """Return one model that computes ``one`` where it is given one token, else ``many``; both are taken apart for it.

    Its inputs and outputs are those of ``many``; those of ``one`` have the same names.
    """
    inputs: dict[str, onnx_ir.Value] = {}
    for value in (*many.graph.inputs, *one.graph.inputs):
        inputs.setdefault(value.name or "", _like(value))
    outputs = [_like(value) for value in many.graph.outputs]
    names = [value.name or "" for value in outputs]
    shared: Shared = {}
    branches = [
        branch_of(model.graph, name, inputs, names, shared) for name, model in (("one_token", one), ("tokens", many))
    ]
    length = onnx_ir.node("Shape", [inputs[_IDS]], attributes={"start": 1, "end": 2})
    single = onnx_ir.Value(
        name="one_token", const_value=onnx_ir.tensor(np.array([1], dtype=np.int64), name="one_token")
    )
    is_one = onnx_ir.node("Equal", [length.outputs[0], single])
    squeezed = onnx_ir.node("Squeeze", [is_one.outputs[0]])
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
        list(inputs.values()),
        outputs,
        nodes=[length, is_one, squeezed, chosen],
        initializers=[single, *shared.values()],
        opset_imports={**one.graph.opset_imports, **many.graph.opset_imports},
        name=many.graph.name,
    )
    merged = onnx_ir.Model(graph, ir_version=max(one.ir_version, many.ir_version))
    for function in (*one.functions.values(), *many.functions.values()):
        merged.functions[function.identifier()] = function
    merged.metadata_props.update(many.metadata_props)
    NameFixPass()(merged)
    return merged


def _like(value: onnx_ir.Value) -> onnx_ir.Value:
    shape = None if value.shape is None else onnx_ir.Shape(list(value.shape))
    return onnx_ir.Value(name=value.name, type=value.type, shape=shape)
