"""Running a class on shapes alone, and leaving no trace of it in the module tree."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers

from onnx_config.module_state import preserved_state
from onnx_config.probe import Probe, flat_outputs

IDS = ((2, 7), "int64")


def probe_of(name: str) -> Probe:
    return Probe(getattr(transformers, tiny_models.FAMILIES[name].architecture), tiny_models.config(name))


def test_a_probe_says_what_the_model_returns():
    result = probe_of("bert-sequence-classification").run({"input_ids": IDS})
    assert result.outputs == {"logits": ((2, 5), "float32")}
    assert (result.refusal, result.undecidable) == (None, False)


def test_a_refusal_is_an_answer_in_the_models_words():
    result = probe_of("vit-model").run({"pixel_values": ((2, 3, 64, 64), "float32")})
    assert result.outputs is None
    assert not result.undecidable
    assert "doesn't match model" in result.refusal


def test_what_depends_on_values_cannot_be_decided():
    result = probe_of("bart-sequence-classification").run({"input_ids": IDS})
    assert result.outputs is None
    assert result.undecidable


class FakesAskedError(Exception):
    """Fake tensors were asked."""


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        pytest.param("bert-masked-lm", False, id="a-mask-is-not-looked-at"),
        pytest.param("t5-conditional-generation", False, id="two-halves"),
        pytest.param("bart-sequence-classification", True, id="ends-of-texts-are-looked-for"),
    ],
)
def test_fake_tensors_are_asked_only_where_the_meta_device_has_no_answer(name, asked, monkeypatch):
    probe = probe_of(name)
    inputs = {"input_ids": IDS, "attention_mask": IDS}
    inputs |= {"decoder_input_ids": IDS} if name.startswith("t5") else {}
    before = probe.run(inputs)
    assert before.undecidable is asked

    def ask(*_):
        raise FakesAskedError

    monkeypatch.setattr(Probe, "_run_faked", ask)
    if asked:
        with pytest.raises(FakesAskedError):
            probe.run(inputs)
    else:
        assert probe.run(inputs) == before


class Indexed(torch.nn.Module):
    """Wants a value of a tensor that it made itself, and tells apart what has values from what has none."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, value, pick: bool = False):
        if pick:
            return self.layer(value)[:, : torch.tensor(2).item()] * self.scale
        return self.layer(value) * self.scale


def test_either_way_of_asking_leaves_the_other_as_it_was():
    probe, inputs = Probe(Indexed, None), {"value": ((5, 3), "float32")}
    for pick, width in ((False, 4), (True, 2), (False, 4), (True, 2)):
        assert probe.run(inputs, pick=pick).outputs == {"output": ((5, width), "float32")}
    assert all(tensor.is_meta for tensor in (*probe.model.parameters(), *probe.model.buffers()))


class Picked(torch.nn.Module):
    """Picks what its own mask shows, of one element or of all."""

    def __init__(self, config: object) -> None:
        super().__init__()

    def forward(self, value, one: bool = False):
        return torch.tensor([7])[torch.tensor([True])] + value if one else value[value > 0]


def test_places_in_a_tensor_are_known_to_nobody(monkeypatch):
    probe, inputs = Probe(Picked, None), {"value": ((5, 3), "float32")}
    assert probe.run(inputs, one=True).outputs == {"output": ((5, 3), "float32")}
    faked = probe._run_faked(inputs, "forward", {})
    monkeypatch.setattr(Probe, "_run_faked", None)
    assert probe.run(inputs) == faked
    assert faked.undecidable


def test_a_model_with_values_keeps_them():
    model = Indexed(None)
    probe = Probe(lambda _: model, None)
    assert probe.run({"value": ((5, 3), "float32")}).outputs == {"output": ((5, 4), "float32")}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model(torch.zeros(1, 3)).shape == (1, 4)


@pytest.mark.parametrize("name", ["bert-masked-lm", "gpt2-causal-lm", "t5-conditional-generation"])
def test_shared_parameters_are_counted_once(name):
    config = tiny_models.config(name)
    model = getattr(transformers, tiny_models.FAMILIES[name].architecture)(config)
    probe = probe_of(name)
    assert probe.parameters == sum(p.numel() for p in model.parameters())
    assert len(list(probe.model.parameters())) == len(list(model.parameters()))


def test_a_config_stays_as_it_was():
    config = tiny_models.config("bert-model")
    before = config.to_json_string()
    Probe(transformers.BertModel, config).run({"input_ids": IDS})
    assert config.to_json_string() == before


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        pytest.param("swin-model", {"pixel_values": ((1, 3, 32, 32), "float32")}, id="writes-attributes"),
        pytest.param(
            "segformer-semantic-segmentation", {"pixel_values": ((1, 3, 64, 64), "float32")}, id="hangs-up-hooks"
        ),
    ],
)
def test_a_run_changes_no_later_run(name, inputs):
    probe, small = probe_of(name), {key: ((1, 3, 16, 16), dtype) for key, (_, dtype) in inputs.items()}
    first = probe.run(inputs)
    assert first.outputs is not None
    for _ in range(3):
        probe.run(small)
    assert probe.run(inputs) == first


class Careless(torch.nn.Module):
    """Leaves behind whatever a forward pass can."""

    def __init__(self):
        super().__init__()
        self.sizes = [1]
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, value):
        self.seen = True
        self.sizes.append(2)
        self.extra = torch.nn.Linear(2, 2)
        self.register_buffer("cache", value)
        self.layer.register_forward_hook(lambda *_: None)
        del self.layer.bias
        return value


def test_everything_that_a_module_holds_is_restored():
    module = Careless()
    hooks = module.layer._forward_hooks
    with preserved_state(module):
        module(torch.ones(2))
    assert module.sizes == [1]
    assert dict(module.named_children()) == {"layer": module.layer}
    assert [name for name, _ in module.named_parameters()] == ["layer.weight", "layer.bias"]
    assert not hasattr(module, "seen")
    assert dict(module.named_buffers()) == {}
    assert module.layer._forward_hooks is hooks
    assert not hooks


def test_a_module_is_restored_after_an_error_too():
    module = Careless()
    with pytest.raises(RuntimeError, match="size"), preserved_state(module):
        torch.ones(2) @ module(torch.ones(3))
    assert module.sizes == [1]


def test_only_tables_with_a_padding_row_lose_positions():
    assert probe_of("roberta-model").offset_position_tables == {130: 2}
    assert probe_of("bert-model").offset_position_tables == {}


def test_outputs_have_dotted_names_without_caches():
    value = {"logits": torch.zeros(1), "pair": (torch.zeros(2), {"inner": torch.zeros(3)}), "flag": True}
    assert [(name, tuple(t.shape)) for name, t in flat_outputs(value)] == [
        ("logits", (1,)),
        ("pair.0", (2,)),
        ("pair.1.inner", (3,)),
    ]
    assert [name for name, _ in flat_outputs(torch.zeros(1))] == ["output"]
