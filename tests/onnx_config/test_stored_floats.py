"""Weights are read where they lie in a file, as the onnx library reads them; what is no graph is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.stored_floats import stored_floats

RANDOM = np.random.default_rng(0)
TENSORS = {
    "raw": RANDOM.standard_normal((300, 7), dtype=np.float32),
    "a name of three bytes more": RANDOM.standard_normal((3,), dtype=np.float32),
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.empty((0, 4), np.float32),
}


def write(path: Path, *, outside: bool = False) -> Path:
    initializers = [numpy_helper.from_array(value, name) for name, value in TENSORS.items()]
    initializers.append(numpy_helper.from_array(np.arange(6), "integers"))
    initializers.append(helper.make_tensor("one by one", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]))
    node = helper.make_node("Identity", ["raw"], ["out"])
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [300, 7])
    model = helper.make_model(helper.make_graph([node], "g", [], [output], initializers))
    onnx.save(model, str(path), save_as_external_data=outside, location="weights.bin", size_threshold=64)
    return path


@pytest.mark.parametrize("outside", [False, True])
def test_each_tensor_is_what_the_library_reads(outside: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", outside=outside)
    if outside:
        # As a file that the checkpoint shares, which the library would refuse.
        (tmp_path / "link").hardlink_to(tmp_path / "weights.bin")
    found = {name: numbers.reshape(shape) for name, shape, numbers in stored_floats(path)}
    assert found.keys() == {*TENSORS, "one by one"}
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(found[name], value)
    assert found["one by one"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("lost", [1, 100, 8000])
def test_a_torn_file_is_refused(lost: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ModelError, match="no ONNX graph") as caught:
        list(stored_floats(path))
    assert caught.value.kind is ErrorKind.RUNTIME_FAILED


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x3a\xff\xff", b'{"model": 1}'])
def test_what_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="no ONNX graph"):
        list(stored_floats(path))


def test_a_missing_file_of_weights_is_an_error_of_the_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", outside=True)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FileNotFoundError):
        list(stored_floats(path))
