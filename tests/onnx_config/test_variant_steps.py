"""Variants of a graph as the step makes and judges them: healthy ones hold, planted faults are caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from onnx_config.export import half, quantized, steps, variant_steps
from onnx_config.variants import Variant, variant_file
from tests.onnx_config.converted import Converted


def ask(made: Converted, folder: Path, *variants: Variant, optional: bool = False) -> dict[str, Any]:
    """Return what the step answers."""
    outputs = {variant.value: str(folder / variant_file("model.onnx", variant)) for variant in variants}
    request = {**made.check_request(), "outputs": outputs, "metadata": {}, "optional": optional}
    return variant_steps.variants(request)["variants"]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_healthy_variants_hold(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Converted = request.getfixturevalue(name)
    for variant, answer in ask(made, tmp_path, *Variant).items():
        assert answer["refusal"] is None, variant
        result = answer["result"]
        assert (result["outcome"], result["detail"]) == ("verified", None), variant
        assert result["shapes"] >= 4
        size = (tmp_path / variant_file("model.onnx", variant)).stat().st_size
        assert size < 0.9 * made.stored.stat().st_size
        graph = onnx.load(str(tmp_path / variant_file("model.onnx", variant)))
        assert [value.name for value in graph.graph.output] == [value["name"] for value in answer["graph"]["outputs"]]
        props = {entry.key: entry.value for entry in graph.metadata_props}
        assert props["onnx_ferry.variant"] == variant
    assert any("LayerNormalization (sums)" in note for note in ask(made, tmp_path, Variant.FP16)["fp16"]["notes"])


def test_what_classifies_has_a_rate_of_agreement_and_what_does_not_has_none(
    bert: Converted, vit: Converted, tmp_path: Path
) -> None:
    agreement = ask(vit, tmp_path, Variant.FP16)["fp16"]["result"]["agreement"]
    assert agreement["rate"] == 1
    assert agreement["choices"] >= 10
    assert ask(bert, tmp_path, Variant.FP16)["fp16"]["result"]["agreement"] is None


@pytest.mark.parametrize("variant", [Variant.INT8, Variant.QUANTIZED, Variant.Q4, Variant.Q4F16])
def test_a_quantizer_that_zeroes_a_channel_is_caught(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    healthy = quantized.quantize

    def faulty(path: Path, output: Path, kind: Variant) -> int:
        count = healthy(path, output, kind)
        model = onnx.load(str(output))
        tensor = next(t for t in model.graph.initializer if t.name.endswith(("_Q4", "_quantized")))
        array = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name.endswith("_Q4"):
            array[3] = 0x88
        else:
            name = tensor.name.replace("_quantized", "_zero_point")
            zero = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
            array[:, 3] = zero.reshape(-1)[0]
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(model, str(output))
        return count

    monkeypatch.setattr(quantized, "quantize", faulty)
    result = ask(bert, tmp_path, variant)[variant]["result"]
    assert result["outcome"] == "mismatch"
    assert "in channel 3" in result["detail"]


def enlarged(made: Converted, folder: Path) -> Converted:
    """Return a model whose feed-forward values are beyond float16, and are brought back by the next weight."""
    source = shutil.copytree(made.source, folder / "source")
    weights = load_file(source / "model.safetensors")
    first = next(name for name in weights if name.endswith("intermediate.dense.weight"))
    for name in weights:
        stem = first.removesuffix("intermediate.dense.weight")
        if name.startswith(f"{stem}intermediate.dense"):
            weights[name] = weights[name] * np.float32(2e5)
        elif name == f"{stem}output.dense.weight":
            weights[name] = weights[name] / np.float32(2e5)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    stored = folder / "model.onnx"
    spec = made.spec.to_json()
    steps.export(
        {"folder": str(source), "spec": spec, "dtype": "float32", "opset": None, "output": str(folder / "t.onnx")}
    )
    steps.simplify({"graph": str(folder / "t.onnx"), "output": str(stored), "metadata": {}, "simplify": True})
    return replace(made, source=source, stored=stored)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_overflows_stays_float32_and_a_converter_that_does_not_see_it_is_caught(
    bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = enlarged(bert, tmp_path)
    answer = ask(model, tmp_path, Variant.FP16)["fp16"]
    assert answer["result"]["outcome"] == "verified", answer["result"]["detail"]
    assert "MatMul (beyond float16)" in answer["notes"][0]
    measured: Callable[..., dict[str, float]] = half.magnitudes
    monkeypatch.setattr(half, "magnitudes", lambda path, feeds: dict.fromkeys(measured(path, feeds), 1.0))
    blind = ask(model, tmp_path, Variant.FP16, Variant.Q4F16)
    for variant in (Variant.FP16, Variant.Q4F16):
        assert blind[variant]["result"]["outcome"] == "mismatch"
    assert "as on a GPU" in blind["fp16"]["result"]["detail"]


def test_a_graph_without_weights_to_quantize(bert: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_quantize_blocks", lambda path, output: output.write_bytes(path.read_bytes()))
    alone = ask(bert, tmp_path, Variant.Q4)["q4"]
    assert alone["refusal"] == "The graph has no weight of a matrix product to quantize."
    among = ask(bert, tmp_path, Variant.Q4, optional=True)["q4"]
    assert among["result"]["outcome"] == "verified"
