"""One decoder of two: either branch computes what its decoder does, and weights of both are held once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config.export.graph_file import read_graph, write_graph
from onnx_config.export.merge import SWITCH, merge_decoders
from onnx_config.export.part_steps import merge
from onnx_config.parts import GRAPH_ENTRY

SHARED = np.arange(12, dtype=np.float32).reshape(3, 4)
OWN = np.full((4,), 2.0, np.float32)


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], nodes: list[onnx.NodeProto],
          weights: dict[str, np.ndarray]) -> onnx_ir.Model:  # fmt: skip
    made = helper.make_graph(
        nodes, "decoder", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    return onnx_ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def begun() -> onnx_ir.Model:
    """``logits`` from states; keeps the states as both halves of a cache."""
    return graph(
        [value("encoder_hidden_states", "b", "e", 3)],
        [
            value("logits", "b", "e", 4),
            value("present.0.decoder.key", "b", "e", 3),
            value("present.0.encoder.key", "b", "e", 3),
        ],
        [
            helper.make_node("MatMul", ["encoder_hidden_states", "w"], ["hidden"]),
            helper.make_node("Identity", ["hidden"], ["logits"]),
            helper.make_node("Identity", ["encoder_hidden_states"], ["present.0.decoder.key"]),
            helper.make_node("Neg", ["encoder_hidden_states"], ["present.0.encoder.key"]),
        ],
        {"w": SHARED},
    )  # fmt: skip


def continued() -> onnx_ir.Model:
    """``logits`` from the cache, by the same weight under another name and one of its own."""
    return graph(
        [value("past_key_values.0.decoder.key", "b", "p", 3), value("past_key_values.0.encoder.key", "b", "e", 3)],
        [value("logits", "b", "p", 4), value("present.0.decoder.key", "b", "p", 3)],
        [
            helper.make_node("MatMul", ["past_key_values.0.decoder.key", "v"], ["hidden"]),
            helper.make_node("Add", ["hidden", "own"], ["logits"]),
            helper.make_node("Neg", ["past_key_values.0.decoder.key"], ["present.0.decoder.key"]),
        ],
        {"v": SHARED, "own": OWN},
    )


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    write_graph(merge_decoders(begun(), continued()), tmp_path / "merged.onnx")
    onnx.checker.check_model(str(tmp_path / "merged.onnx"), full_check=True)
    return tmp_path / "merged.onnx"


def run(path: Path, *, goes_on: bool) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((2, n, 3)).astype(np.float32)
            for name, n in (("encoder_hidden_states", 5), ("past_key_values.0.decoder.key", 4),
                            ("past_key_values.0.encoder.key", 5))}  # fmt: skip
    names = [output.name for output in session.get_outputs()]
    answer = dict(zip(names, session.run(names, {**feed, SWITCH: np.array([goes_on])}), strict=True))
    return {**feed, **answer}


def test_it_begins_as_the_first(merged: Path) -> None:
    got = run(merged, goes_on=False)
    np.testing.assert_allclose(got["logits"], got["encoder_hidden_states"] @ SHARED, rtol=1e-5)
    np.testing.assert_array_equal(got["present.0.encoder.key"], -got["encoder_hidden_states"])


def test_it_goes_on_as_the_second(merged: Path) -> None:
    got = run(merged, goes_on=True)
    np.testing.assert_allclose(got["logits"], got["past_key_values.0.decoder.key"] @ SHARED + OWN, rtol=1e-5)
    np.testing.assert_array_equal(got["present.0.decoder.key"], -got["past_key_values.0.decoder.key"])


def test_what_does_not_change_comes_back_as_it_went_in(merged: Path) -> None:
    got = run(merged, goes_on=True)
    np.testing.assert_array_equal(got["present.0.encoder.key"], got["past_key_values.0.encoder.key"])


def test_a_weight_of_both_is_held_once(merged: Path) -> None:
    weights = read_graph(merged).graph.initializers.values()
    held = [w.const_value.numpy() for w in weights if w.const_value is not None]
    assert sorted(array.size for array in held) == [OWN.size, SHARED.size]


def test_inputs_are_those_of_both_and_the_switch(merged: Path) -> None:
    names = [i.name for i in onnx.load(str(merged)).graph.input]
    assert names == [
        "encoder_hidden_states", "past_key_values.0.decoder.key", "past_key_values.0.encoder.key", SWITCH,
    ]  # fmt: skip


def test_a_past_that_is_not_read_may_be_empty_where_the_states_have_a_fixed_length(tmp_path: Path) -> None:
    """As Whisper's encoder has; optimum begins with a past of no tokens whatever the graph says of its length."""
    first, second = (
        graph(
            [value(name, "b", 4, 5, 3)],
            [value("logits", "b", 4, 5, 3), *([value("present.0.encoder.key", "b", 4, 5, 3)] if begins else [])],
            [
                helper.make_node("Neg", [name], ["logits"]),
                *([helper.make_node("Identity", [name], ["present.0.encoder.key"])] if begins else []),
            ],
            {},
        )
        for name, begins in (("encoder_hidden_states", True), ("past_key_values.0.encoder.key", False))
    )
    write_graph(merge_decoders(first, second), tmp_path / "merged.onnx")
    onnx.checker.check_model(str(tmp_path / "merged.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"), providers=["CPUExecutionProvider"])
    states = np.ones((2, 4, 5, 3), np.float32)
    for length, goes_on in ((0, False), (5, True)):
        past = np.full((2, 4, length, 3), 7, np.float32)
        feed = {"encoder_hidden_states": states, "past_key_values.0.encoder.key": past, SWITCH: np.array([goes_on])}
        logits, kept = session.run(["logits", "present.0.encoder.key"], feed)
        np.testing.assert_array_equal(logits, -(past if goes_on else states))
        np.testing.assert_array_equal(kept, past if goes_on else states)


def test_its_birth_certificate_says_what_it_is(tmp_path: Path) -> None:
    for name, made in (("decoder", begun()), ("decoder_with_past", continued())):
        write_graph(made, tmp_path / name, metadata={GRAPH_ENTRY: name, "onnx_ferry.source": "tiny"})
    graphs = {name: str(tmp_path / name) for name in ("decoder", "decoder_with_past")}
    merge({**graphs, "output": str(tmp_path / "merged")})
    certificate = read_graph(tmp_path / "merged").metadata_props
    assert certificate == {GRAPH_ENTRY: "decoder_merged", "onnx_ferry.source": "tiny"}
