"""What a class built on the meta device shows: its size, its kinds of layers, and what it says to simple inputs."""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx_config.config_sizes import config_size, image_size
from onnx_config.module_state import forgotten_caches
from onnx_config.twin.keys import LAYER_NUMBER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["MOST_KINDS", "Built", "build", "numbered", "seen"]

MOST_KINDS = 8
"""More kinds of layers in one stack are no kinds but something that grows from layer to layer."""


_MOST_MODELS_ASKED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a class built on the meta device shows."""

    parameters: int
    empty: int
    """Parameters without a single number: a width was divided away."""

    modules: int
    stacks: Mapping[str, tuple[int, ...]]
    """Name of a list of layers -> kind of each, numbered by first appearance."""

    answers: Mapping[str, str]
    """Name of a model or of a model in it -> where in its code it refuses the simplest inputs; empty: it runs."""


def build(config: PreTrainedConfig, cls: type, *, asked: Callable[[int], bool]) -> Built | Exception:
    """Build a class on the meta device; return what it shows, or why it cannot be built.

    A model is asked for its answers where ``asked`` says so of its number of parameters.
    """
    from onnx_config.meta_build import built_on_meta

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = built_on_meta(cls, config)
    # The class's own code decides what it raises; whatever it is, it is an answer.
    except Exception as error:  # noqa: BLE001
        return error
    return seen(model, asked=asked)


def seen(model: torch.nn.Module, *, asked: Callable[[int], bool]) -> Built:
    """Return what a model that was built without real weights shows."""
    import torch

    parameters = sum(p.numel() for p in dict.fromkeys(model.parameters()))
    stacks = {
        name: _kinds(list(module.children()))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1
    }
    answers = _answers(model) if asked(parameters) else {}
    return Built(
        empty=sum(p.numel() == 0 for p in model.parameters()),
        parameters=parameters,
        modules=sum(1 for _ in model.modules()),
        stacks=stacks,
        answers=answers,
    )


def _answers(model: torch.nn.Module) -> dict[str, str]:
    """Return what a model says to the simplest inputs, on shapes alone; where it refuses, also the models in it.

    Most composite models want more than that, and refuse at the same place in the full size and in the twin's.
    """
    import torch

    answers: dict[str, str] = {}
    model.eval()
    with torch.no_grad(), torch.device("meta"), forgotten_caches(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ask(model, "", answers)
    return answers


def _ask(module: torch.nn.Module, name: str, answers: dict[str, str]) -> None:
    """Ask a module, where it is a model; where it is none, or refuses, ask those in it."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        if len(answers) >= _MOST_MODELS_ASKED:
            return
        answers[name] = _answer(module)
        if not answers[name]:
            return
    for child_name, child in module.named_children():
        _ask(child, f"{name}.{child_name}" if name else child_name, answers)


def _answer(model: Any) -> str:
    try:
        model(**_simple_inputs(model))
    # The class's own code decides what it raises; where it does is the answer.
    except Exception as error:  # noqa: BLE001
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}transformers{os.sep}" in f.filename]
        return (
            f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__
        )
    return ""


def _simple_inputs(model: Any) -> dict[str, torch.Tensor]:
    import torch

    size = image_size(model.config) or (224, 224)
    channels = config_size(model.config, "num_channels", "image") or 3
    bins = config_size(model.config, "feature_size", "audio") or 80
    known = {
        "input_ids": lambda: torch.ones(1, 16, dtype=torch.int64),
        "decoder_input_ids": lambda: torch.ones(1, 16, dtype=torch.int64),
        "pixel_values": lambda: torch.ones(1, channels, *size),
        "input_values": lambda: torch.ones(1, 16000),
        "input_features": lambda: torch.ones(1, bins, 3000),
    }
    wanted = inspect.signature(model.forward).parameters
    given = [name for name in known if name in wanted and name in (model.main_input_name, "decoder_input_ids")]
    return {name: known[name]() for name in given}


def _kinds(layers: list[torch.nn.Module]) -> tuple[int, ...]:
    """Return the kind of each layer, numbered by first appearance: what it is made of, shapes and settings."""
    kinds = numbered([_fingerprint(layer, settings=(bool, int, str)) for layer in layers])
    if max(kinds) + 1 > max(MOST_KINDS // 2, len(layers) // 2):
        # A number that grows from layer to layer (a dilation, say) tells no kinds apart.
        kinds = numbered([_fingerprint(layer, settings=(bool, str)) for layer in layers])
    return kinds


def numbered(values: Iterable[object]) -> tuple[int, ...]:
    seen: dict[object, int] = {}
    return tuple(seen.setdefault(value, len(seen)) for value in values)


def _fingerprint(layer: torch.nn.Module, *, settings: tuple[type, ...]) -> tuple[object, ...]:
    return tuple(
        (
            type(module).__name__,
            tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None),
            tuple(
                (name, value)
                for name, value in sorted(module.__dict__.items())
                if (value is None or isinstance(value, settings)) and not LAYER_NUMBER.search(name)
            ),
        )
        for module in layer.modules()
    )
