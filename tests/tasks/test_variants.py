"""Variants through a whole conversion: files beside the float32 ones, a verdict each, and how they are loaded."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.variants import Variant
from tasks import variants
from tasks.job import StepCost, reproduce_command
from tasks.key import action_key
from tasks.pipeline import convert_model
from tasks.report import ModelEntry, Report, Status, Verdict
from tasks.request import ConversionOptions
from tests.faults.harness import assert_nothing_half_done, request, share_traces, tiny, workspace

ASKED = (Variant.FP16, Variant.INT8, Variant.Q4)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    share_traces(root / "home")
    return root


@pytest.fixture(scope="module")
def gpt2(home: Path) -> ModelEntry:
    """A text generator with three variants."""
    model = tiny(home / "gpt2", "gpt2-causal-lm")
    return convert_model(request(model, variants=ASKED), workspace(home / "home"), output=home / "out")


def test_each_variant_is_a_file_beside_the_float32_one_with_a_verdict(gpt2: ModelEntry, home: Path) -> None:
    assert gpt2.status is Status.CONVERTED
    assert [graph.path for graph in gpt2.graphs] == [str(home / "out" / "model.onnx")]
    assert [entry.variant for entry in gpt2.variants] == list(ASKED)
    for entry in gpt2.variants:
        parity = entry.parity
        assert parity is not None
        assert parity.verdict is Verdict.VERIFIED
        assert parity.relative_error is not None
        assert parity.tolerance is not None
        assert 0 < parity.relative_error <= parity.tolerance
        assert parity.agreement is not None
        assert parity.agreement.choices > 100
        assert parity.agreement.rate > 0.5
        assert "sentences" in parity.agreement.over
        (graph,) = entry.graphs
        assert graph.path == str(home / "out" / f"model_{entry.variant}.onnx")
        assert Path(graph.path).stat().st_size == entry.size_bytes
        # Whoever feeds the float32 graph feeds these.
        assert (graph.inputs, graph.outputs) == (gpt2.graphs[0].inputs, gpt2.graphs[0].outputs)
    assert any("computes in float32: " in note and "LayerNormalization" in note for note in gpt2.notes)


def test_ferry_json_lists_them_and_the_report_is_one_document(gpt2: ModelEntry, home: Path) -> None:
    known = json.loads((home / "out" / "ferry.json").read_text())
    assert {f"model_{variant}.onnx" for variant in ASKED} <= known["files"].keys()
    assert [entry["graphs"][0]["path"] for entry in known["model"]["variants"]] == [f"model_{v}.onnx" for v in ASKED]
    document = json.loads(Report.of([gpt2], started_at=NOW, seconds=1.0).to_json())
    assert document["models"][0]["variants"][2]["parity"]["verdict"] == "verified"


def test_what_is_known_tells_its_variants_again(gpt2: ModelEntry, home: Path) -> None:
    again = convert_model(request(home / "gpt2", variants=ASKED), workspace(home / "home"))
    assert again.status is Status.REUSED
    assert [entry.parity for entry in again.variants] == [entry.parity for entry in gpt2.variants]
    assert all(Path(graph.path).is_file() for entry in again.variants for graph in entry.graphs)


@pytest.mark.parametrize("variant", ASKED)
def test_the_loader_generates_with_a_variant(gpt2: ModelEntry, home: Path, variant: Variant) -> None:
    assert gpt2.artifact is not None
    plain = AutoModelForONNX.from_pretrained(home / "out")
    model = AutoModelForONNX.from_pretrained(home / "out", variant=variant)
    assert Path(model.session._model_path).name == f"model_{variant}.onnx"
    want, got = plain(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert not torch.equal(want, got)
    assert torch.nn.functional.cosine_similarity(want.flatten(), got.flatten(), dim=0) > 0.9
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)
    if variant is Variant.FP16:
        assert torch.equal(tokens, plain.generate(IDS, max_new_tokens=4, do_sample=False))


def test_a_variant_that_is_not_there_is_an_error_that_names_those_that_are(gpt2: ModelEntry, home: Path) -> None:
    assert gpt2.artifact is not None
    words = (
        r"no graph of the variant 'q4f16'; it has float32, .*, fp16, int8, q4\. Convert the model with --variant q4f16"
    )
    with pytest.raises(InputError, match=words) as caught:
        AutoModelForONNX.from_pretrained(home / "out", variant="q4f16")
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_variant_that_was_changed_afterwards_is_not_loaded(gpt2: ModelEntry, home: Path) -> None:
    assert gpt2.artifact is not None
    path = home / "out" / "model_q4.onnx"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model_q4\.onnx in .* is not the file that was compared"):
        AutoModelForONNX.from_pretrained(home / "out", variant="q4")


def test_one_that_does_not_hold_is_left_out_and_the_float32_one_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's answer is changed, as a quantizer that spoils weights would change it."""
    honest = variants.run_child

    def spoilt(job: Any, step: Any, function: str, asked: Any, **options: Any) -> tuple[dict[str, Any], StepCost]:
        answer, cost = honest(job, step, function, asked, **options)
        if function.endswith(":variants"):
            answer["variants"]["q4"]["result"] |= {"outcome": "mismatch", "detail": "w is off by 1 in channel 3"}
        return answer, cost

    monkeypatch.setattr(variants, "run_child", spoilt)
    model = tiny(home / "bert", "bert-sequence-classification")
    wanted = request(model, variants=(Variant.FP16, Variant.Q4))
    entry = convert_model(wanted, workspace(home / "home"), output=home / "spoilt")
    assert entry.status is Status.CONVERTED
    fp16, q4 = entry.variants
    assert fp16.graphs
    assert q4.graphs == ()
    assert q4.parity is not None
    assert q4.parity.verdict is Verdict.MISMATCH
    assert sorted(path.name for path in (home / "spoilt").glob("*.onnx")) == ["model.onnx", "model_fp16.onnx"]
    assert "the variant q4 does not hold and is left out: w is off by 1 in channel 3" in entry.notes
    with pytest.raises(InputError, match="no graph of the variant 'q4'"):
        AutoModelForONNX.from_pretrained(home / "spoilt", variant="q4")
    assert_nothing_half_done(home / "home")


def test_a_child_that_fails_costs_the_variants_and_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = variants.run_child

    def failing(job: Any, step: Any, function: str, asked: Any, **options: Any) -> Any:
        if function.endswith(":variants"):
            raise ModelError("the quantizer fell over", kind=ErrorKind.RUNTIME_FAILED)
        return honest(job, step, function, asked, **options)

    monkeypatch.setattr(variants, "run_child", failing)
    model = tiny(home / "failing", "bert-sequence-classification", seed=1)
    entry = convert_model(request(model, variants=(Variant.Q4,)), workspace(home / "home"))
    assert entry.status is Status.CONVERTED
    assert entry.variants[0].parity is None
    assert "there is no variant q4: the quantizer fell over" in entry.notes


@pytest.mark.parametrize(("dtype", "number"), [("float16", 10), ("bfloat16", 16)])
def test_dtype_gives_the_graph_itself_in_that_type(home: Path, dtype: str, number: int) -> None:
    model = home / "gpt2"
    if not model.is_dir():
        tiny(model, "gpt2-causal-lm")
    entry = convert_model(request(model, dtype=dtype), workspace(home / "home"), output=home / dtype)
    assert entry.status is Status.CONVERTED, entry.error
    assert [path.name for path in (home / dtype).glob("*.onnx*")] == ["model.onnx"]
    graph = onnx.load(str(home / dtype / "model.onnx"))
    assert number in {tensor.data_type for tensor in graph.graph.initializer}
    assert {tensor.dtype for tensor in entry.graphs[0].outputs} == {"float32"}
    assert entry.parity is not None
    assert entry.parity.max_abs_diff is not None
    assert entry.parity.tolerance is not None
    assert 0 < entry.parity.max_abs_diff <= entry.parity.tolerance
    assert any(note.startswith(f"in {dtype}, after it was verified in float32") for note in entry.notes)
    loaded = AutoModelForONNX.from_pretrained(home / dtype)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_a_dtype_that_does_not_hold_is_a_mismatch_in_quarantine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = variants.run_child

    def spoilt(job: Any, step: Any, function: str, asked: Any, **options: Any) -> tuple[dict[str, Any], StepCost]:
        answer, cost = honest(job, step, function, asked, **options)
        if function.endswith(":variants"):
            answer["variants"]["fp16"]["result"] |= {"outcome": "mismatch", "detail": "logits has 4 NaN"}
        return answer, cost

    monkeypatch.setattr(variants, "run_child", spoilt)
    model = tiny(home / "spoilt-half", "bert-sequence-classification", seed=2)
    entry = convert_model(request(model, dtype="float16"), workspace(home / "home"))
    assert entry.status is Status.MISMATCH
    assert entry.error is not None
    assert "logits has 4 NaN" in entry.error.message
    assert entry.artifact is not None
    with pytest.raises(ModelError, match="quarantine"):
        AutoModelForONNX.from_pretrained(entry.artifact)


@pytest.mark.slow
def test_an_encoder_decoder_has_every_graph_in_the_variant(home: Path) -> None:
    model = tiny(home / "t5", "t5-conditional-generation")
    wanted = request(model, variants=(Variant.FP16, Variant.Q4F16))
    entry = convert_model(wanted, workspace(home / "home"), output=home / "t5-out")
    assert entry.status is Status.CONVERTED
    plain = AutoModelForONNX.from_pretrained(home / "t5-out")
    want = plain.generate(IDS, max_new_tokens=4, do_sample=False)
    for made in entry.variants:
        names = {Path(graph.path).name for graph in made.graphs}
        parts = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
        assert names == {f"{part}_{made.variant}.onnx" for part in parts}
        for merged in (True, False):
            loaded = AutoModelForONNX.from_pretrained(home / "t5-out", variant=made.variant, merged=merged)
            got = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
            assert got.shape == want.shape
            if made.variant == "fp16":
                assert torch.equal(got, want)


def test_options_without_variants_are_what_they_were() -> None:
    assert "variants" not in ConversionOptions().to_json()
    assert ConversionOptions(variants=ASKED).to_json()["variants"] == ["fp16", "int8", "q4"]
    keys = [action_key("a", "b", ConversionOptions(variants=v), versions={}) for v in ((), ASKED, ASKED[:1])]
    assert len(set(keys)) == 3


def test_a_failure_is_seen_again_with_the_same_variants() -> None:
    told = reproduce_command(request("org/a", variants=(Variant.FP16, Variant.Q4)))
    assert told == "ferry convert org/a --variant fp16 --variant q4"
