"""Large inputs are answered by shapes, and what shapes cannot tell is proven by real runs at the ends."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch

from onnx_config.declarations import declare
from onnx_config.draft import Draft
from onnx_config.probe import ProbeResult
from onnx_config.shape_inference import infer
from onnx_config.spared_runs import SparedRuns, are_large
from onnx_config.trial import Trial

SIDE = 640
RUNS: list[tuple[int, ...]] = []
"""Shapes that a model really ran at."""


class Pooled(torch.nn.Module):
    """Looks each row of an image up in a table, which shapes alone do not refuse."""

    main_input_name = "pixel_values"
    rows = 4096

    def __init__(self, config: object) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(self.rows, 2)

    def forward(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        """Return scores.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                The image.
        """
        if type(pixel_values) is torch.Tensor and not pixel_values.is_meta:
            RUNS.append(tuple(pixel_values.shape))
        places = torch.arange(pixel_values.shape[2])
        return pixel_values.mean((1, 3)) + self.table(places).sum(-1)


class Short(Pooled):
    rows = SIDE


class Crowded(Pooled):
    """Takes no image smaller than its own, and really no single one of that size, which shapes alone do not refuse."""

    def forward(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        rows, _, *sides = pixel_values.shape
        if min(sides) < SIDE:
            raise ValueError(f"Image sizes {sides} are smaller than {SIDE}")
        if rows == 1 and max(sides) == SIDE and not pixel_values.is_meta:
            raise ValueError("One row of small images")
        return super().forward(pixel_values)

    forward.__doc__ = Pooled.forward.__doc__


def inferred(cls: type, side: int):
    RUNS.clear()
    config = SimpleNamespace(image_size=side, num_channels=3, to_dict=dict)
    return infer(declare(cls), config, (), Trial(cls, config), task_family="image-classification", flags={})


def test_large_inputs_give_what_small_ones_give_with_fewer_real_runs() -> None:
    small = inferred(Pooled, 64)
    runs = len(RUNS)
    large = inferred(Pooled, SIDE)
    assert (large.inputs, large.outputs, large.axis_ranges) == (small.inputs, small.outputs, small.axis_ranges)
    assert len(RUNS) < runs
    # Rows and sides are proven apart, since both together would take longest.
    assert (1, 3, SIDE + 128, SIDE + 128) in RUNS


def test_what_a_real_run_refuses_is_not_believed() -> None:
    large = inferred(Short, SIDE)
    assert large.inputs[0].shape == ("batch_size", 3, SIDE, "width")


def test_the_smallest_sizes_are_proven_too_where_they_are_large() -> None:
    large = inferred(Crowded, SIDE)
    assert large.axis_ranges["height"] == large.axis_ranges["width"] == (SIDE, None)
    assert large.axis_ranges["batch_size"] == (2, None)


@pytest.mark.parametrize(("side", "large"), [pytest.param(64, False, id="small"), pytest.param(SIDE, True, id="large")])
def test_a_count_decides(side: int, large: bool) -> None:
    config = SimpleNamespace(image_size=side, num_channels=3, to_dict=dict)
    assert are_large(Draft(declare(Pooled), config, ["pixel_values"])) is large


def test_what_shapes_refuse_is_said_in_the_models_own_words() -> None:
    config = SimpleNamespace(image_size=SIDE, num_channels=3, to_dict=dict)
    draft = Draft(declare(Pooled), config, ["pixel_values"])
    trial = Trial(Pooled, config)
    asked: list[Mapping[str, int]] = []

    def real(sizes: Mapping[str, int]) -> ProbeResult:
        asked.append(sizes)
        return ProbeResult(outputs=None, refusal="in its own words")

    trial.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("on shapes")))
    spared = SparedRuns(draft, trial, real, {})
    assert spared.run(draft.sizes).refusal == "in its own words"
    assert asked == [draft.sizes]
    assert spared.are_proven()
