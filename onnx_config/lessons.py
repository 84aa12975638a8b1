"""What to try next when a model refuses its inputs.

Each lesson reads a refusal, the message and the source lines on the way to it, and yields changed drafts. None
knows a model: they know how Python, torch and the library word what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnx_config.candidate import Ask, Candidate
from onnx_config.draft import Draft
from onnx_config.input_lessons import (
    fewer_inputs,
    masked_data,
    missing_group,
    missing_inputs,
    more_inputs,
    not_both,
    patches,
    unexpected,
)
from onnx_config.probe import ProbeResult
from onnx_config.shape_lessons import (
    columns,
    convolved,
    documented_elsewhere,
    documented_rank,
    mask_as_long,
    more_axes,
    transposed,
    unpacked_axes,
)
from onnx_config.size_lessons import growth, image_sizes, multiples, named_numbers, one_row, size_one, solved_sizes
from onnx_config.value_lessons import index_limits, marked_positions, placeholders, whole_numbers

__all__ = ["candidates"]

_LESSONS: tuple[Callable[[Draft, ProbeResult, Ask], Iterator[Candidate]], ...] = (
    not_both,
    unexpected,
    patches,
    missing_inputs,
    missing_group,
    unpacked_axes,
    documented_rank,
    convolved,
    documented_elsewhere,
    mask_as_long,
    placeholders,
    index_limits,
    one_row,
    size_one,
    whole_numbers,
    marked_positions,
    transposed,
    columns,
    more_inputs,
    masked_data,
    solved_sizes,
    growth,
    image_sizes,
    multiples,
    more_axes,
    named_numbers,
    fewer_inputs,
)


def candidates(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Yield what to try after ``answer``, the surest first."""
    for lesson in _LESSONS:
        yield from lesson(draft, answer, ask)
