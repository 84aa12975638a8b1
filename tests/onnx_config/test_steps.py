"""The steps as a child runs them: JSON in, JSON out, and what each refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from onnx_config import UniversalOnnxConfig
from onnx_config.cache_layout import with_past
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export import branches, comparison, steps
from onnx_config.export import reference as reference_module
from onnx_config.export.branches import Branch, branches_of, without_branches
from onnx_config.export.comparison import as_in_graph
from onnx_config.export.graph_file import read_graph, summarize
from onnx_config.export.limits import AxisLimit
from onnx_config.export.loaded import loaded_model
from onnx_config.export.sample import Sample, ties_in_padding, uneven_sizes
from onnx_config.export.ties import TieWatch
from onnx_config.spec import ModelSpec, TensorSpec
from tests.onnx_config.converted import Converted, edited
from tests.tiny_models import IMAGE_SIZE


def export_request(converted: Converted, output: Path, **changes: Any) -> dict[str, Any]:
    request = {"folder": str(converted.source), "spec": converted.spec.to_json(), "dtype": "float32", "opset": None}
    return {**request, "output": str(output), **changes}


def test_answers_are_json(bert: Converted) -> None:
    for answer in (bert.spec.to_json(), bert.exported, bert.simplified, bert.parity()):
        json.dumps(answer, allow_nan=False)
    assert ModelSpec.from_json(json.loads(json.dumps(bert.spec.to_json()))) == bert.spec


def test_the_cache_is_told_beside_the_inputs(tmp_path: Path) -> None:
    source = tiny_models.build("gpt2-causal-lm", tmp_path / "gpt2")
    plain = steps.detect({"folder": str(source), "task": "text-generation"})
    assert steps.detect({"folder": str(source), "task": "text-generation-with-past"}) == plain
    assert not any(t["name"].startswith("past") for t in plain["inputs"])
    continued = with_past(ModelSpec.from_json(plain))
    assert continued.continues
    assert [t.name for t in continued.inputs[:4]] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
    ]


def test_a_model_that_keeps_nothing_cannot_continue(bert: Converted) -> None:
    with pytest.raises(ModelError, match=r"BertModel keeps nothing from step to step.*leave -with-past out") as caught:
        with_past(bert.spec)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        pytest.param(
            {"dtype": "float8"},
            ModelError,
            "'float8' was asked for; there are float32, float16 and bfloat16",
            id="dtype",
        ),
        pytest.param(
            {"opset": 17}, InputError, "The opset 17 was asked for; the exporter writes opsets 18 to", id="old"
        ),
        pytest.param({"opset": 999}, InputError, "The opset 999 was asked for", id="opset-of-the-future"),
    ],
)
def test_options_that_are_refused(
    bert: Converted, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        steps.export(export_request(bert, tmp_path / "model.onnx", **changes))
    assert not list(tmp_path.iterdir())


def test_inputs_that_the_model_refuses_are_named(bert: Converted, tmp_path: Path) -> None:
    spec = replace(bert.spec, sizes={"batch_size": 2, "sequence_length": 500})
    with pytest.raises(ModelError, match=r"BertModel refuses .*input_ids \[2, 500\]") as caught:
        steps.export(export_request(bert, tmp_path / "model.onnx", spec=spec.to_json()))
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_an_output_that_the_checkpoint_lacks_is_left_out_and_said_so(bert: Converted, tmp_path: Path) -> None:
    source = Path(shutil.copytree(bert.source, tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    graph = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = steps.export(export_request(bert, graph, folder=str(source)))
    assert [output["name"] for output in answer["graph"]["outputs"]] == ["last_hidden_state"]
    assert answer["notes"] == ["pooler_output is declared, yet this checkpoint does not return it"]
    assert bert.parity(graph, folder=str(source))["outcome"] == "verified"


def fix_the_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def test_an_axis_that_is_fixed_in_the_graph_is_not_varied(vit: Converted, tmp_path: Path) -> None:
    result = vit.parity(edited(vit.stored, fix_the_batch, tmp_path / "model.onnx"))
    assert (result["outcome"], result["shapes"], result["axes_proven"]) == ("verified", 4, ())


def test_inputs_are_narrowed_to_what_the_graph_takes(bert: Converted) -> None:
    spec = replace(
        bert.spec,
        inputs=(
            TensorSpec(name="pixel_values", dtype="float32", shape=("batch_size", 3, "height", "width")),
            TensorSpec(name="pixel_mask", dtype="int64", shape=("batch_size", "height", "width")),
            TensorSpec(name="pruned", dtype="int64", shape=("batch_size",)),
        ),
        sizes={"batch_size": 2, "height": 64, "width": 96},
    )
    graph = (
        {"name": "pixel_values", "dtype": "float32", "shape": ["batch_size", 3, 64, "height"]},
        {"name": "pixel_mask", "dtype": "int64", "shape": ["batch_size", 64, "unknown"]},
    )
    assert [tensor.shape for tensor in as_in_graph(spec, graph)] == [
        ("batch_size", 3, 64, "height"),
        ("batch_size", 64, "width"),
        ("batch_size",),
    ]


@pytest.mark.parametrize(("name", "padded"), [("bert", True), ("vit", False)])
def test_a_mask_among_the_inputs_is_tried_with_padding(
    name: str, padded: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = comparison.check_shapes

    def seen(*args: Any, masked: bool, **options: Any) -> Any:
        asked.append(masked)
        return original(*args, masked=masked, **options)

    monkeypatch.setattr(comparison, "check_shapes", seen)
    request.getfixturevalue(name).parity()
    assert asked == [padded]


def test_nothing_is_written_but_what_is_named(bert: Converted) -> None:
    assert {path.name for path in bert.traced.parent.iterdir()} == {"source", "stored", "traced.onnx"}
    assert summarize(read_graph(bert.traced)).nodes == bert.exported["graph"]["nodes"]


@pytest.mark.parametrize(
    ("size", "highest", "fixed", "traced"),
    [
        pytest.param(16, None, (), 19, id="even"),
        pytest.param(16, 512, (), 19, id="even-and-bounded"),
        pytest.param(16, 18, (), 16, id="no-room"),
        pytest.param(16, 16, (), 13, id="the-longest"),
        pytest.param(2, 2, (), 2, id="too-short"),
        pytest.param(33, None, (), 33, id="longer-already"),
        pytest.param(19, None, (), 19, id="uneven-already"),
        pytest.param(16, None, ("sequence_length",), 16, id="fixed"),
    ],
)
def test_a_text_is_traced_at_a_length_that_is_a_multiple_of_nothing(
    bert: Converted, size: int, highest: int | None, fixed: tuple[str, ...], traced: int
) -> None:
    ranges = {"batch_size": (1, None), "sequence_length": (1, highest)}
    spec = replace(bert.spec, sizes={"batch_size": 2, "sequence_length": size}, axis_ranges=ranges)
    assert uneven_sizes(spec, fixed) == {"batch_size": 2, "sequence_length": traced}


def test_rows_that_come_in_groups_are_traced_with_two_of_them(bert: Converted) -> None:
    spec = replace(
        bert.spec, sizes={"batch_size": 8}, axis_ranges={"batch_size": (8, None)}, axis_steps={"batch_size": 8}
    )
    assert uneven_sizes(spec, ()) == {"batch_size": 16}
    assert uneven_sizes(spec, ("batch_size",)) == {"batch_size": 8}


class Routed(torch.nn.Module):
    """Chooses among the features of tokens, which are all zero for a padding token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        features = (input_ids != 0)[..., None] * torch.arange(1.0, 5.0)
        return features.topk(2).values * attention_mask[..., None]


def test_padding_is_looked_at_for_equal_values_to_choose_among(bert: Converted) -> None:
    universal = UniversalOnnxConfig.from_model_path(bert.source)
    assert ties_in_padding(bert.spec, universal, Routed().eval(), bert.spec.sizes)
    unpadded = replace(bert.spec, inputs=tuple(t for t in bert.spec.inputs if not t.name.endswith("mask")))
    assert not ties_in_padding(unpadded, universal, Routed().eval(), bert.spec.sizes)
    refusing = torch.nn.Linear(2, 2)
    assert not ties_in_padding(bert.spec, universal, refusing, bert.spec.sizes)


def test_sizes_at_which_a_model_takes_another_branch_than_its_graph_are_found(bert: Converted) -> None:
    universal, model = loaded_model({"folder": str(bert.source)}, bert.spec)
    untried = (("sequence_length", 21), ("batch_size", 10**9))
    assert branches_of(untried, bert.traced, bert.spec, universal, model) == ()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    (found,) = branches_of(untried, bert.traced, bert.spec, universal, model)
    assert (found.axis, found.size) == ("sequence_length", 21)
    assert "at another branch" in found.why


def test_a_branch_that_tells_in_a_long_text_only_is_found(bert: Converted) -> None:
    universal, model = loaded_model({"folder": str(bert.source)}, bert.spec)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[40:].mul_(-3)
    untried = (("sequence_length", 21), ("sequence_length", 30))
    (found,) = branches_of(untried, bert.traced, bert.spec, universal, model)
    assert (found.axis, found.size) == ("sequence_length", 21)


@pytest.mark.parametrize("axis", ["sequence_length", "height"])
def test_what_branches_is_refused_unless_it_is_an_image(
    vit: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str
) -> None:
    answers = [(Branch(axis=axis, size=1, why="y differs by 1"),), ()]
    monkeypatch.setattr(steps, "branches_of", lambda *_: answers.pop(0))
    sides = {"height": (32, 64), "width": (32, 64)}
    image = replace(vit.spec.inputs[0], shape=("batch_size", 3, "height", "width"))
    spec = replace(
        vit.spec,
        inputs=(image,),
        sizes={"batch_size": 2, "height": 32, "width": 32},
        axis_ranges={**vit.spec.axis_ranges, **sides},
    )
    request = export_request(vit, tmp_path / "model.onnx", spec=spec.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        if axis == "sequence_length":
            with pytest.raises(ModelError, match="one graph holds one way of computing only: y differs by 1"):
                steps.export(request)
            return
        answer = steps.export(request)
    assert answer["graph"]["inputs"][0]["shape"] == ("batch_size", 3, 32, 32)
    assert "height, width is fixed, since the model computes otherwise at other sizes" in " ".join(answer["notes"])


@pytest.mark.parametrize(
    ("axis", "size", "stops", "kept"),
    [
        pytest.param("past_sequence_length", 41, True, True, id="past"),
        pytest.param("past_sequence_length", 41, False, False, id="other-numbers"),
        pytest.param("past_sequence_length", 24, True, False, id="too-short"),
        pytest.param("past_sequence_length", 3, True, False, id="below"),
        pytest.param("batch_size", 41, True, False, id="any-size"),
    ],
)
def test_a_graph_that_stops_where_tables_grow_is_taken(
    bert: Converted, axis: str, size: int, *, stops: bool, kept: bool
) -> None:
    sizes = {"batch_size": 2, "sequence_length": 8, "past_sequence_length": 5}
    ranges = {"batch_size": (1, None), "sequence_length": (1, 64), "past_sequence_length": (0, None)}
    spec = replace(bert.spec, sizes=sizes, axis_ranges=ranges)
    sample = Sample(sizes=sizes, inputs={}, returned=(), watch=TieWatch(), image_size=None)
    branch = Branch(axis=axis, size=size, why="y differs by 1", stops=stops)

    def trace_with(fixed: tuple[str, ...], turns: tuple[AxisLimit, ...]) -> Any:
        if turns:
            raise ModelError("the other way cannot be traced", kind=ErrorKind.EXPORT_FAILED)
        return SimpleNamespace(sizes={}, model=None), (branch,)

    if not kept:
        with pytest.raises(ModelError, match="one graph holds one way of computing only"):
            without_branches(spec, sample, (), trace_with, write=pytest.fail)
        return
    _, (note,) = without_branches(spec, sample, (), trace_with, write=pytest.fail)
    assert "past_sequence_length is at most 40" in note


def limited(bert: Converted, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Export as if the model computed otherwise from ``size`` on."""
    branch = Branch(axis="sequence_length", size=size, why="y differs by 1")
    monkeypatch.setattr(steps, "branches_of", lambda *_: (branch,))
    monkeypatch.setattr(branches, "_MOST_TURNS", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        return steps.export(export_request(bert, folder / "traced.onnx"))


def test_a_graph_of_one_branch_is_compared_up_to_its_limit_and_refuses_more(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = limited(bert, tmp_path, 81, monkeypatch)
    (note,) = answer["notes"]
    assert note.startswith("sequence_length is at most 80, and the graph refuses more: the model computes otherwise")
    stored = tmp_path / "stored.onnx"
    steps.simplify({"graph": str(tmp_path / "traced.onnx"), "output": str(stored), "metadata": {}, "simplify": True})
    summary = summarize(read_graph(stored))
    assert summary.limits == (AxisLimit(axis="sequence_length", most=80),)
    assert [str(tensor.shape) for tensor in summary.inputs] == ["('batch_size', 'sequence_length')"] * 3
    compared = []
    original = reference_module.compute_references

    def seen(model: Any, feeds: Any, **options: Any) -> Any:
        compared.extend(shape.sizes["sequence_length"] for shape, _ in feeds)
        return original(model, feeds, **options)

    monkeypatch.setattr(reference_module, "compute_references", seen)
    result = bert.parity(stored)
    assert (result["outcome"], result["detail"]) == ("verified", None)
    assert "sequence_length" in result["axes_proven"]
    assert max(compared) == compared[-1] == 80


def test_a_graph_that_does_not_refuse_more_than_its_limit_is_a_mismatch(bert: Converted) -> None:
    result = bert.parity(limits=[{"axis": "sequence_length", "most": 40}])
    assert result["outcome"] == "mismatch"
    assert "the graph does not refuse sequence_length=41" in result["detail"]


@pytest.mark.parametrize("size", [pytest.param(20, id="too-short"), pytest.param(12, id="shorter-than-the-sample")])
def test_a_graph_of_a_branch_that_is_of_no_use_is_refused(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    with pytest.raises(ModelError, match=r"computes otherwise at other sizes of sequence_length.*y differs") as caught:
        limited(bert, tmp_path, size, monkeypatch)
    assert ("would hold up to 19 only" in caught.value.message) == (size == 20)


def test_a_model_that_takes_one_image_size_is_compared_at_that_size(
    vit: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reference_module.compute_references
    side = vit.spec.sizes.get("height", IMAGE_SIZE)
    image = replace(vit.spec.inputs[0], shape=("batch_size", 3, "height", "width"))

    def picky(model: Any, feeds: Any, **options: Any) -> Any:
        taken = [feed for feed in feeds if (feed[0].sizes["height"], feed[0].sizes["width"]) == (side, side)]
        references, refused = original(model, taken, **options)
        return references, [*refused, *["another size"] * (len(feeds) - len(taken))]

    monkeypatch.setattr(reference_module, "compute_references", picky)
    monkeypatch.setattr(comparison, "as_in_graph", lambda *_: (image,))
    spec = replace(vit.spec, sizes={"batch_size": 2, "height": side, "width": side})
    result = vit.parity(spec=spec.to_json())
    assert (result["outcome"], result["axes_proven"]) == ("verified", ("batch_size",)), result["detail"]
    assert result["skipped"][-1] == "another size"
