"""Models of timm: their config is read without the library, and converting one says which extra it takes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from onnx_config import UniversalOnnxConfig, timm_models
from onnx_config.config_file import config_from_dict
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.timm_models import as_wrapper_config, is_timm_config, require_timm
from tests.onnx_config.converted import check_request

RESNET: dict[str, Any] = {
    "architecture": "resnet10t",
    "num_classes": 7,
    "model_args": {"num_classes": 7, "in_chans": 3},
    "pretrained_cfg": {"input_size": [3, 64, 96], "num_classes": 7, "mean": [0.5, 0.5, 0.5]},
}
FEATURES = {**RESNET, "num_classes": 0, "model_args": None}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(RESNET, True, id="timm"),
        pytest.param({"architecture": "resnet18", "num_classes": 10}, True, id="older-timm"),
        pytest.param({"model_type": "timm_wrapper", "architecture": "resnet18"}, True, id="transformers-wrapper"),
        pytest.param({"model_type": "vit", "architecture": "x", "num_classes": 3}, False, id="another-model-type"),
        pytest.param({"architecture": "resnet18"}, False, id="an-architecture-alone"),
        pytest.param({}, False, id="nothing"),
    ],
)
def test_whose_config_it_is(value: dict[str, Any], expected: bool) -> None:
    assert is_timm_config(value) is expected


@pytest.mark.parametrize(
    ("value", "head"),
    [
        pytest.param(RESNET, "TimmWrapperForImageClassification", id="with-classes"),
        pytest.param(FEATURES, "TimmWrapperModel", id="without"),
        pytest.param({**RESNET, "architectures": ["TimmWrapperModel"]}, "TimmWrapperModel", id="as-named"),
    ],
)
def test_the_head_decides_the_class(value: dict[str, Any], head: str) -> None:
    before = json.dumps(value)
    made = as_wrapper_config(value)
    assert (made["model_type"], made["architectures"]) == ("timm_wrapper", [head])
    assert (made["image_size"], made["num_channels"]) == ([64, 96], 3)
    assert "num_classes" not in (made.get("model_args") or {})
    assert json.dumps(value) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"num_classes": -1}, "num_classes -1", id="classes"),
        pytest.param({"num_classes": "7"}, "num_classes '7'", id="classes-as-text"),
        pytest.param({"pretrained_cfg": {"input_size": [224, 224]}}, "input_size", id="two-sizes"),
        pytest.param({"model_args": [1]}, "model_args", id="arguments"),
    ],
)
def test_configs_that_say_nothing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_wrapper_config({**RESNET, **changes})


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_models, "_problem", lambda: "ModuleNotFoundError: No module named 'timm'")


@pytest.mark.usefixtures("without_timm")
def test_without_the_library_the_extra_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"resnet10t is a model of timm, .* pip install 'onnx-ferry\[timm\]'"
    ) as caught:
        require_timm("resnet10t")
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_the_library_as_it_is_here(tmp_path: Path) -> None:
    """A config is read with or without it; what needs the class is converted or refused, in the words above."""
    if timm_models._problem() is None:
        pytest.skip("timm is here; test_a_folder_of_timm says that it is converted")
    (tmp_path / "config.json").write_text(json.dumps(RESNET))
    onnx_config = UniversalOnnxConfig.from_pretrained(tmp_path)
    assert (onnx_config.task, onnx_config.model_type) == ("image-classification", "timm_wrapper")
    with pytest.raises(ModelError, match=r"pip install 'onnx-ferry\[timm\]'"):
        onnx_config.get_input_names()


def test_a_config_of_the_wrapper_is_read() -> None:
    config = config_from_dict(FEATURES)
    assert (config.model_type, config.architecture, config.num_labels) == ("timm_wrapper", "resnet10t", 0)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [7, 0])
def test_a_folder_of_timm(tmp_path: Path, classes: int) -> None:
    import torch
    from safetensors.torch import save_file

    from onnx_config.export import steps
    from onnx_config.export.loaded import loaded_model

    timm = pytest.importorskip("timm", reason="timm is not installed, or not the torchvision that fits torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model("resnet10t", num_classes=classes).eval()
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        value = {**RESNET, "num_classes": classes}
        (tmp_path / "config.json").write_text(json.dumps(value))
        spec = steps.detect({"folder": str(tmp_path)})
        graph = tmp_path / "out.onnx"
        request = {"folder": str(tmp_path), "spec": spec, "dtype": "float32", "opset": None}
        steps.export({**request, "output": str(graph)})
        answer = steps.parity({**request, **check_request(graph)})
        _, loaded = loaded_model(request, steps.ModelSpec.from_json(spec))
        pixels = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            found = loaded(pixel_values=pixels)
            torch.testing.assert_close(found.logits if classes else found.pooler_output, model(pixels))
    assert answer["outcome"] == "verified"
    assert answer["axes_proven"] == ("batch_size", "height", "width")
