"""Which inputs and outputs of a graph share which axis, as a picture: a line for each axis, a stop for each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from db.records import GraphRecord, TensorRecord

__all__ = ["AxesPicture", "Line", "Row", "Stop", "axes_picture"]

ROW_HEIGHT = 24
COLUMN_WIDTH = 44
NAMES_WIDTH = 300
TITLE_HEIGHT = 130
_GAP = 14
_MOST_ROWS = 40
_MOST_AXES = 16
_COLOURS = 8

_NAME = re.compile(r"[A-Za-z_]\w*")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One dynamic axis."""

    name: str
    """As inputs and outputs have it."""

    colour: int
    """One of a few, by its place."""

    x: float
    """Where it runs."""

    top: float
    """Its first stop."""

    bottom: float
    """Its last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An axis of a tensor."""

    x: float
    """On its line."""

    colour: int
    """Of the line."""

    position: int
    """Which axis of the tensor it is, counted from 0."""

    formula: str | None
    """How the size follows from this axis and others; ``None`` where it is this axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A tensor, or several that differ by a number in their name."""

    name: str
    """The number of those that differ by it as ``*``."""

    count: int
    """How many tensors it stands for."""

    y: float
    """Its middle."""

    is_input: bool
    """Whether the graph takes it."""

    stops: tuple[Stop, ...]
    """Its dynamic axes."""

    fixed: str
    """Its fixed sizes, outermost first; empty where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxesPicture:
    """The picture of one graph."""

    lines: tuple[Line, ...]
    """In the order in which the axes are met."""

    rows: tuple[Row, ...]
    """Inputs, then outputs."""

    left_out: int
    """Rows that did not fit."""

    width: float
    """Of all of it."""

    height: float
    """Of all of it."""


def axes_picture(graph: GraphRecord) -> AxesPicture | None:
    """Return the picture; ``None`` where nothing is dynamic."""
    groups = [(True, *group) for group in _grouped(graph.inputs)] + [
        (False, *group) for group in _grouped(graph.outputs)
    ]
    shown = groups[:_MOST_ROWS]
    names = list(dict.fromkeys(name for _, _, tensor, _ in shown for size in tensor.shape for name in _axes(size)))
    columns = {name: NAMES_WIDTH + COLUMN_WIDTH * (number + 0.5) for number, name in enumerate(names[:_MOST_AXES])}
    if not columns:
        return None
    colours = {name: number % _COLOURS for number, name in enumerate(columns)}
    rows: list[Row] = []
    for number, (is_input, name, tensor, count) in enumerate(shown):
        gap = 0 if is_input or not graph.inputs else _GAP
        stops = tuple(
            Stop(
                x=columns[axis],
                colour=colours[axis],
                position=position,
                formula=None if size == axis else str(size),
            )
            for position, size in enumerate(tensor.shape)
            for axis in _axes(size)
            if axis in columns
        )
        fixed = " x ".join(str(size) for size in tensor.shape if isinstance(size, int))
        y = TITLE_HEIGHT + gap + ROW_HEIGHT * (number + 0.5)
        rows.append(Row(name=name, count=count, y=y, is_input=is_input, stops=stops, fixed=fixed))
    ends = {name: [row.y for row in rows if any(stop.x == x for stop in row.stops)] for name, x in columns.items()}
    return AxesPicture(
        lines=tuple(
            Line(name=name, colour=colours[name], x=x, top=min(ends[name]), bottom=max(ends[name]))
            for name, x in columns.items()
        ),
        rows=tuple(rows),
        left_out=len(groups) - len(shown),
        width=NAMES_WIDTH + COLUMN_WIDTH * len(columns) + 140,
        height=rows[-1].y + ROW_HEIGHT / 2,
    )


def _axes(size: int | str) -> list[str]:
    return [] if isinstance(size, int) else list(dict.fromkeys(_NAME.findall(size)))


def _grouped(tensors: Sequence[TensorRecord]) -> Iterable[tuple[str, TensorRecord, int]]:
    """Yield name, tensor and count; those of equal shape whose names differ by numbers alone are one."""
    found: dict[tuple[object, ...], list[TensorRecord]] = {}
    for tensor in tensors:
        found.setdefault((_NUMBER.sub("*", tensor.name), tensor.dtype, tensor.shape), []).append(tensor)
    for (name, *_), group in found.items():
        yield (group[0].name if len(group) == 1 else str(name)), group[0], len(group)
