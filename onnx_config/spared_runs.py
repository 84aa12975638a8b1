"""Spares real runs of a model on large inputs: most of what variation asks is answered by shapes alone.

What shapes cannot tell, whether an index lies in its table, say, is proven by a real run or two at the end: the largest
sizes that were accepted, and the smallest where those are large too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from onnx_config.draft import Draft, is_batch
from onnx_config.probe import Probe, ProbeResult

if TYPE_CHECKING:
    from onnx_config.trial import Trial

__all__ = ["SparedRuns", "are_large"]

_LARGE = 1_000_000
"""Numbers in all inputs together from which a real run takes longer than one on shapes; a count, not a time, decides
the same everywhere."""


def are_large(draft: Draft, sizes: Mapping[str, int] | None = None) -> bool:
    """Return whether the inputs are so large, at ``sizes`` or at the draft's own, that real runs are worth sparing."""
    return sum(math.prod(shape) for shape, _ in draft.shapes(sizes).values()) >= _LARGE


class SparedRuns:
    """Runs of a small model at other sizes than the ones that it accepted."""

    def __init__(
        self, draft: Draft, trial: Trial, real: Callable[[Mapping[str, int]], ProbeResult], flags: Mapping[str, Any]
    ) -> None:
        self._draft = draft
        self._probe = Probe.of(trial.model)
        self._real = real
        self._flags = flags
        self._most: dict[str, int] = {}

    def agrees(self, result: ProbeResult) -> bool:
        """Return whether shapes alone tell what a real run at the draft's sizes told."""
        return self._probe.run(self._draft.shapes(), **self._flags).outputs == result.outputs

    def run(self, sizes: Mapping[str, int]) -> ProbeResult:
        """Return what the model says at ``sizes``: by shapes where they are large and accepted, else by a real run."""
        if not are_large(self._draft, sizes):
            return self._real(sizes)
        answer = self._probe.run(self._draft.shapes(sizes), **self._flags)
        if answer.outputs is None:
            return self._real(sizes)
        for axis, size in sizes.items():
            self._most[axis] = max(size, self._most.get(axis, 0))
        return answer

    def are_proven(self) -> bool:
        """Return whether the model really accepts the largest and the smallest sizes that it was said to accept."""
        if not self._most:
            return True
        least = {**self._draft.sizes, **self._draft.smallest}
        rows = {axis: size for axis, size in self._most.items() if is_batch(axis)}
        others = {axis: size for axis, size in self._most.items() if not is_batch(axis)}
        # Many rows of large images would take as long as all that was spared.
        ends = [rows, others, *([{}] if are_large(self._draft, least) else [])]
        return all(self._real({**least, **end}).outputs is not None for end in ends)
