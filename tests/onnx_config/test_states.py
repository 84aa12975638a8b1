"""Models that keep states: one graph that begins a text and goes on with it, and generates what PyTorch generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from onnx_config import AutoModelForONNX
from onnx_config.cached_model import cache_of, held_in
from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.artifact import copy_side_files
from onnx_config.export.generation import NEW_TOKENS
from onnx_config.export.session import open_session
from tests.onnx_config.test_cached_model import Continued
from tests.onnx_config.test_runtime import HIDDEN, PROMPTS, WAYS

# States alone, and beside layers that attend; the others are slow. A scan over the tokens; whole chunks of them; states
# and keys in one layer; states that modules hold themselves.
FAMILIES = [
    pytest.param("mamba-causal-lm"),
    pytest.param("lfm2-causal-lm"),
    *(
        pytest.param(f"{name}-causal-lm", marks=pytest.mark.slow)
        for name in ("mamba2", "jamba", "bamba", "falcon_h1", "recurrent_gemma")
    ),
]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    made = Continued(request.param, tmp_path_factory.mktemp(request.param))
    copy_side_files(made.source, made.graph.parent)
    return made


def test_one_graph_begins_a_text_and_goes_on_with_it(made: Continued) -> None:
    result = made.parity()
    assert result["outcome"] == "verified", result["detail"]
    attends = {"past_sequence_length"} if "past_sequence_length" in made.spec.sizes else set()
    assert set(result["axes_proven"]) == {"batch_size", "sequence_length", *attends}
    assert result["shapes"] == 10
    assert result["notes"] == [
        f"generates the {NEW_TOKENS} tokens that PyTorch does, after 3 prompts padded on the left"
    ]


def test_states_have_the_names_that_the_layers_give_them(made: Continued) -> None:
    session = open_session(made.graph, device="cpu")
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    states = [tensor.name for tensor in made.spec.states]
    assert {name.split(".")[2] for name in states} <= {"conv_states", "recurrent_states", "conv1d_state"}
    for name in states:
        assert inputs[name] == outputs[name.replace("past_key_values", "present")]
        assert inputs[name][0] == "batch_size"
        assert all(isinstance(size, int) for size in inputs[name][1:])


@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in WAYS.items()])
def test_it_generates_what_pytorch_generates(made: Continued, options: dict[str, Any]) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(made.source).eval()
    # PyTorch's beams do not take along what modules hold themselves: only without a cache they are right.
    alone = any("conv1d_state" in tensor.name for tensor in made.spec.states) and "num_beams" in options
    texts = []
    for model, more in (
        (AutoModelForONNX.from_pretrained(made.graph.parent, threads=1), {}),
        (reference, {"use_cache": False} if alone else {}),
    ):
        torch.manual_seed(0)
        found = model.generate(
            PROMPTS, attention_mask=HIDDEN, max_new_tokens=32, min_new_tokens=32, pad_token_id=0, **options, **more
        )
        texts.append(found if isinstance(found, torch.Tensor) else found.sequences)
    assert torch.equal(*texts)
    assert texts[0].shape[1] == PROMPTS.shape[1] + 32


@pytest.mark.parametrize("cuts", [(3, 4), (3,), (1, 2, 3, 4), ()], ids=str)
def test_calls_go_on_from_what_earlier_ones_returned(made: Continued, cuts: tuple[int, ...]) -> None:
    # Also with more than one token, for which not every model of transformers takes its state into account.
    reference = transformers.AutoModelForCausalLM.from_pretrained(made.source).eval()
    model = AutoModelForONNX.from_pretrained(made.graph.parent, threads=1)
    with torch.no_grad():
        want = reference(input_ids=PROMPTS[:1], use_cache=False).logits
    got, past = [], None
    for ids in torch.tensor_split(PROMPTS[:1], list(cuts), dim=1):
        returned = model(input_ids=ids, past_key_values=past)
        got.append(returned.logits)
        past = returned.past_key_values
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=2e-5, rtol=1e-4)


def test_a_graph_that_forgets_is_told_apart(made: Continued, tmp_path: Path) -> None:
    from onnx_config.export.generation import compare_generation
    from onnx_config.export.loaded import loaded_model
    from tests.onnx_config.test_cached_model import Disturbed

    def forget(_: dict[str, Any], answer: dict[str, Any]) -> None:
        for tensor in made.spec.states:
            answer[tensor.name.replace("past_key_values", "present")][:] = 0

    request = {"folder": str(made.source), "spec": made.spec.to_json()}
    universal, model = loaded_model(request, made.spec)
    session = Disturbed(open_session(made.graph, device="cpu"), forget)
    generated = compare_generation(session, model, made.spec, universal)
    assert generated.difference is not None


# ---------------------------------------------------------------------------------------------------------- caches


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {f"past_key_values.{name}": torch.arange(24.0).reshape(2, 3, 4, 1) + n for n, name in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        pytest.param(("0.key", "0.value"), ["DynamicLayer"], id="keys"),
        pytest.param(("0.conv_states", "0.recurrent_states"), ["LinearAttentionLayer"], id="states"),
        pytest.param(
            ("0.conv_states", "1.key", "1.value"), ["LinearAttentionLayer", "DynamicLayer"], id="keys-beside-states"
        ),
        pytest.param(
            ("0.key", "0.value", "0.conv_states"), ["LinearAttentionAndFullAttentionLayer"], id="keys-and-states"
        ),
        pytest.param(("0.key", "0.value", "0.indexer_keys"), ["DynamicIndexedLayer"], id="keys-of-an-indexer"),
        pytest.param(("1.key", "1.value"), ["DynamicLayer", "DynamicLayer"], id="nothing-yet"),
        pytest.param(("1.recurrent_states",), ["DummyLayer", "LinearAttentionLayer"], id="nothing-ever"),
    ],
)
def test_layers_are_those_of_transformers(names: tuple[str, ...], kinds: list[str]) -> None:
    past = tensors(*names)
    cache = cache_of(past)
    assert [type(layer).__name__ for layer in cache.layers] == kinds
    held = held_in(cache, past)
    assert held.keys() == past.keys()
    assert all(torch.equal(held[name], past[name]) for name in past)
    assert held_in(cache_of(past, filled=False), past) == {}


def test_what_a_layer_writes_into_its_state_is_not_written_into_what_was_given() -> None:
    past = tensors("0.conv_states")
    cache_of(past).layers[0].conv_states[0].zero_()
    assert past["past_key_values.0.conv_states"].any()


def test_beams_take_states_along_that_no_layer_of_transformers_holds() -> None:
    past = tensors("0.conv1d_state", "1.key", "1.value")
    cache = cache_of(past)
    cache.reorder_cache(torch.tensor([1, 1]))
    for name, value in held_in(cache, past).items():
        np.testing.assert_array_equal(value, past[name][[1, 1]])


def test_a_model_that_keeps_what_no_cache_holds_is_refused() -> None:
    with pytest.raises(ModelError, match=r"No layer of a cache of transformers holds buffer_kv") as caught:
        cache_of(tensors("0.buffer_kv"), apart=())
    assert caught.value.kind is ErrorKind.UNSUPPORTED
