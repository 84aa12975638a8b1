"""Foretells refusals: what a small model refused once, it need not really run to again.

A model with large images takes seconds for a run, and a guess at what it wants is mostly wrong. Shapes alone tell in a
fraction of that where it would end. They are believed where a real run ended at the same place in the code before;
another place is not known to refuse anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.frames import Frame
from onnx_config.probe import Probe, ProbeResult

if TYPE_CHECKING:
    from onnx_config.trial import Trial

__all__ = ["Refusals"]

_LARGE = 50_000
"""Numbers in all inputs together from which it is worth asking; a count, not a time, decides the same everywhere."""

_NOT_ITS_OWN = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))

_Place = tuple[tuple[str, int], ...]


class Refusals:
    """Where a small model refused its inputs."""

    def __init__(self, trial: Trial, flags: Mapping[str, Any]) -> None:
        self._model = trial.model
        self._flags = flags
        self._places: set[_Place] = set()

    @cached_property
    def _probe(self) -> Probe:
        # Most models are never asked.
        return Probe.of(self._model)

    def learn(self, result: ProbeResult) -> None:
        """Remember where a real run was refused."""
        if result.frames:
            self._places.add(_place(result.frames))

    def foretell(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> ProbeResult | None:
        """Return how the model will refuse ``shapes``; ``None`` where only a real run tells what it says.

        Its frames hold tensors without values.
        """
        if not self._places or sum(math.prod(shape) for shape, _ in shapes.values()) < _LARGE:
            return None
        refused = self._probe.refused(shapes, **self._flags)
        if refused is None or _place(refused.frames) not in self._places:
            return None
        return replace(refused, foretold=True)


def _place(frames: tuple[Frame, ...]) -> _Place:
    """Return the lines that were running in the model's own code, and in what it calls beside torch."""
    return tuple(frame.place for frame in frames if not frame.place[0].startswith(_NOT_ITS_OWN))
