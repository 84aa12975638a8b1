"""What a model was at when it refused its inputs: the calls on the way, the tensors around them, how far it came."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch

__all__ = ["Frame", "TensorView", "counted_modules", "frames_of"]

_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorView:
    """A tensor that a frame of a refusal held."""

    shape: tuple[int, ...]
    """Its sizes."""

    dtype: str
    """NumPy name of its elements' type."""

    input: str | None
    """The input that it is, unchanged; ``None``: it was computed."""

    largest: int | None = None
    """Its largest value where it holds whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One call on the way to a refusal."""

    function: str
    """Name of the function."""

    place: tuple[str, int]
    """File and line."""

    source: str
    """The statement that was running, on one line; empty where there is no source."""

    tensors: Mapping[str, TensorView]
    """Local variables that were tensors."""

    nones: frozenset[str]
    """Local variables that were ``None``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The identifiers in `source`, in their order."""
        return tuple(dict.fromkeys(_IDENTIFIER.findall(self.source)))


@contextmanager
def counted_modules() -> Iterator[list[int]]:
    """Count the modules that return: how far a run came."""
    counter = [0]

    def count(*_: Any) -> None:
        counter[0] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield counter
    finally:
        handle.remove()


def frames_of(trace: TracebackType | None, inputs: Mapping[str, torch.Tensor]) -> Iterator[Frame]:
    """Yield the frames of a traceback, outermost first, without our own."""
    by_id = {id(value): name for name, value in inputs.items()}
    pairs = list(traceback.walk_tb(trace))[1:]
    summaries = traceback.extract_tb(trace)[1:]
    for (frame, _), summary in zip(pairs, summaries, strict=True):
        yield Frame(
            function=summary.name,
            place=(summary.filename, summary.lineno or 0),
            source=_statement(summary),
            tensors=_tensors(frame, by_id),
            nones=frozenset(name for name, value in frame.f_locals.items() if value is None),
        )


def _statement(summary: traceback.FrameSummary) -> str:
    first, last = summary.lineno, getattr(summary, "end_lineno", None) or summary.lineno
    if first is None or last is None:
        return ""
    lines = [linecache.getline(summary.filename, number).strip() for number in range(first, last + 1)]
    return " ".join(line for line in lines if line)


def _tensors(frame: FrameType, by_id: Mapping[int, str]) -> dict[str, TensorView]:
    return {
        name: TensorView(
            shape=tuple(value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            input=by_id.get(id(value)),
            largest=_largest(value),
        )
        for name, value in frame.f_locals.items()
        if isinstance(value, torch.Tensor)
    }


def _largest(value: torch.Tensor) -> int | None:
    """Return the largest of a tensor's whole numbers; on the meta device it has none."""
    if value.is_meta or value.dtype not in (torch.int64, torch.int32) or not value.numel():
        return None
    return int(value.max())
