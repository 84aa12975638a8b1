"""Which twin settles a model: the first that accepts and is confirmed; compared beforehand only where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny_models
import transformers

from onnx_config import UniversalOnnxConfig, settlement, twin
from onnx_config.twin import Twin


def large(name: str, **sizes: int) -> UniversalOnnxConfig:
    config = tiny_models.config(name)
    config.update(sizes)
    return UniversalOnnxConfig(type(config).from_dict(config.to_dict()))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record how twins were asked for."""
    seen: list[bool] = []
    made = twin.twins

    def twins(*arguments: object, asked: bool = True, **named: object) -> Iterator[Twin]:
        seen.append(asked)
        return made(*arguments, asked=asked, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(twin, "twins", twins)
    return seen


BERT = {"hidden_size": 768, "vocab_size": 30000, "num_hidden_layers": 6}


def test_a_plain_model_is_confirmed_by_its_own_inputs(compared: list[bool]) -> None:
    assert large("bert-model", **BERT).spec.outputs[0].shape == ("batch_size", "sequence_length", 768)
    assert compared == [False]


def test_a_config_of_several_parts_is_compared_at_once(compared: list[bool]) -> None:
    config = tiny_models.config("clip-model")
    config.text_config.vocab_size = 200_000
    assert UniversalOnnxConfig(type(config).from_dict(config.to_dict())).spec.outputs
    assert compared == [True]


def test_twins_are_compared_where_the_full_model_does_not_confirm(
    compared: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = large("bert-model", **BERT).spec
    compared.clear()
    monkeypatch.setattr(settlement, "is_confirmed", lambda *_: False)
    assert large("bert-model", **BERT).spec == expected
    assert compared == [False, True]


def test_a_twin_that_was_cut_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = large("bert-model", **BERT).spec
    made = twin.twins

    def twins(config: object, cls: type, *, asked: bool = True, **named: object) -> Iterator[Twin]:
        found = list(made(config, cls, asked=asked, **named))  # type: ignore[arg-type]
        if not asked:
            # Its texts are longer than its table of positions.
            wrong = transformers.BertConfig.from_dict({**found[0].config.to_dict(), "max_position_embeddings": 4})
            found = [replace(found[0], config=wrong)]
        return iter(found)

    monkeypatch.setattr(twin, "twins", twins)
    assert large("bert-model", **BERT).spec == expected


def test_a_model_that_no_cut_keeps_together_is_run_itself_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = large("bert-model", **BERT).spec
    asked: list[str] = []
    by_shapes = settlement._by_shapes
    monkeypatch.setattr(settlement, "_by_shapes", lambda *given: asked.append("by shapes") or by_shapes(*given))
    monkeypatch.setattr(twin, "twins", lambda *_, **__: iter(()))
    assert large("bert-model", **BERT).spec.outputs == expected.outputs
    assert asked == []
    monkeypatch.setattr(settlement, "_MOST_PARAMETERS", 1000)
    assert large("bert-model", **BERT).spec.outputs == expected.outputs
    assert asked == ["by shapes"]


def test_images_are_large_enough_for_as_many_queries_as_the_full_model_has() -> None:
    config = transformers.RTDetrConfig(
        num_queries=300, encoder_layers=1, decoder_layers=1, d_model=256, backbone_config=None
    )
    spec = UniversalOnnxConfig(config, task="object-detection").spec
    # Of 96 x 128 pixels it has 252 places to pick from.
    height, width = spec.sizes["height"], spec.sizes["width"]
    assert sum((height // stride) * (width // stride) for stride in (8, 16, 32)) >= 300
    assert spec.axis_ranges["height"] == (height, None)
    logits = next(output for output in spec.outputs if output.name == "logits")
    assert logits.shape[:2] == ("batch_size", 300)


def test_inputs_are_as_wide_as_the_full_models() -> None:
    config = transformers.Blip2QFormerConfig(
        hidden_size=768, num_hidden_layers=2, intermediate_size=3072, encoder_hidden_size=1408
    )
    config.architectures = ["Blip2QFormerModel"]
    spec = UniversalOnnxConfig(config).spec
    assert {tensor.name: tensor.shape for tensor in spec.inputs} == {
        "query_embeds": ("batch_size", "sequence_length", 768),
        "encoder_hidden_states": ("batch_size", "encoder_sequence_length", 1408),
    }
    # None is translated in the end: the full model said them.
    assert not spec.assumed
