"""Layers that are alike are traced a few times and repeated; what does not repeat is traced as a whole."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from onnx_config.cache_layout import with_past
from onnx_config.export import steps, template_steps
from onnx_config.export import trace as trace_module
from onnx_config.export.alike_layers import Stack, alike_layers, shortened
from onnx_config.export.graph_file import write_graph
from onnx_config.export.trace import Trace, trace_model
from onnx_config.parts import encoder_decoder_parts
from onnx_config.spec import ModelSpec, TensorSpec
from tests.onnx_config.converted import CERTIFICATE, check_request

COUNT = 12
WIDTH = 4


class StackedConfig(PreTrainedConfig):
    model_type = "stacked"


class Layer(torch.nn.Module):
    """A residual layer that knows its number."""

    def __init__(
        self, number: int, *, bias: bool = True, kind: str = "plain", rate: float = 0.0, switched: bool = False
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=bias)
        self.number = number
        self.kind = kind
        self.rate = rate
        self.switched = switched
        self.act = partial(torch.nn.functional.gelu, approximate="tanh")

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.act(self.linear(x)) * mask
        return x * 2 if self.kind == "double" else x


class ByNumber(Layer):
    """Computes with its number."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, mask) / (self.number + 1)


class ByRate(Layer):
    """Computes with a number of its own."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, mask) * (1 - self.rate)


class Keeping(torch.nn.Module):
    """A layer that goes on with what it kept."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner = Layer(number)

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inner(x, past)
        return x, past + x.sum(-1, keepdim=True)


class Stacked(PreTrainedModel):
    """Layers one after another, and a norm."""

    config_class = StackedConfig
    layer: Callable[[int], torch.nn.Module] = Layer

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config or StackedConfig())
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(type(self).layer(number) for number in range(COUNT))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.eval()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = (x.abs().sum(-1, keepdim=True) > 0).to(x.dtype)
        return self.run(x, mask)

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Go through the layers."""
        for layer in self.layers:
            x = layer(x, mask)
        return {"y": self.norm(x)}


class Between(Stacked):
    """Computes something between two layers, too."""

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x, mask).tanh()
        return {"y": x}


class EachGiven(Stacked):
    """Gives what every layer says."""

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {}
        for number, layer in enumerate(self.layers):
            x = layer(x, mask)
            given[f"present.{number}.key"] = x
        return {"y": self.norm(x), **given}


class EachTaken(Stacked):
    """Takes something for every layer, as a cache is taken."""

    layer = Keeping

    def forward(self, x: torch.Tensor, past_key_values: dict[str, Any]) -> dict[str, torch.Tensor]:
        given = {}
        for number, layer in enumerate(self.layers):
            past = past_key_values[str(number)]["key"].clone()
            x, given[f"present.{number}.key"] = layer(x, past)
        return {"y": self.norm(x), **given}


class Alternating(Stacked):
    """Every third layer is another."""

    layer = staticmethod(lambda number: Layer(number, kind="double" if number % 3 == 2 else "plain"))


class Dropping(Stacked):
    """Layers have rates of dropout that grow."""

    layer = staticmethod(lambda number: Layer(number, rate=number / 10))


class FirstOther(Stacked):
    """The first layer has another weight."""

    layer = staticmethod(lambda number: Layer(number, bias=number > 0))


class Numbered(Stacked):
    """Layers compute with their number."""

    layer = ByNumber


class Rated(Stacked):
    """Layers compute with a rate of their own."""

    layer = staticmethod(lambda number: ByRate(number, rate=number / 10))


class Skipping(Stacked):
    """The last layers read what the first ones said, as in a U-net."""

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        said = []
        for layer in self.layers:
            x = layer(x, mask)
            said.append(x)
        return {"y": x + said[0] + said[COUNT // 2]}


class Gathering(Stacked):
    """All layers are read in the end."""

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        said = [x]
        for layer in self.layers:
            said.append(layer(said[-1], mask))
        return {"y": torch.stack(said).sum(0)}


class Counting(Stacked):
    """Goes over as many layers as there were."""

    def run(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        for number in range(COUNT):
            x = self.layers[number](x, mask)
        return {"y": self.norm(x)}


REPEATED = (Stacked, Between, EachGiven, EachTaken, Alternating, Dropping, FirstOther)
WHOLE = (Numbered, Rated, Skipping, Gathering, Counting)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes how a graph was made: ``few`` or ``all`` of its layers; an attempt that failed is noted, too."""
    made: list[str] = []
    original = trace_module._export

    def export(*arguments: Any, **options: Any) -> Any:
        made.append("few" if options.get("repetition") is not None else "all")
        return original(*arguments, **options)

    monkeypatch.setattr(trace_module, "_export", export)
    return made


def traced(model: PreTrainedModel, *, repeats: bool) -> tuple[Trace, dict[str, torch.Tensor]]:
    inputs = {"x": torch.rand(2, 6, WIDTH)}
    specs = [TensorSpec(name="x", dtype="float32", shape=("batch_size", "sequence_length", WIDTH))]
    outputs = ["y"]
    if isinstance(model, EachTaken):
        for number in range(COUNT):
            name = f"past_key_values.{number}.key"
            inputs[name] = torch.rand(2, 6, 1)
            specs.append(TensorSpec(name=name, dtype="float32", shape=("batch_size", "sequence_length", 1)))
    if isinstance(model, (EachGiven, EachTaken)):
        outputs += [f"present.{number}.key" for number in range(COUNT)]
    options: dict[str, Any] = {"axis_ranges": {}, "opset": None, "flags": {}, "before_optimizing": lambda graph: None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and the exporter warn of their own deprecations
        return trace_model(model, inputs, specs, outputs, repeats=repeats, **options), inputs


def same_numbers(model: PreTrainedModel, graph: Trace, inputs: dict[str, torch.Tensor], path: Path) -> None:
    write_graph(graph.model, path, metadata={})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    given = {name: torch.rand(3, 5, *value.shape[2:]) for name, value in inputs.items()}
    if "past_key_values.0.key" in given:
        past = {str(n): {"key": given[f"past_key_values.{n}.key"]} for n in range(COUNT)}
        wanted = model(x=given["x"], past_key_values=past)
    else:
        wanted = model(**given)
    names = [value.name for value in session.get_outputs()]
    assert names == list(wanted)
    for name, value in zip(names, session.run(None, {k: v.numpy() for k, v in given.items()}), strict=True):
        np.testing.assert_allclose(value, wanted[name].detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("cls", REPEATED)
def test_what_repeats_is_traced_with_few_layers(cls: type[Stacked], attempts: list[str], tmp_path: Path) -> None:
    model = cls()
    layers = list(model.layers)
    few, inputs = traced(model, repeats=True)
    assert attempts == ["few"]
    assert list(model.layers) == layers
    same_numbers(model, few, inputs, tmp_path / "few.onnx")
    whole, _ = traced(model, repeats=False)
    assert operators(few.model) == operators(whole.model)
    assert weights(few.model, model) == weights(whole.model, model)


@pytest.mark.parametrize("cls", WHOLE)
def test_what_does_not_repeat_is_traced_as_a_whole(cls: type[Stacked], attempts: list[str], tmp_path: Path) -> None:
    model = cls()
    whole, inputs = traced(model, repeats=True)
    assert attempts == ["few", "all"]
    same_numbers(model, whole, inputs, tmp_path / "whole.onnx")


def operators(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for graph in model.graphs() for node in graph)


def weights(graph: onnx_ir.Model, model: torch.nn.Module) -> list[str]:
    return [name for name in graph.graph.initializers if name in model.state_dict()]


class Listed(Stacked):
    """Its config tells layers apart that are alike to look at."""

    def __init__(self) -> None:
        super().__init__(StackedConfig(layer_types=["near", *["far"] * (COUNT - 1)]))


class Switched(Stacked):
    """Off in the first layer and on in the others, which compares as their numbers do."""

    layer = staticmethod(lambda number: Layer(number, switched=number > 0))


class LastOther(Stacked):
    layer = staticmethod(lambda number: Layer(number, bias=number < COUNT - 1))


class Leaves(Stacked):
    layer = staticmethod(lambda number: torch.nn.Linear(WIDTH, WIDTH))


def stack(first: int, period: int = 1) -> Stack:
    return Stack(path="layers", layers=COUNT, first=first, period=period)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        pytest.param(Stacked, stack(0), id="all-alike"),
        pytest.param(Dropping, stack(0), id="a-rate-of-dropout"),
        pytest.param(FirstOther, stack(1), id="the-first-is-another"),
        pytest.param(Switched, stack(1), id="the-first-is-switched-off"),
        pytest.param(Listed, stack(1), id="the-config-tells-them-apart"),
        pytest.param(LastOther, None, id="the-last-is-another"),
        pytest.param(Leaves, None, id="single-operators"),
    ],
)
def test_layers_that_are_alike(model: Callable[[], Stacked], found: Stack | None) -> None:
    assert alike_layers(model(), ["x"]) == (() if found is None else (found,))


@pytest.mark.parametrize(
    ("layers", "first", "kept", "repeats"),
    [
        pytest.param(12, 0, 9, 1, id="whole-periods"),
        pytest.param(14, 2, 11, 1, id="the-rest-comes-first"),
        pytest.param(11, None, None, None, id="too-few"),
    ],
)
def test_layers_of_several_kinds_repeat_in_periods(
    layers: int, first: int | None, kept: int | None, repeats: int | None
) -> None:
    model = Stacked()
    model.layers = torch.nn.ModuleList(Layer(n, kind="double" if n % 3 == 2 else "plain") for n in range(layers))
    found = alike_layers(model, ["x"])
    assert [(s.first, s.kept, s.repeats) for s in found] == ([] if first is None else [(first, kept, repeats)])


@pytest.mark.parametrize(
    ("states", "found"),
    [pytest.param(COUNT, True, id="one-each"), pytest.param(COUNT - 1, False, id="of-other-layers")],
)
def test_a_cache_has_to_be_of_the_layers(states: int, found: bool) -> None:
    names = [f"past_key_values.{number}.key" for number in range(states)]
    assert bool(alike_layers(Stacked(), ["x", *names])) is found


def test_a_model_has_all_its_layers_after_an_error() -> None:
    model = Stacked()
    layers = list(model.layers)
    with shortened(model, [stack(0)]):
        assert list(model.layers) == layers[:3]
    with pytest.raises(AttributeError), shortened(model, [stack(0)]):
        model.layers.missing()
    assert list(model.layers) == layers


@dataclass(frozen=True)
class Family:
    """A deep and narrow model of transformers."""

    architecture: str
    settings: dict[str, Any]

    def save(self, folder: Path) -> Path:
        cls = getattr(transformers, self.architecture)
        torch.manual_seed(0)
        model = cls(cls.config_class(**self.settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms are no zeros and ones
        model.save_pretrained(folder)
        return folder


DEEP = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
SEVEN = {
    "vocab_size": 99,
    "d_model": 16,
    "encoder_layers": 7,
    "decoder_layers": 7,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
FAMILIES = (
    Family("BertModel", DEEP),
    Family("LlamaForCausalLM", {**DEEP, "num_key_value_heads": 1}),
    Family("BartForConditionalGeneration", SEVEN),
    Family(
        "GptOssForCausalLM",
        {
            **DEEP,
            "num_hidden_layers": 9,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 9,
        },
    ),
    Family("MambaForCausalLM", {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 6, "state_size": 4}),
    Family(
        "ViTModel",
        {
            "hidden_size": 16,
            "num_hidden_layers": 7,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_a_structure_of_which_few_layers_were_traced_computes_what_the_model_does(
    family: Family, attempts: list[str], tmp_path: Path
) -> None:
    source = family.save(tmp_path / "source")
    spec = ModelSpec.from_json(steps.detect({"folder": str(source)}))
    continued = with_past(spec) if spec.task_family == "text-generation" else spec
    for part in encoder_decoder_parts(spec, with_past=True) or (continued,):
        request = {"folder": str(source), "spec": part.to_json(), "dtype": "float32", "opset": None}
        attempts.clear()
        graph, bound = tmp_path / f"{part.part}.onnx", tmp_path / f"{part.part}.bound.onnx"
        assert template_steps.trace({**request, "output": str(graph)})["direct"] is None
        assert set(attempts) == {"few"}
        template_steps.bind({**request, "graph": str(graph), "output": str(bound), "metadata": CERTIFICATE})
        checked = steps.parity({"folder": str(source), "spec": part.to_json(), **check_request(bound)})
        assert checked["outcome"] == "verified", checked["detail"]
