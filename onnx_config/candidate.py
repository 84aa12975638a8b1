"""A changed draft of a model's inputs, to try after the model refused them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx_config.draft import Draft
from onnx_config.probe import ProbeResult

__all__ = ["Ask", "Candidate", "candidate_of_shape", "candidate_of_size"]

Ask = Callable[[Draft], ProbeResult]
"""Runs a draft on shapes and says what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A changed draft to try."""

    draft: Draft
    """The draft."""

    why: str
    """What was changed, for people."""

    sure: bool
    """Whether the refusal said so: then a new refusal is progress too. Else only getting further counts."""

    leaves_out: bool = False
    """Whether something optional was given up, which only a run that returns justifies."""


def candidate_of_shape(
    draft: Draft, name: str, shape: Sequence[int | str], why: str, *, sure: bool = True
) -> Candidate:
    """Return a draft in which an input has another shape."""
    other = draft.copy()
    other.reshape(name, shape)
    other.place_image(name)
    return Candidate(draft=other, why=why[:300], sure=sure)


def candidate_of_size(draft: Draft, at: tuple[str, int], size: int, why: str, *, sure: bool = True) -> Candidate:
    """Return a draft in which an axis, given by input and position, has another size."""
    name, position = at
    other = draft.copy()
    other.set_size(name, position, size)
    return Candidate(draft=other, why=f"axis {position} of {name} has size {size}: {why}"[:300], sure=sure)
