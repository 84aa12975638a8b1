"""Two graphs as one: which of them answers is the number of tokens, and a whole conversion of a model that turns."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config.errors import ModelError
from onnx_config.export.branches import Branch, _limit_before, without_branches
from onnx_config.export.limits import AxisLimit, limit_axis, limits_in
from onnx_config.export.one_token import ONE_TOKEN, one_token_spec
from onnx_config.export.sample import Sample
from onnx_config.export.ties import TieWatch
from onnx_config.export.trace import Trace
from onnx_config.export.turns import in_two_ways, one_way, size_beyond
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


def merged(few: onnx_ir.Model, many: onnx_ir.Model, most: int = 1) -> onnx_ir.Model:
    """Return one graph that turns after ``most`` tokens."""
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length", 1))
    return in_two_ways(few, many, AxisLimit(axis="sequence_length", most=most, refuses=False), [ids])


def answers(model: onnx_ir.Model, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a graph makes of ``steps`` tokens."""
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids, state = feeds(steps)
    given = {value.name: feed for value, feed in zip(session.get_inputs(), (ids, state), strict=True)}
    logits, present = session.run(["logits", "present.0.state"], given)
    return logits, present


def feeds(steps: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(2 * steps).reshape(2, steps, 1) + 1, np.array([[[3.0]], [[4.0]]], np.float32)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_number_of_tokens_chooses(steps: int, most: int) -> None:
    model = merged(graph("Mul", 1 if most == 1 else "sequence_length"), graph("Add", "sequence_length"), most)
    assert limits_in(model) == (AxisLimit(axis="sequence_length", most=most, refuses=False),)
    logits, present = answers(model, steps)
    ids, state = feeds(steps)
    how = np.multiply if steps <= most else np.add
    np.testing.assert_array_equal(logits, how(ids, WEIGHT[0]))
    np.testing.assert_array_equal(present, how(state, ids.sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_way_of_a_graph_that_turns_twice_computes_what_the_whole_does(steps: int) -> None:
    def model() -> onnx_ir.Model:
        inner = merged(graph("Mul", "sequence_length"), graph("Add", "sequence_length"), 3)
        return merged(graph("Sub", 1), inner)

    alone = model()
    assert [limit.bound for limit in limits_in(alone)] == [1, 3]
    ids, state = feeds(steps)
    one_way(alone, {"input_ids": ids.shape, "past_key_values.0.state": state.shape})
    assert "If" not in {node.op_type for node in alone.graph}
    for got, want in zip(answers(alone, steps), answers(model(), steps), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("steps", [2, 3])
def test_one_way_of_a_graph_that_is_limited_too(steps: int) -> None:
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length", 1))
    limits = AxisLimit(axis="sequence_length", least=2), AxisLimit(axis="sequence_length", most=3)

    def model() -> onnx_ir.Model:
        made = merged(graph("Mul", "sequence_length"), graph("Add", "sequence_length"), 2)
        for limit in limits:
            limit_axis(made, limit, [ids])
        return made

    alone = model()
    shapes = [array.shape for array in feeds(steps)]
    one_way(alone, dict(zip(("input_ids", "past_key_values.0.state"), shapes, strict=True)))
    assert {limit for limit in limits_in(alone) if limit.refuses} == {*limits}
    for got, want in zip(answers(alone, steps), answers(model(), steps), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_graph_that_does_not_turn_stays_as_it_is() -> None:
    model = graph("Mul", "sequence_length")
    before = [node.op_type for node in model.graph]
    one_way(model, {})
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(
    ("few", "many", "size"),
    [
        (1, "sequence_length", "sequence_length"),
        ("sequence_length", 3, "sequence_length"),
        ("sequence_length", "4*((sequence_length + 3)//4)", "sequence_length"),
        ("4*((sequence_length + 3)//4)", "sequence_length", "sequence_length"),
        (3, 3, 3),
    ],
)
def test_of_two_names_of_an_outputs_size_the_plainer_one_stays(
    few: int | str, many: int | str, size: int | str
) -> None:
    sides = graph("Mul", "sequence_length"), graph("Add", "sequence_length")
    for side, name in zip(sides, (few, many), strict=True):
        side.graph.outputs[0].shape = onnx_ir.Shape(["batch_size", name, 3])
    found = merged(*sides, most=3).graph.outputs[0].shape
    assert found is not None
    assert str(found[1]) == str(size)


def test_only_an_axis_of_an_input_can_turn() -> None:
    with pytest.raises(ValueError, match="no input has the axis height"):
        in_two_ways(graph("Mul", 1), graph("Add", 1), AxisLimit(axis="height", most=1, refuses=False), [])


@pytest.mark.parametrize(("largest", "size", "whole"), [(None, 99, 128), (96, 96, 96), (89, 89, 89)])
def test_sizes_beyond_a_turn_are_uneven_or_whole_and_within_the_range(
    largest: int | None, size: int, whole: int
) -> None:
    turn = AxisLimit(axis="sequence_length", most=88, refuses=False)
    assert (size_beyond(turn, largest), size_beyond(turn, largest, whole=True)) == (size, whole)


def test_weights_of_both_are_there_once() -> None:
    model = merged(graph("Mul", 1), graph("Add", "sequence_length"))
    held = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value is not None]
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
    assert (ONE_TOKEN.axis, ONE_TOKEN.most, ONE_TOKEN.refuses) == ("sequence_length", 1, False)
    assert [t.shape for t in single.inputs] == [
        ("batch_size", 1),
        ("batch_size", whole),
        *(t.shape for t in spec.inputs[2:]),
    ]
    assert single.inputs[1].resolve(single.sizes) == (2, 9)


@pytest.mark.parametrize(
    ("branches", "turns"),
    [
        pytest.param({"sequence_length": 89}, [88], id="beyond"),
        pytest.param({"sequence_length": 3}, [3], id="below"),
        pytest.param({"batch_size": 5}, [], id="rows-never-turn"),
    ],
)
def test_where_a_model_branches_its_graph_turns(branches: dict[str, int], turns: list[int]) -> None:
    spec = ModelSpec(
        model_type="t", task="fill-mask", task_family="fill-mask", architecture="T", inputs=(), outputs=(),
        axis_ranges={"sequence_length": (1, 512), "batch_size": (1, 512)}, preprocessor=None, parameters=None,
        sizes={"batch_size": 2, "sequence_length": 16},
    )  # fmt: skip
    sample = Sample(sizes=spec.sizes, inputs={}, returned=(), watch=TieWatch(), image_size=None)
    found = tuple(Branch(axis=axis, size=size, why="y differs") for axis, size in branches.items())
    asked = []

    def trace_with(_: tuple[str, ...], turns: tuple[AxisLimit, ...]) -> tuple[Trace, tuple[Branch, ...]]:
        asked.append([turn.bound for turn in turns])
        trace = Trace(model=graph("Mul", 1), notes=())
        return trace, () if turns else found

    if not turns:
        with pytest.raises(ModelError, match="computes otherwise at other sizes of batch_size"):
            without_branches(spec, sample, (), trace_with, write=lambda _: None)
        assert asked == [[]]
        return
    _, notes = without_branches(spec, sample, (), trace_with, write=lambda _: None)
    assert asked == [[], turns]
    assert notes == [
        f"up to sequence_length {turns[0]} the graph computes in one way, and in another beyond, as the model does"
    ]


@pytest.mark.parametrize(
    ("dtype", "size", "least"),
    [
        pytest.param("float32", 32, 33, id="few-readings"),
        pytest.param("float32", 2000, None, id="as-many-as-usual"),
        pytest.param("int64", 32, None, id="few-tokens"),
    ],
)
def test_too_few_readings_are_refused_and_too_few_tokens_are_not(dtype: str, size: int, least: int | None) -> None:
    given = TensorSpec(name="x", dtype=dtype, shape=("batch_size", "sequence_length"))
    spec = ModelSpec(
        model_type="t", task="fill-mask", task_family="fill-mask", architecture="T", inputs=(given,), outputs=(),
        axis_ranges={"sequence_length": (1, None), "batch_size": (1, None)}, preprocessor=None, parameters=None,
        sizes={"batch_size": 2, "sequence_length": 2001},
    )  # fmt: skip
    sample = Sample(sizes=spec.sizes, inputs={}, returned=(), watch=TieWatch(), image_size=None)
    branch = Branch(axis="sequence_length", size=size, why="y differs")
    if least is None:
        with pytest.raises(ModelError, match="computes otherwise at other sizes of sequence_length"):
            _limit_before(branch, spec, sample)
        return
    assert _limit_before(branch, spec, sample) == AxisLimit(axis="sequence_length", least=least)
