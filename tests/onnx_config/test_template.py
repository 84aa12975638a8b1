"""A structure traced without weights, and bound: the graph of each checkpoint computes what its model does."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file, save_file

from onnx_config.errors import InputError
from onnx_config.export import steps, template_steps
from onnx_config.export.bind import bind
from onnx_config.export.loaded import loaded_model
from onnx_config.export.origins import Origin, weightless
from onnx_config.export.template import TemplateGraph, read_weights
from onnx_config.spec import ModelSpec
from tests.onnx_config.converted import check_request

FAMILIES = ("vit-image-classification", "resnet-model", "t5-conditional-generation", "wav2vec2-ctc", "bert-causal-lm")


class Structure:
    """A tiny model's structure, traced and simplified without its weights."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.source = tiny_models.build(name, folder / "source")
        self.plain, self.simplified = folder / "plain.onnx", folder / "simplified.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
            self.spec = json.loads(json.dumps(steps.detect({"folder": str(self.source)})))
            request = {"folder": str(self.source), "spec": self.spec, "dtype": "float32", "opset": None}
            self.traced = template_steps.trace({**request, "output": str(self.plain)})
            if self.traced["direct"] is None:
                self.reason = template_steps.simplify({"graph": str(self.plain), "output": str(self.simplified)})

    def bound(self, source: Path, to: Path, *, graph: Path | None = None) -> dict[str, Any]:
        request = {"graph": str(graph or self.simplified), "folder": str(source), "spec": self.spec}
        return template_steps.bind({**request, "output": str(to), "metadata": {"onnx_ferry.source": "tiny"}})

    def parity(self, source: Path, graph: Path) -> dict[str, Any]:
        return steps.parity({"folder": str(source), "spec": self.spec, **check_request(graph)})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    return Structure("bert-model", tmp_path_factory.mktemp("bert"))


def rewritten(
    source: Path, to: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], *, shards: int = 1
) -> Path:
    """Copy a model's folder with its weights changed, in one file or several."""
    shutil.copytree(source, to)
    weights = change(load_file(to / "model.safetensors"))
    if shards == 1:
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
        return to
    (to / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, to / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return to


def names_of(values: Iterable[Any]) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_holds_for_another_checkpoint(name: str, tmp_path: Path) -> None:
    structure = Structure(name, tmp_path / "one")
    assert structure.traced["direct"] is None
    other = tiny_models.build(name, tmp_path / "two", seed=1)
    graph = tmp_path / "model.onnx"
    structure.bound(other, graph)
    result = structure.parity(other, graph)
    assert result["outcome"] == "verified", result["detail"]
    # The very graph with the first one's weights is not the second one's.
    structure.bound(structure.source, tmp_path / "first.onnx")
    assert structure.parity(other, tmp_path / "first.onnx")["outcome"] == "mismatch"


def test_a_template_has_no_weights_and_what_is_bound_has_them_all(bert: Structure, tmp_path: Path) -> None:
    weights = read_weights(bert.simplified)
    template = onnx.load(str(bert.simplified))
    stored = load_file(bert.source / "model.safetensors")
    assert {weight.key for weight in weights} <= set(stored)
    assert bert.simplified.stat().st_size < sum(value.nbytes for value in stored.values()) / 2
    spec = ModelSpec.from_json(bert.spec)
    assert names_of(template.graph.input) == [*names_of(spec.inputs), *names_of(weights)]

    answer = bert.bound(bert.source, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    bound = onnx.load(str(tmp_path / "model.onnx"))
    assert names_of(bound.graph.input) == names_of(spec.inputs)
    assert [entry["name"] for entry in answer["graph"]["inputs"]] == names_of(spec.inputs)
    assert {p.key: p.value for p in bound.metadata_props} == {"onnx_ferry.source": "tiny"}
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in bound.graph.initializer}
    for weight in weights:
        wanted = stored[weight.key]
        wanted = wanted if weight.permutation is None else wanted.transpose(weight.permutation)
        assert np.array_equal(held[weight.name], wanted), weight


def test_weights_that_are_only_read_transposed_are_bound_so(bert: Structure) -> None:
    for path in (bert.plain, bert.simplified):
        weights = {weight.name: weight for weight in read_weights(path)}
        assert any(weight.permutation == (1, 0) for weight in weights.values())
        nodes = onnx.load(str(path)).graph.node
        assert not [node for node in nodes if node.op_type == "Transpose" and node.input[0] in weights]


def test_a_tensor_that_serves_twice_is_stored_once(tmp_path: Path) -> None:
    structure = Structure("gpt2-causal-lm", tmp_path / "one")
    tied = [weight for weight in read_weights(structure.simplified) if "wte" in weight.key]
    assert [weight.permutation for weight in tied] == [None]
    graph = tmp_path / "model.onnx"
    structure.bound(structure.source, graph)
    assert graph.stat().st_size < (structure.source / "model.safetensors").stat().st_size + 200_000


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        pytest.param(lambda weights: weights, 3, id="shards"),
        pytest.param(lambda weights: {f"bert.{k}": v for k, v in weights.items()}, 1, id="a-heads-prefix"),
        pytest.param(
            lambda weights: {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in weights.items()},
            1,
            id="half",
        ),
    ],
)
def test_checkpoints_of_any_make_are_bound(change: Any, shards: int, bert: Structure, tmp_path: Path) -> None:
    source = rewritten(bert.source, tmp_path / "source", change, shards=shards)
    structure, graph = Structure.__new__(Structure), tmp_path / "model.onnx"
    structure.spec = bert.spec
    request = {"folder": str(source), "spec": bert.spec, "dtype": "float32", "opset": None}
    assert template_steps.trace({**request, "output": str(tmp_path / "plain.onnx")})["direct"] is None
    structure.bound(source, graph, graph=tmp_path / "plain.onnx")
    assert structure.parity(source, graph)["outcome"] == "verified"


def test_brain_floats_are_widened(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_tensors

    values = torch.tensor([[1.5, -2.25, 3e38], [1e-38, 0.0, -1.0]], dtype=torch.bfloat16)
    save_tensors({"w": values}, tmp_path / "model.safetensors")
    got = bound_alone(tmp_path, {"permutation": [1, 0]})
    assert np.array_equal(got, values.float().numpy().T)


def bound_alone(folder: Path, changes: dict[str, Any], **options: Any) -> np.ndarray:
    """Bind a graph that returns its one weight, and run it."""
    entry = {"name": "w", "folder": ".", "key": "w", "shape": [2, 3], "permutation": None, "buffer": False, **changes}
    shape = [entry["shape"][axis] for axis in entry["permutation"] or range(len(entry["shape"]))]
    weight = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, shape)
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [weight], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(folder / "graph.onnx"))
    (folder / "graph.weights.json").write_text(json.dumps([entry]))
    template = TemplateGraph(path=folder / "graph.onnx", weights=read_weights(folder / "graph.onnx"))
    options = {"loaded": dict, "source": folder, **options}
    files = bind(template, options.pop("source"), folder / "model.onnx", metadata={}, **options)
    assert [path.name for path in files][:1] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def test_a_bound_graph_has_no_shapes_between_inputs_and_outputs(bert: Structure, tmp_path: Path) -> None:
    bert.bound(bert.source, tmp_path / "model.onnx")
    assert onnx.load(str(bert.simplified)).graph.value_info
    assert not onnx.load(str(tmp_path / "model.onnx")).graph.value_info


@pytest.mark.parametrize("permutation", [None, [1, 0]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_graph_can_point_into_the_checkpoint(permutation: list[int] | None, dtype: Any, tmp_path: Path) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": np.zeros(3, np.float32), "w": values}, source / "model.safetensors")
    got = bound_alone(tmp_path, {"permutation": permutation}, link=True, source=source)
    assert np.array_equal(got, values if permutation is None else values.T)
    file = tmp_path / "model.safetensors"
    # What would have to be converted is not pointed to.
    assert file.exists() == (dtype is np.float32)
    if file.exists():
        assert file.samefile(source / "model.safetensors")
        (tensor,) = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.initializer
        assert {e.key: e.value for e in tensor.external_data}["location"] == "model.safetensors"
        assert not tensor.raw_data


@pytest.mark.parametrize("permutation", [None, [1, 0]])
def test_weights_beside_the_graph_begin_at_pages(permutation: list[int] | None, tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"a": np.zeros(3, np.float32), "w": values}, tmp_path / "model.safetensors")
    got = bound_alone(tmp_path, {"permutation": permutation}, embed_limit_bytes=0)
    assert np.array_equal(got, values if permutation is None else values.T)
    (tensor,) = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.initializer
    place = {entry.key: entry.value for entry in tensor.external_data}
    assert place == {"location": "model.onnx_data", "offset": "0", "length": "24"}


def test_weights_that_are_computed_come_from_the_loaded_module(tmp_path: Path) -> None:
    merged = np.arange(6, dtype=np.float32).reshape(2, 3)
    module = {"both.w": torch.from_numpy(merged)}
    assert np.array_equal(bound_alone(tmp_path, {"folder": None, "key": "both.w"}, loaded=lambda: module), merged)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_is_refused_unless_a_buffer_is_infinite(
    value: float, buffer: bool, dtype: Any, tmp_path: Path
) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    values[1, 1] = value
    save_file({"w": values}, tmp_path / "model.safetensors")
    if buffer and not np.isnan(value):
        assert np.array_equal(bound_alone(tmp_path, {"buffer": True}), values)
        return
    with pytest.raises(InputError, match="holds NaN or infinite weights in w"):
        bound_alone(tmp_path, {"buffer": buffer})
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        pytest.param({"v": np.zeros((2, 3), np.float32)}, "w is not there", id="absent"),
        pytest.param({"w": np.zeros((3, 2), np.float32)}, r"w is F32 of the shape \[3, 2\]", id="another-shape"),
        pytest.param({"w": np.zeros((2, 3), np.int64)}, r"w is I64 of the shape \[2, 3\]", id="whole-numbers"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(stored: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=words):
        bound_alone(tmp_path, {})
    assert not (tmp_path / "model.onnx").exists()


def test_nothing_is_read_of_the_weights_while_a_model_is_loaded_without_them(bert: Structure) -> None:
    request = {"folder": str(bert.source)}
    with weightless() as origins:
        _, model = loaded_model(request, ModelSpec.from_json(bert.spec), check_values=False)
    file = (bert.source / "model.safetensors").resolve()
    known = {name: origins.of(tensor) for name, tensor in model.named_parameters()}
    assert known == {name: Origin(file=file, key=name) for name in known}
    assert all(not tensor.any() for tensor in model.parameters())
    # Computed from the config, and so a part of the structure.
    assert model.embeddings.position_ids.any()
    # A part or another view of a weight is not that weight.
    weight = model.embeddings.word_embeddings.weight
    assert origins.of(weight[:1]) is origins.of(weight.T) is None
    # Whoever loads afterwards gets the weights.
    _, real = loaded_model(request, ModelSpec.from_json(bert.spec))
    assert real.embeddings.word_embeddings.weight.any()


def test_a_model_whose_code_reads_values_is_left_to_another_way(tmp_path: Path) -> None:
    structure = Structure("bert-model", tmp_path / "one")
    request = {"folder": str(structure.source), "dtype": "float32", "opset": None, "output": str(tmp_path / "x.onnx")}
    spec = {**structure.spec, "sizes": {**structure.spec["sizes"], "sequence_length": 10**6}}
    spec["axis_ranges"] = {**spec["axis_ranges"], "sequence_length": [10**6, 10**6]}
    answer = template_steps.trace({**request, "spec": spec})
    assert "its structure alone cannot be traced" in answer["direct"]
    assert not (tmp_path / "x.onnx").exists()
