"""A module to a verified artifact in one call: written if it holds, and only then."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny_models
import torch

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.module import ConvertedModule, convert_module
from tasks.report import ModelEntry
from tests.onnx_config import plain_modules


class Recurrent(torch.nn.Module):
    """Steps through time, which the exporter unrolls: its graph is for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.RNN(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steps(x)[0]


class Moody(torch.nn.Module):
    """Computes something else while it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (3 if torch.compiler.is_exporting() else 2)


def convert(module: torch.nn.Module, folder: Path, **options: Any) -> ConvertedModule:
    # torch and the exporter warn of their own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_module(module, folder, **options)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, ConvertedModule]:
    torch.manual_seed(0)
    module = plain_modules.Image().train()
    return module, convert(module, tmp_path_factory.mktemp("image") / "artifact", simplify=False)


def test_a_module_is_compared_at_sizes_that_it_was_not_traced_at(image: tuple[Any, ConvertedModule]) -> None:
    parity = image[1].parity
    assert parity.outcome == "verified"
    assert (parity.shapes, parity.axes_proven) == (5, ("batch_size", "height", "width"))


def test_the_artifact_is_like_any_other(image: tuple[Any, ConvertedModule]) -> None:
    module, converted = image
    assert {path.name for path in converted.folder.iterdir()} == {"model.onnx", "ferry.json"}
    entry = ModelEntry.model_validate(json.loads((converted.folder / "ferry.json").read_text())["model"])
    assert (entry.architecture, entry.task, entry.parity and entry.parity.verdict) == ("Image", "custom", "verified")
    graph = onnx.load(converted.folder / "model.onnx")
    assert {p.key: p.value for p in graph.metadata_props}["onnx_ferry.verdict"] == "verified"
    loaded = AutoModelForONNX.from_pretrained(converted.folder)
    pixels = torch.randn(3, 3, 21, 34)
    assert module.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(image=pixels).output, module.eval()(pixels))


def test_a_folder_that_is_not_empty_is_left_alone(image: tuple[Any, ConvertedModule]) -> None:
    module, converted = image
    with pytest.raises(InputError, match="is not empty"):
        convert(module, converted.folder)


@pytest.mark.slow
def test_a_simplified_graph_is_compared_too(tmp_path: Path) -> None:
    converted = convert(plain_modules.Sound(), tmp_path / "artifact")
    assert (converted.simplified, converted.parity.outcome) == (True, "verified")
    entry = json.loads((converted.folder / "ferry.json").read_text())["model"]
    assert entry["graphs"][0]["nodes"] <= entry["graphs"][0]["nodes_before_simplify"]


def test_a_length_that_cannot_be_traced_as_dynamic_is_no_conversion(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"code fixes sequence_length at the size that it is traced at") as caught:
        convert(Recurrent(), tmp_path / "artifact", simplify=False)
    assert caught.value.kind is ErrorKind.EXPORT_FAILED
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_not_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not compute what PyTorch computes .*Nothing was written") as caught:
        convert(Moody(), tmp_path / "artifact", example_inputs={"x": torch.randn(3, 4)}, simplify=False)
    assert caught.value.kind is ErrorKind.MISMATCH
    assert not list(tmp_path.iterdir())


def test_a_model_of_transformers_brings_its_config(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    module = BertForMaskedLM(tiny_models.config("bert-masked-lm"))
    converted = convert(module, tmp_path / "artifact", simplify=False)
    assert {path.name for path in converted.folder.iterdir()} == {"model.onnx", "ferry.json", "config.json"}
    assert (converted.spec.task, converted.parity.outcome) == ("fill-mask", "verified")
    assert AutoModelForONNX.from_pretrained(converted.folder).config.model_type == "bert"


@pytest.mark.parametrize(
    ("module", "options", "error", "words"),
    [
        pytest.param(
            plain_modules.Line().half(), {}, ModelError, r"weights of torch.float16; .*module.float\(\)", id="half"
        ),
        pytest.param(plain_modules.Line(), {"device": "tpu"}, InputError, "'tpu' was asked for", id="device"),
        pytest.param(plain_modules.Unannotated(), {}, InputError, "Annotate them", id="no-inputs"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, module: torch.nn.Module, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        convert(module, tmp_path / "artifact", **options)
    assert not list(tmp_path.iterdir())
