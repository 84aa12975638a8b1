"""Running a class on real values: what its refusals tell, and what a run leaves behind, which is nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from torch import nn

from onnx_config import trial
from onnx_config.frames import Frame, TensorView
from onnx_config.probe import Probe
from onnx_config.trial import Trial
from tests.onnx_config.picky_modules import Settings

IDS = np.arange(6).reshape(2, 3)


class Inner(nn.Module):
    def forward(self, states, mask=None, scale=None):
        doubled = states * 2
        return torch.cat(
            [doubled, mask],
            dim=1,
        )


class Outer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Identity()
        self.inner = Inner()

    def forward(self, input_ids, values=None):
        kept = self.second(self.first(input_ids.float()))
        return kept, self.inner(input_ids, mask=values)


def frames_of(**arrays) -> tuple[Frame, ...]:
    return Trial(Outer, Settings()).run({"input_ids": IDS, **arrays}).frames


def test_a_run_says_what_the_model_returns():
    config = tiny_models.config("bert-sequence-classification")
    result = Trial(transformers.BertForSequenceClassification, config).run({"input_ids": IDS})
    assert result.outputs == {"logits": ((2, 5), "float32")}
    assert (result.refusal, result.frames) == (None, ())
    assert result.progress > 10


def test_what_depends_on_values_is_decided():
    cls, config = transformers.BartForSequenceClassification, tiny_models.config("bart-sequence-classification")
    ids = np.full((2, 3), config.eos_token_id)
    assert Probe(cls, config).run({"input_ids": ((2, 3), "int64")}).undecidable
    assert Trial(cls, config).run({"input_ids": ids}).outputs["logits"] == ((2, 5), "float32")


def test_flags_are_passed_on():
    config = tiny_models.config("bert-model")
    result = Trial(transformers.BertModel, config).run({"input_ids": IDS}, output_hidden_states=True)
    assert "hidden_states.0" in result.outputs


def test_frames_lead_from_the_model_to_the_statement():
    frames = frames_of()
    ours = [frame.function for frame in frames if frame.place[0] == __file__]
    assert ours == ["forward", "forward"]
    assert frames[-1].source == "return torch.cat( [doubled, mask], dim=1, )"
    assert frames[-1].names == ("return", "torch", "cat", "doubled", "mask", "dim")
    assert frames[-1].place[1] > Inner.forward.__code__.co_firstlineno


def test_our_own_call_is_no_frame_of_the_model():
    files = {frame.place[0] for frame in frames_of()}
    assert trial.__file__ not in files
    assert __file__ in files


def test_names_that_were_none_are_told():
    frames = frames_of()
    assert frames[-1].nones == {"mask", "scale"}
    assert next(frame for frame in frames if "self.inner(" in frame.source).nones == {"values"}


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        pytest.param("states", TensorView(shape=(2, 3), dtype="int64", input="input_ids", largest=5), id="an-input"),
        pytest.param("doubled", TensorView(shape=(2, 3), dtype="int64", input=None, largest=10), id="computed"),
        pytest.param("mask", TensorView(shape=(4, 1), dtype="float32", input="values"), id="floats-have-no-largest"),
    ],
)
def test_tensors_of_a_frame(variable, expected):
    frame = frames_of(values=np.zeros((4, 1), "float32"))[-1]
    assert frame.tensors[variable] == expected


def test_an_empty_tensor_has_no_largest_value():
    frame = Trial(Outer, Settings()).run({"input_ids": np.zeros((0, 3), "int64")}).frames[-1]
    assert frame.tensors["states"] == TensorView(shape=(0, 3), dtype="int64", input="input_ids", largest=None)


@pytest.mark.parametrize(
    ("arrays", "progress"),
    [
        pytest.param({"input_ids": IDS[:, :2]}, 0, id="the-first-module-refuses"),
        pytest.param({"input_ids": IDS}, 2, id="two-return"),
        pytest.param({"input_ids": IDS, "values": IDS}, 4, id="all-return"),
    ],
)
def test_progress_counts_the_modules_that_return(arrays, progress):
    assert Trial(Outer, Settings()).run(arrays).progress == progress


def test_a_refusal_without_words_is_named():
    class Silent(Outer):
        def forward(self, input_ids):
            raise NotImplementedError

    assert Trial(Silent, Settings()).run({"input_ids": IDS}).refusal == "NotImplementedError"


def test_words_stand_on_one_line():
    class Verbose(Outer):
        def forward(self, input_ids):
            raise ValueError("two\n   lines")

    assert Trial(Verbose, Settings()).run({"input_ids": IDS}).refusal == "two lines"


class Careless(nn.Module):
    """Writes into its input, into itself, into the config, warns, and refuses odd ids."""

    def __init__(self, config):
        super().__init__()
        config.seen = True
        self.weight = nn.Parameter(torch.randn(3))
        self.calls = []

    def forward(self, input_ids):
        warnings.warn("as ever", UserWarning, stacklevel=1)
        self.calls.append(1)
        self.length = input_ids.shape[1]
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        input_ids += 1
        torch.nn.functional.dropout(self.weight, training=self.training)
        if int(input_ids[0, 0]) % 2:
            return input_ids
        raise ValueError("an even one")


@pytest.mark.parametrize("first", [pytest.param(0, id="accepted"), pytest.param(1, id="refused")])
def test_a_run_leaves_nothing_behind(first):
    threads, hooks = torch.get_num_threads(), dict(nn.modules.module._global_forward_hooks)
    torch.set_num_threads(2)
    try:
        torch.manual_seed(7)
        expected = torch.rand(2)
        torch.manual_seed(7)
        config, ids = Settings(), IDS + first
        careless = Trial(Careless, config)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = careless.run({"input_ids": ids})
        assert (result.outputs is None) == bool(first)
        assert caught == []
        assert torch.equal(torch.rand(2), expected)
        assert torch.get_num_threads() == 2
        assert (careless.model.calls, hasattr(careless.model, "length")) == ([], False)
        np.testing.assert_array_equal(ids, IDS + first)
        assert not hasattr(config, "seen")
        assert dict(nn.modules.module._global_forward_hooks) == hooks
    finally:
        torch.set_num_threads(threads)


def test_a_model_is_made_for_use_and_the_same_each_time():
    one, other = Trial(Careless, Settings()).model, Trial(Careless, Settings()).model
    assert torch.equal(one.weight, other.weight)
    assert not one.training


def test_what_the_class_raises_when_built_is_raised():
    class Broken(nn.Module):
        def __init__(self, config):
            raise ZeroDivisionError("in the config")

    with pytest.raises(ZeroDivisionError, match="in the config"):
        Trial(Broken, Settings())
