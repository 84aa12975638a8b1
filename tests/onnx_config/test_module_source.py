"""A module given directly: what it takes is read, else found out by running it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_models
import torch

from onnx_config import UniversalOnnxConfig
from onnx_config.errors import ErrorKind, InputError, InternalError, ModelError
from onnx_config.module.outputs import NamedOutputs
from onnx_config.module.source import CUSTOM
from onnx_config.task_detector import TASKS, task_of_class
from tests.onnx_config import plain_modules

ROWS = "batch_size"
LONG = "sequence_length"


def found(name: str, **options: Any) -> UniversalOnnxConfig:
    torch.manual_seed(0)
    return UniversalOnnxConfig.from_model(getattr(plain_modules, name)().eval(), **options)


def shapes(specs: Any) -> dict[str, tuple[Any, ...]]:
    return {spec.name: spec.shape for spec in specs}


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        pytest.param("Line", {"x": (ROWS, 10)}, {"output": (ROWS, 3)}, id="linear"),
        pytest.param("Image", {"image": (ROWS, 3, "height", "width")}, {"output": (ROWS, 5)}, id="images"),
        pytest.param("Flat", {"image": (ROWS, 1, 28, 28)}, {"output": (ROWS, 5)}, id="images-of-one-size"),
        pytest.param(
            "Sound", {"wave": (ROWS, 6, LONG)}, {"wave_output": (ROWS, 8, "wave_output_dim_2"), "energy": (ROWS,)},
            id="sound-into-a-dict",
        ),
        pytest.param(
            "Text", {"tokens": (ROWS, LONG), "kinds": (ROWS, LONG)}, {"scores": (ROWS, LONG, 12), "pooled": (ROWS, 12)},
            id="text-into-a-dataclass",
        ),
        pytest.param(
            "Pair", {"left": (ROWS, 9), "right": (ROWS, 9)}, {"total": (ROWS, 9), "product": (ROWS, 4)},
            id="two-into-a-named-tuple",
        ),
        pytest.param(
            "Dictionary", {"x": (ROWS, "x_dim_1")}, {"output_0": (ROWS, "x_dim_1"), "output_1.mean": (ROWS,)},
            id="containers",
        ),
        pytest.param(
            "Documented", {"points": (ROWS, "num_points", 3), "weights": (ROWS, "num_points")}, {"output": (ROWS, 3)},
            id="docstring",
        ),
        pytest.param("Tables", {"choice": (ROWS, LONG)}, {"output": (ROWS, 4)}, id="whole-numbers"),
        pytest.param(
            "Length", {"first": (ROWS, "first_dim_1"), "second": (ROWS, "second_dim_1")},
            {"output": (ROWS, "output_dim_1")}, id="a-size-that-is-a-sum",
        ),
    ],
)  # fmt: skip
def test_what_a_module_takes_and_gives(name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    onnx_config = found(name)
    assert shapes(onnx_config.inference.inputs) == inputs
    assert shapes(onnx_config.inference.outputs) == outputs
    assert (onnx_config.task, onnx_config.model_type, onnx_config.architecture) == (CUSTOM, CUSTOM, name)
    assert not set(onnx_config.inputs) & set(onnx_config.outputs)
    for sizes in ({}, {"batch_size": 1}, {"batch_size": 3, "seed": 4}):
        arguments = onnx_config.generate_dummy_inputs(**sizes)
        returned = NamedOutputs(onnx_config.source.module)(**arguments)  # type: ignore[union-attr]  # it has a source
        assert {name: value.dim() for name, value in returned.items()} == {n: len(s) for n, s in outputs.items()}


@pytest.mark.parametrize(
    ("name", "axis", "limits"),
    [
        pytest.param("Image", "height", (5, None), id="a-kernel-asks-for-its-size"),
        pytest.param("Text", LONG, (1, 40), id="a-table-of-positions-ends"),
        pytest.param("Line", ROWS, (1, None), id="rows-have-no-limit"),
    ],
)
def test_the_limits_of_an_axis(name: str, axis: str, limits: tuple[int, int | None]) -> None:
    assert found(name).spec.axis_ranges[axis] == limits


def test_whole_numbers_stay_inside_their_tables() -> None:
    onnx_config = found("Text")
    limits = {a.name: a.index_limit for a in onnx_config.declaration.arguments}
    assert (limits["tokens"], limits["kinds"]) == (50, 3)
    values = onnx_config.generate_dummy_inputs(batch_size=40, seq_length=40, framework="np")
    assert (values["tokens"].max(), values["kinds"].max()) == (49, 2)


def test_a_size_that_only_rounding_allows_is_no_axis() -> None:
    learned = found("Flat").spec.proven
    assert ["height is fixed at 28" in learned[0], "width is fixed at 28" in learned[1]] == [True, True]


def test_examples_give_names_types_and_ranks() -> None:
    examples = {"rows": torch.randn(4), "x": torch.randn(4, 10, 8)}
    onnx_config = found("Unannotated", example_inputs=examples)
    assert shapes(onnx_config.inference.inputs) == {"x": (ROWS, LONG, 8), "rows": (ROWS,)}
    assert shapes(onnx_config.inference.outputs) == {"output_0": (ROWS, LONG, 4), "output_1": ()}
    assert onnx_config.sizes == {ROWS: 4, LONG: 10}


def test_an_example_makes_an_optional_input_one() -> None:
    ones = torch.ones(3, 12, dtype=torch.int64)
    onnx_config = found("Text", example_inputs={"tokens": ones, "kinds": ones, "mask": torch.ones(3, 12)})
    assert shapes(onnx_config.inference.inputs) == dict.fromkeys(("tokens", "kinds", "mask"), (ROWS, LONG))


@pytest.mark.parametrize(
    ("name", "examples", "error", "words"),
    [
        pytest.param("Unannotated", None, InputError, "takes x, rows, scale, and no parameter", id="no-annotations"),
        pytest.param("Picky", None, ModelError, r"refuses every input .* example_inputs", id="nothing-to-go-by"),
        pytest.param("Line", {"y": torch.ones(1)}, InputError, r"names 'y'; forward of Line takes \['x'\]", id="name"),
        pytest.param("Line", {"x": torch.ones(2, 9)}, ModelError, "refuses the example inputs", id="shape"),
        pytest.param("Line", {"x": torch.ones(1).to(torch.complex64)}, InputError, "is a torch.complex64", id="dtype"),
        pytest.param("Line", {"x": 3}, InputError, "example of 'x' is a int", id="no-tensor"),
    ],
)
def test_modules_and_examples_that_are_refused(name: str, examples: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        found(name, example_inputs=examples)


def test_only_modules_are_taken() -> None:
    with pytest.raises(InputError, match=r"A torch\.nn\.Module was expected; got dict"):
        UniversalOnnxConfig.from_model({})  # type: ignore[arg-type]  # which is the point


def test_the_module_is_the_same_afterwards() -> None:
    module = plain_modules.Image().train()
    module.head.eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    UniversalOnnxConfig.from_model(module)
    assert (module.training, module.conv.training, module.head.training) == (True, True, False)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_module_is_copied_without_its_weights() -> None:
    onnx_config = found("Text")
    source = onnx_config.source
    assert source is not None
    with torch.device("meta"):
        made = source.build(None)
    assert {value.device.type for value in made.state_dict().values()} == {"meta"}
    assert onnx_config.spec.parameters == sum(p.numel() for p in made.parameters())
    with pytest.raises(InternalError, match="is not read from"):
        source.load(None)  # type: ignore[arg-type]  # it is never opened


@pytest.mark.parametrize(
    ("name", "architecture", "task", "outputs"),
    [
        pytest.param("bert-masked-lm", "BertForMaskedLM", "fill-mask", ["logits"], id="the-head-that-is-there"),
        pytest.param(
            "bert-masked-lm", "BertModel", "feature-extraction", ["last_hidden_state", "pooler_output"], id="backbone"
        ),
        pytest.param(
            "vit-image-classification", "ViTForImageClassification", "image-classification", ["logits"], id="images"
        ),
    ],
)
def test_models_of_transformers(name: str, architecture: str, task: str, outputs: list[str]) -> None:
    import transformers

    module = getattr(transformers, architecture)(tiny_models.config(name))
    onnx_config = UniversalOnnxConfig.from_model(module)
    assert (onnx_config.task, onnx_config.architecture) == (task, architecture)
    assert onnx_config.get_output_names() == outputs
    assert onnx_config.config is module.config
    with pytest.raises(InputError, match="example_inputs are for modules that are not from transformers"):
        UniversalOnnxConfig.from_model(module, example_inputs={})


def test_a_backbone_without_its_pooler_has_one_output() -> None:
    from transformers import BertModel

    module = BertModel(tiny_models.config("bert-model"), add_pooling_layer=False)
    assert UniversalOnnxConfig.from_model(module).get_output_names() == ["last_hidden_state"]


def test_a_task_that_is_asked_for() -> None:
    assert found("Line", task="text-classification").task == "text-classification"
    assert CUSTOM not in TASKS
    assert task_of_class("MyOwnForTokenClassification").task == "token-classification"
    with pytest.raises(InputError, match="There is no task 'custom'"):
        found("Line", task=CUSTOM)


@pytest.mark.filterwarnings("ignore:# 'dynamic_axes' is not recommended:UserWarning")
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:from_dynamic_axes_to_dynamic_shapes is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["Text", "Pair"])
def test_the_documented_example_runs_on_a_module(name: str, tmp_path: Any) -> None:
    module = getattr(plain_modules, name)().eval()
    onnx_config = UniversalOnnxConfig.from_model(module)
    dummy_inputs = onnx_config.generate_dummy_inputs(batch_size=2)
    path = str(tmp_path / "model.onnx")
    # fmt: off
    torch.onnx.export(module, tuple(dummy_inputs.values()), path,
                      input_names=onnx_config.get_input_names(), output_names=onnx_config.get_output_names(),
                      dynamic_axes=onnx_config.get_dynamic_axes(), opset_version=onnx_config.DEFAULT_ONNX_OPSET)
    # fmt: on
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == onnx_config.get_output_names()
    inputs = onnx_config.generate_dummy_inputs(batch_size=5, seed=1)
    with torch.no_grad():
        expected = NamedOutputs(module)(**inputs)
    for key, value in zip(
        onnx_config.get_output_names(), session.run(None, {k: v.numpy() for k, v in inputs.items()}), strict=True
    ):
        np.testing.assert_allclose(value, expected[key].numpy(), atol=onnx_config.ATOL_FOR_VALIDATION)


def test_the_kind_of_a_refusal() -> None:
    with pytest.raises(ModelError) as caught:
        found("Picky")
    assert caught.value.kind is ErrorKind.UNSUPPORTED
