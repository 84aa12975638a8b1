"""What a model refused once in a real run is told by shapes the next time; what it never refused is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onnx_config.declarations import declare
from onnx_config.foretold import Refusals
from onnx_config.shape_inference import infer
from onnx_config.trial import Trial

SIDE = 256
RUNS: list[tuple[int, ...]] = []
"""Shapes that a model really ran at."""


class Mismatched(torch.nn.Module):
    """Has two layers that no input fits both of, as a config that contradicts itself gives."""

    main_input_name = "pixel_values"

    def __init__(self, config: object) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 1)
        self.second = torch.nn.Conv2d(5, 4, 1)

    def forward(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        """Return an image.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                The image.
        """
        if type(pixel_values) is torch.Tensor and not pixel_values.is_meta:
            RUNS.append(tuple(pixel_values.shape))
        if pixel_values.shape[2] == 1:
            raise ValueError("one row")
        return self.second(self.first(pixel_values))


class Looking(Mismatched):
    """Asks for a value before it refuses."""

    def forward(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        if pixel_values.sum().item() > float("inf"):
            raise ValueError("too bright")
        return super().forward(pixel_values)

    forward.__doc__ = Mismatched.forward.__doc__


def image(*shape: int) -> dict[str, Any]:
    return {"pixel_values": torch.zeros(shape).numpy()}


def shapes(*shape: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {"pixel_values": (shape, "float32")}


def taught(cls: type) -> Refusals:
    trial = Trial(cls, SimpleNamespace())
    refusals = Refusals(trial, {})
    refusals.learn(trial.run(image(2, 3, SIDE, SIDE)))
    return refusals


def test_a_known_refusal_is_told_with_how_far_the_run_came_and_where_it_ended() -> None:
    told = taught(Mismatched).foretell(shapes(7, 3, SIDE, SIDE))
    assert told is not None
    really = Trial(Mismatched, SimpleNamespace()).run(image(7, 3, SIDE, SIDE))
    assert told.foretold
    assert not really.foretold
    assert told.progress == really.progress > 0
    assert really.frames[-1].place in [frame.place for frame in told.frames]


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        pytest.param(Mismatched, (2, 3, 1, SIDE * SIDE), id="refused at another place"),
        pytest.param(Mismatched, (2, 3, 8, 8), id="too small to be worth it"),
        pytest.param(Looking, (2, 3, SIDE, SIDE), id="depends on a value"),
    ],
)
def test_what_is_not_known_is_left_to_a_real_run(cls: type, shape: tuple[int, ...]) -> None:
    assert taught(cls).foretell(shapes(*shape)) is None


def test_nothing_is_foretold_before_a_real_refusal() -> None:
    assert Refusals(Trial(Mismatched, SimpleNamespace()), {}).foretell(shapes(2, 3, SIDE, SIDE)) is None


def test_guesses_at_a_model_that_refuses_everything_are_hardly_ever_run_nor_made_again_with_another_config() -> None:
    config = SimpleNamespace(image_size=SIDE, num_channels=3, to_dict=dict)
    hopeless: set[str] = set()

    def refused() -> tuple[str | None, int]:
        RUNS.clear()
        trial = Trial(Mismatched, config)
        found = infer(
            declare(Mismatched), config, (), trial, task_family="image-classification", flags={}, hopeless=hopeless
        )
        return found.refusal, found.runs

    refusal, guesses = refused()
    assert refusal is not None
    assert "5 channels" in refusal
    assert guesses > len(RUNS)
    _, again = refused()
    assert again < guesses
    assert [words.startswith("Given groups=#, weight of size [#, #, #, #]") for words in hopeless] == [True]
