"""Two graphs as one: which of them answers is the number of tokens."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config.export.one_token import at_one_token, one_token_spec
from onnx_config.spec import ModelSpec, TensorSpec

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def graph(operator: str, steps: int | str) -> onnx_ir.Model:
    """Return a graph that gives ``ids``, as numbers, ``operator`` the weights, and the state and what it adds up to."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers", "axis"], ["sum"], keepdims=1),
        helper.make_node(operator, ["past_key_values.0.state", "sum"], ["present.0.state"]),
        helper.make_node(operator, ["numbers", "weight"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", steps, 1]),
            helper.make_tensor_value_info("past_key_values.0.state", TensorProto.FLOAT, ["batch_size", 1, 1]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", None, None]),
            helper.make_tensor_value_info("present.0.state", TensorProto.FLOAT, ["batch_size", 1, 1]),
        ],
        [numpy_helper.from_array(WEIGHT[0], "weight"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    return onnx_ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_number_of_tokens_chooses(steps: int) -> None:
    merged = at_one_token(graph("Mul", 1), graph("Add", "sequence_length"))
    proto = onnx_ir.to_proto(merged)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids, state = np.arange(2 * steps).reshape(2, steps, 1) + 1, np.array([[[3.0]], [[4.0]]], np.float32)
    logits, present = session.run(["logits", "present.0.state"], {"input_ids": ids, "past_key_values.0.state": state})
    how = np.multiply if steps == 1 else np.add
    np.testing.assert_array_equal(logits, how(ids, WEIGHT[0]))
    np.testing.assert_array_equal(present, how(state, ids.sum(axis=1, keepdims=True)))


def test_weights_of_both_are_there_once() -> None:
    merged = at_one_token(graph("Mul", 1), graph("Add", "sequence_length"))
    held = [value.const_value.numpy() for value in merged.graph.initializers.values() if value.const_value is not None]
    assert sum(np.array_equal(array, WEIGHT[0]) for array in held) == 1


def test_what_covers_the_past_is_as_long_as_ever() -> None:
    def tensor(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64", shape=shape)

    whole = "past_sequence_length + sequence_length"
    spec = ModelSpec(
        model_type="t", task="text-generation", task_family="text-generation", architecture="T", outputs=(),
        axis_ranges={}, sizes={"batch_size": 2, "sequence_length": 16, "past_sequence_length": 8}, preprocessor=None,
        parameters=None,
        inputs=(
            tensor("input_ids", "batch_size", "sequence_length"),
            tensor("attention_mask", "batch_size", whole),
            tensor("past_key_values.0.conv_states", "batch_size", 4),
            tensor("past_key_values.1.key", "batch_size", 2, "past_sequence_length", 4),
        ),
    )  # fmt: skip
    assert [t.name for t in spec.states] == ["past_key_values.0.conv_states"]
    single = one_token_spec(spec)
    assert [t.shape for t in single.inputs] == [
        ("batch_size", 1),
        ("batch_size", whole),
        *(t.shape for t in spec.inputs[2:]),
    ]
    assert single.inputs[1].resolve(single.sizes) == (2, 9)
