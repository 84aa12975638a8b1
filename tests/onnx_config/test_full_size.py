"""From a shrunken model to the full one: its sizes where shapes alone decide, else translated ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import transformers

from onnx_config import UniversalOnnxConfig
from onnx_config.full_size import answer_at_full_size, at_full_size, is_confirmed
from onnx_config.probe import ProbeResult
from onnx_config.shape_inference import Inference
from onnx_config.spec import TensorSpec
from onnx_config.twin import Twin
from tests.onnx_config.picky_modules import Settings

TEXT = ("batch_size", "sequence_length")
TWIN = Twin(
    config=None,
    parameters=9,
    full_parameters=90,
    changes={"hidden_size": (4096, 128), "num_hidden_layers": (32, 2), "heads": (64, 16), "experts": (8, 16)},
)


class Answer:
    """A model that gives one answer, and remembers what it was asked."""

    def __init__(self, outputs=None, refusal=None, *, undecidable=False):
        self.result = ProbeResult(outputs=outputs, refusal=refusal, undecidable=undecidable)
        self.asked = []

    def run(self, shapes, **flags):
        self.asked.append((shapes, flags))
        return self.result


def unbuilt():
    raise AssertionError("nobody asked for a shallow model")


def impossible():
    raise ValueError("so many layers are needed")


def at_full(small, full, *, shallow=unbuilt, twin=TWIN, **flags):
    answer = answer_at_full_size(small, twin, shallow=shallow, full=full, flags=flags)
    return at_full_size(small, twin, answer)


def tensor(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def found(*outputs):
    return Inference(
        inputs=(tensor("input_ids", *TEXT, dtype="int64"),),
        outputs=outputs,
        axis_ranges={"batch_size": (1, None), "sequence_length": (1, 64)},
        sizes={"batch_size": 2, "sequence_length": 16},
        values={},
        learned=("as it was",),
        assumed=("before",),
    )


@pytest.mark.parametrize(
    ("small", "outputs", "expected"),
    [
        pytest.param(
            [tensor("logits", *TEXT, 128)], {"logits": ((2, 16, 4096), "float32")}, [tensor("logits", *TEXT, 4096)],
            id="sizes-are-the-full-models",
        ),
        pytest.param(
            [tensor("logits", *TEXT)], {"logits": ((2, 16), "bool")}, [tensor("logits", *TEXT, dtype="bool")],
            id="types-too",
        ),
        pytest.param(
            [tensor("states.0", *TEXT, 128)],
            {"states.0": ((2, 16, 4096), "float32"), "states.1": ((2, 16, 4096), "float32")},
            [tensor("states.0", *TEXT, 4096), tensor("states.1", "batch_size", 16, 4096)],
            id="more-layers",
        ),
        pytest.param(
            [tensor("logits", *TEXT)], {"logits": ((2, 16), "float32"), "loss": ((), "float32")},
            [tensor("logits", *TEXT)], id="what-the-twin-left-out-stays-out",
        ),
        pytest.param(
            [tensor("logits", "batch_size", 128)], {"logits": ((2, 16, 4096), "float32")},
            [tensor("logits", "batch_size", 16, 4096)], id="another-rank",
        ),
    ],
)  # fmt: skip
def test_the_full_model_says_its_sizes(small, outputs, expected):
    result = at_full(found(*small), Answer(outputs=outputs))
    assert list(result.outputs) == expected
    assert (result.learned, result.assumed) == (("as it was",), ("before",))


def test_the_full_model_is_asked_at_the_twins_sizes():
    answer = Answer(outputs={})
    at_full(found(), answer, use_cache=False)
    assert answer.asked == [({"input_ids": ((2, 16), "int64")}, {"use_cache": False})]


FULL = {"logits": ((2, 4096), "float32")}


@pytest.mark.parametrize(
    ("names", "shallow", "asked", "size"),
    [
        pytest.param(["logits"], Answer({"logits": ((2, 99), "float32")}), 0, 99, id="it-answers"),
        pytest.param(["logits"], Answer(refusal="no"), 1, 4096, id="it-refuses"),
        pytest.param(["logits"], Answer(refusal="values", undecidable=True), 0, 4096, id="neither-can-answer"),
        pytest.param(["logits"], impossible, 1, 4096, id="it-cannot-be-built"),
        pytest.param(["logits", "states.0"], unbuilt, 1, 4096, id="one-output-a-layer"),
    ],
)
def test_a_shallow_model_is_asked_first(names, shallow, asked, size):
    full, build = Answer(FULL), (shallow if callable(shallow) else lambda: shallow)
    small = found(*(tensor(name, "batch_size", 128) for name in names))
    result = at_full(small, full, shallow=build, twin=replace(TWIN, shallow=Settings()))
    assert (len(full.asked), result.outputs[0].shape) == (asked, ("batch_size", size))


@pytest.mark.parametrize(
    ("answer", "confirmed"),
    [
        pytest.param(ProbeResult(outputs={"logits": ((2, 16, 4096), "float32")}, refusal=None), True, id="it-agrees"),
        pytest.param(ProbeResult(outputs=None, refusal="x", undecidable=True), True, id="values-decide"),
        pytest.param(ProbeResult(outputs=None, refusal="no"), False, id="it-refuses"),
        pytest.param(ProbeResult(outputs={"scores": ((2, 16, 9), "float32")}, refusal=None), False, id="others"),
        pytest.param(ProbeResult(outputs={"logits": ((2, 4096), "float32")}, refusal=None), False, id="another-rank"),
        pytest.param(ProbeResult(outputs={"logits": ((2, 8, 9), "float32")}, refusal=None), False, id="another-length"),
    ],
)
def test_the_full_model_confirms_what_its_twin_said(answer, confirmed):
    assert is_confirmed(found(tensor("logits", *TEXT, 128)), answer) is confirmed


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(128, 4096, id="shrunk"),
        pytest.param("batch_size", "batch_size", id="an-axis"),
        pytest.param(130, 130, id="not-shrunk"),
        pytest.param(2, 2, id="a-small-number-tells-nothing"),
        pytest.param(16, 16, id="of-two-that-were-shrunk-neither"),
    ],
)
def test_where_values_decide_sizes_are_translated(size, expected):
    result = at_full(found(tensor("logits", size)), Answer(refusal="data-dependent"))
    assert result.outputs == (tensor("logits", expected),)
    assert result.assumed == ("before", "output sizes are those of a shrunken model, translated: data-dependent")


@pytest.mark.parametrize(
    ("name", "sizes", "outputs"),
    [
        pytest.param(
            "bart-sequence-classification", {"d_model": 512, "vocab_size": 30000, "encoder_layers": 6},
            {"logits": ("batch_size", 5), "encoder_last_hidden_state": (*TEXT, 512)}, id="values-decide",
        ),
        pytest.param(
            "bert-model", {"hidden_size": 768, "vocab_size": 30000, "num_hidden_layers": 6},
            {"last_hidden_state": (*TEXT, 768), "pooler_output": ("batch_size", 768)}, id="shapes-decide",
        ),
    ],
)  # fmt: skip
def test_a_large_model_is_described_at_its_size(name, sizes, outputs):
    config = tiny_models.config(name)
    config.update(sizes)
    described = UniversalOnnxConfig(type(config).from_dict(config.to_dict()))
    assert described.spec.parameters > 20_000_000
    assert {t.name: t.shape for t in described.spec.outputs} == outputs
    noted = any("translated" in note for note in described.spec.assumed)
    assert noted == (name.startswith("bart"))
    assert issubclass(described.model_class, transformers.PreTrainedModel)
