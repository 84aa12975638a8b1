"""Whether a stored graph computes what the unmodified PyTorch model computes.

The tolerance comes from the model itself: what it differs by between float32 and float64 on the same inputs. Where that
alone exceeds what anyone would accept, the output is called unstable, never verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.reference import Array, Reference
from onnx_config.export.session import known_inputs
from onnx_config.export.shapes import FEWEST_SHAPES, CheckShape

if TYPE_CHECKING:
    from onnx_config.export.choices import GraphChoice, Pinned, Run

__all__ = [
    "STOPS",
    "Cell",
    "Outcome",
    "OutputCheck",
    "ParityResult",
    "check_parity",
    "difference_at",
    "max_difference",
]

GraphChoices = Callable[[Mapping[str, Array]], Sequence["GraphChoice"]]
"""Returns what a graph chooses on these inputs."""

BASE_TOLERANCE = 1e-5
"""Difference that counts as equal, as a share of an output's largest magnitude."""

SPREAD_FACTOR = 10.0
"""How many times the model's own float32 error a graph may be off."""

MAX_TOLERANCE = 1e-3
"""Share beyond which nothing is called equal, however unsure the model is of itself."""

FALLBACK_TOLERANCE = 1e-4
"""Share allowed where the model was not run in float64."""

STOPS = "ONNX Runtime stops"
"""How what is said of a shape begins at which a graph gives nothing."""

_SMALLEST_SCALE = 1e-2
_SMALLEST_FALLBACK_SCALE = 1.0
# Masks are often filled with the lowest number of the element type, which is another one in float64.
_INFINITY = 1e30


class Outcome(StrEnum):
    """What a comparison says."""

    VERIFIED = "verified"
    MISMATCH = "mismatch"
    UNSTABLE = "unstable"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCheck:
    """One output over all shapes."""

    name: str
    max_abs_diff: float
    tolerance: float
    """The tolerance at the shape where the difference came closest to it."""
    spread: float | None = None
    """By how much PyTorch differs from itself in float64 there; ``None`` where that decided nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A graph at one shape, run by one provider at one optimisation level."""

    provider: str
    optimization: str
    """One of `onnx_config.export.session.LEVELS`."""
    dtype: str
    """Element type of the graph's weights."""
    shape: str
    """Label of the shape."""
    sizes: Mapping[str, int]
    """Dynamic axis -> size in elements."""
    verdict: Outcome
    output: str | None
    """The output that came closest to its tolerance, or went beyond; ``None`` where nothing was compared."""
    max_abs_diff: float | None
    tolerance: float | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """What was compared, and the verdict."""

    outcome: Outcome
    device: str
    provider: str
    shapes: int
    """Shapes compared."""
    outputs: tuple[OutputCheck, ...]
    axes_proven: tuple[str, ...]
    """Axes compared at two sizes at least."""
    detail: str | None
    """What differed, and where."""
    skipped: tuple[str, ...] = ()
    """Shapes that the PyTorch model itself refuses."""
    notes: tuple[str, ...] = ()
    """Where PyTorch was made to choose as the graph does, among numbers that are equal but for rounding."""
    cells: tuple[Cell, ...] = ()
    """One for each shape."""

    @property
    def first_failure(self) -> int | None:
        """Number of the first shape that does not hold; ``None``: all hold."""
        return next((at for at, cell in enumerate(self.cells) if cell.verdict is not Outcome.VERIFIED), None)


@dataclass(slots=True)
class _Tally:
    worst: dict[str, OutputCheck] = field(default_factory=dict)
    mismatch: str | None = None
    unstable: str | None = None
    sizes: dict[str, set[int]] = field(default_factory=dict)
    compared: int = 0
    own_choices: list[str] = field(default_factory=list)
    """Where float64 took the choices of float32."""
    graph_choices: list[str] = field(default_factory=list)
    """Where PyTorch took the choices of the graph."""

    @property
    def is_clean(self) -> bool:
        return self.mismatch is None and self.unstable is None

    def saw(self, shape: CheckShape) -> None:
        """Count a shape that was compared."""
        self.compared += 1
        for axis, size in shape.sizes.items():
            self.sizes.setdefault(axis, set()).add(size)

    def add(self, other: _Tally) -> None:
        """Take over what was found in one more comparison."""
        for check in other.worst.values():
            self.note(check.name, check.max_abs_diff, check.tolerance, check.spread)
        self.mismatch = self.mismatch or other.mismatch
        self.unstable = self.unstable or other.unstable
        self.own_choices += other.own_choices
        self.graph_choices += other.graph_choices

    def notes(self) -> Iterator[str]:
        """Yield what has to be known of how was compared."""
        among = "among numbers that are equal but for rounding"
        if self.own_choices:
            yield f"in float64 PyTorch was made to choose as in float32, {among}, at {', '.join(self.own_choices)}"
        if self.graph_choices:
            yield f"PyTorch was made to choose as the graph does, {among}, at {', '.join(self.graph_choices)}"

    def note(self, name: str, difference: float, tolerance: float, spread: float | None = None) -> None:
        old = self.worst.get(name)
        if old is None or _ratio(difference, tolerance) > _ratio(old.max_abs_diff, old.tolerance):
            self.worst[name] = OutputCheck(name=name, max_abs_diff=difference, tolerance=tolerance, spread=spread)

    @property
    def outcome(self) -> Outcome:
        return Outcome.MISMATCH if self.mismatch else Outcome.UNSTABLE if self.unstable else Outcome.VERIFIED

    def cell(self, shape: CheckShape, *, provider: str, level: str, dtype: str) -> Cell:
        """Return what was found, where that was at one shape only."""
        closest = max(self.worst.values(), key=lambda c: _ratio(c.max_abs_diff, c.tolerance), default=None)
        return Cell(
            provider=provider,
            optimization=level,
            dtype=dtype,
            shape=shape.label,
            sizes=dict(shape.sizes),
            verdict=self.outcome,
            output=None if closest is None else closest.name,
            max_abs_diff=None if closest is None else closest.max_abs_diff,
            tolerance=None if closest is None else closest.tolerance,
            detail=self.mismatch or self.unstable,
        )


def _ratio(difference: float, tolerance: float) -> float:
    return difference / tolerance if tolerance else (0.0 if difference == 0 else float("inf"))


def check_parity(
    session: Any,
    references: Sequence[Reference],
    *,
    refused: Sequence[str] = (),
    expected: Iterable[str] = (),
    choices: GraphChoices | None = None,
    level: str = "all",
    dtype: str = "float32",
) -> ParityResult:
    """Compare a session with the references.

    Args:
        session: As `open_session` returns it.
        references: What PyTorch computed, at shapes other than the traced one.
        refused: Shapes that PyTorch refused, for the record.
        expected: Outputs that the graph must have, where PyTorch returns them.
        choices: Returns the places that the graph chooses, where it and the model choose among numbers; ``None``:
            they are not to be told from a difference.
        level: The session's optimisation level, for the record.
        dtype: Element type of its weights, for the record.

    Raises:
        ModelError: If there are fewer than four references: too little to call anything verified.
    """
    if len(references) < FEWEST_SHAPES:
        raise ModelError(
            f"The PyTorch model accepts only {len(references)} of the shapes it was to be compared at; "
            "four are needed. "
            f"It said: {'; '.join(refused)[:500]}",
            kind=ErrorKind.UNSUPPORTED,
        )
    tally = _Tally()
    names = {o.name.removeprefix("output.") for o in session.get_outputs()}
    returned = references[0].outputs.keys()
    if lost := sorted(returned & set(expected) - names):
        tally.mismatch = f"the graph lacks the output {', '.join(lost)}"
    if bare := sorted(name for name in returned & names if not any(r.outputs[name].size for r in references)):
        tally.unstable = f"{', '.join(bare)} is empty at all shapes: there is nothing to compare"
    provider = session.get_providers()[0]
    cells = []
    for reference in references:
        found = _Tally()
        if _run_and_compare(found, session, reference, choices):
            tally.saw(reference.shape)
        cells.append(found.cell(reference.shape, provider=provider, level=level, dtype=dtype))
        tally.add(found)
    return ParityResult(
        outcome=tally.outcome,
        device=references[0].device,
        provider=provider,
        shapes=tally.compared,
        outputs=tuple(tally.worst.values()),
        axes_proven=tuple(sorted(a for a, s in tally.sizes.items() if len(s) > 1)),
        detail=tally.mismatch or tally.unstable,
        skipped=tuple(refused),
        notes=tuple(tally.notes()),
        cells=tuple(cells),
    )


def difference_at(session: Any, reference: Reference) -> str | None:
    """Return how a session differs from the model at one shape, or ``None`` where it does not."""
    tally = _Tally()
    _run_and_compare(tally, session, reference)
    return tally.mismatch


def _run_and_compare(tally: _Tally, session: Any, reference: Reference, choices: GraphChoices | None = None) -> bool:
    """Note what differs at one shape; return whether the session ran there."""
    names = [o.name for o in session.get_outputs()]
    try:
        values = session.run(names, known_inputs(session, reference.inputs))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:  # noqa: BLE001
        tally.mismatch = tally.mismatch or f"{STOPS} at {_where(reference)}: {' '.join(str(error).split())[:300]}"
        return False
    got = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
    found = _compare_all(got, reference)
    if not found.is_clean and reference.run is not None and choices is not None:
        found = _compare_where_chosen(got, reference, reference.run, choices) or found
    tally.add(found)
    return True


def _compare_all(got: Mapping[str, Array], reference: Reference) -> _Tally:
    tally = _Tally()
    for name, value in got.items():
        _compare(tally, name, value, reference)
    return tally


def _compare_where_chosen(
    got: Mapping[str, Array], reference: Reference, run: Run, choices: GraphChoices
) -> _Tally | None:
    """Compare with the model made to choose alike in float64, and as the graph does; ``None`` where that is no other.

    A model that takes the better of two equal scores takes another one in float64, and so may a graph.
    """
    from onnx_config.export.choices import as_graph_chose, as_model_chose

    own = as_model_chose(run)
    if own is None or not _is_same(own.outputs, reference.outputs):
        return None
    found = _compare_all(got, _as_chosen(reference, own))
    if found.is_clean:
        found.own_choices.append(_where(reference))
        return found
    other = as_graph_chose(run, own, choices(reference.inputs))
    if other is None:
        return found if own.exchanged else None
    found = _compare_all(got, _as_chosen(reference, other))
    found.graph_choices.append(_where(reference))
    return found


def _as_chosen(reference: Reference, pinned: Pinned) -> Reference:
    return replace(reference, outputs=pinned.outputs, precise=pinned.precise, in_float64=None, run=None)


def _is_same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f") for name, value in one.items()
    )


def _where(reference: Reference) -> str:
    sizes = ", ".join(f"{k}={v}" for k, v in reference.shape.sizes.items())
    return f"{reference.shape.label} ({sizes})" if sizes else reference.shape.label


def _compare(tally: _Tally, name: str, got: Array, reference: Reference) -> None:
    """Compare one output at one shape and note the result."""
    key = name.removeprefix("output.")
    want = reference.outputs.get(key)
    if want is None:
        tally.mismatch = tally.mismatch or f"{name} is an output of the graph only"
        return
    if got.shape != want.shape:
        tally.mismatch = tally.mismatch or f"{name} has shape {got.shape} for {want.shape} at {_where(reference)}"
        return
    if got.dtype != want.dtype:
        tally.mismatch = tally.mismatch or f"{name} is {got.dtype} for {want.dtype} at {_where(reference)}"
        return
    if not got.size:
        tally.note(name, 0.0, BASE_TOLERANCE)
        return
    if reference.precise is None and reference.in_float64 is not None and _is_equal(tally, name, got, want):
        return
    found = reference.precisely()
    precise = None if found is None else found.get(key)
    if precise is not None and precise.shape != want.shape:
        tally.unstable = tally.unstable or f"{name} has another shape in float64 at {_where(reference)}"
        return
    if precise is not None and (np.isnan(precise) & ~np.isnan(want)).any():
        # The lowest float64 times a float32 zero is NaN: where masks are made so, float64 says nothing of rounding.
        precise = None
    if want.dtype.kind in "iub":
        _compare_exact(tally, name, got, want=want, precise=precise, reference=reference)
        return
    difference, problem = max_difference(got, want)
    if problem is not None:
        tally.mismatch = tally.mismatch or f"{name} {problem} at {_where(reference)}"
        tally.note(name, difference, 0.0)
        return
    finite = np.abs(want[_is_finite(want)])
    if not finite.size:
        tally.unstable = tally.unstable or (
            f"{name} has no finite number in PyTorch at {_where(reference)}: there is nothing to compare"
        )
        return
    largest = float(finite.max())
    own = None
    if precise is None:
        allowed = FALLBACK_TOLERANCE * max(largest, _SMALLEST_FALLBACK_SCALE)
    else:
        scale = max(largest, _SMALLEST_SCALE)
        own, _ = max_difference(want, precise)
        allowed = min(max(BASE_TOLERANCE * scale, SPREAD_FACTOR * own), MAX_TOLERANCE * scale)
        if own > MAX_TOLERANCE * scale:
            # Agreement says nothing here: both may be off by the same rounding, and by another one elsewhere.
            tally.unstable = tally.unstable or (
                f"{name} differs from itself in float64 by {own:.3g} in PyTorch at {_where(reference)}"
            )
    tally.note(name, difference, allowed, own)
    if difference <= allowed:
        return
    if own is not None and difference <= SPREAD_FACTOR * own:
        tally.unstable = tally.unstable or (
            f"{name} differs by {difference:.3g} at {_where(reference)}, "
            f"where PyTorch differs from itself in float64 by {own:.3g}"
        )
    else:
        tally.mismatch = tally.mismatch or (
            f"{name} differs by {difference:.3g} at {_where(reference)}, where {allowed:.3g} is allowed"
        )


def _is_equal(tally: _Tally, name: str, got: Array, want: Array) -> bool:
    """Return whether an output is what it has to be, whatever the model's own error is, and note it if so."""
    if want.dtype.kind in "iub":
        if equal := bool((got == want).all()):
            tally.note(name, 0.0, 0.0)
        return equal
    difference, problem = max_difference(got, want)
    finite = np.abs(want[_is_finite(want)])
    if problem is not None or not finite.size:
        return False
    allowed = BASE_TOLERANCE * max(float(finite.max()), _SMALLEST_SCALE)
    if equal := difference <= allowed:
        tally.note(name, difference, allowed)
    return equal


def _is_finite(values: Array) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(values) < _INFINITY)  # NaN is not less either


def _compare_exact(
    tally: _Tally, name: str, got: Array, *, want: Array, precise: Array | None, reference: Reference
) -> None:
    different = int((got.astype(want.dtype) != want).sum())
    tally.note(name, float(different), 0.0)
    if not different:
        return
    if precise is not None and (precise != want).any():
        tally.unstable = tally.unstable or f"{name}: {different} values differ at {_where(reference)}, as in float64"
    else:
        tally.mismatch = tally.mismatch or f"{name}: {different} of {want.size} values differ at {_where(reference)}"


def max_difference(got: Array, want: Array) -> tuple[float, str | None]:
    """Return the largest absolute difference, and what makes the two incomparable (NaN, infinity).

    A number beyond 1e30 counts as infinite: masks are filled with the lowest number of their type.

    >>> max_difference(np.array([1.0, np.nan]), np.array([1.5, np.nan]))
    (0.5, None)
    >>> max_difference(np.array([np.nan]), np.array([1.0]))
    (inf, 'has 1 NaN where PyTorch has none')
    """
    a, b = got.astype(np.float64), want.astype(np.float64)
    extra = np.isnan(a) & ~np.isnan(b)
    if extra.any():
        return float("inf"), f"has {int(extra.sum())} NaN where PyTorch has none"
    if (np.isnan(b) & ~np.isnan(a)).any():
        return float("inf"), "has numbers where PyTorch has NaN"
    infinite = (np.abs(a) >= _INFINITY) | (np.abs(b) >= _INFINITY)
    both = (np.abs(a) >= _INFINITY) & (np.abs(b) >= _INFINITY) & (np.sign(a) == np.sign(b))
    if (infinite & ~both).any():
        return float("inf"), "differs where one side is infinite"
    usable = ~(np.isnan(b) | infinite)
    return (float(np.abs(a[usable] - b[usable]).max()) if usable.any() else 0.0), None
