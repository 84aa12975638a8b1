"""What a model decides while it runs, and what it computes where it decides otherwise.

A top-k, a threshold or an argmax turns a difference in the last bits into a jump: of two scores that are equal but for
rounding, float32 takes one and float64 the other, and all that follows is another's. What lies behind a jump can be
compared only where both sides jumped alike. So the choices of one run are written down and another run is made to take
them, wherever its own numbers are the same within rounding; what is compared after that is compared as strictly as
ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Choice", "ChoiceWatch", "GraphChoice", "Order", "Pinned", "Threshold", "as_graph_chose", "as_model_chose"]

Array = npt.NDArray[Any]

SPREAD_FACTOR = 10.0
"""How many times its own float32 error apart two numbers may be that a model and its graph choose between."""

LARGEST_ERROR = 1e-3
"""Share of the numbers chosen among beyond which they are not the same in float32 and in float64."""

# Half of what lies between a float32 and the next one, as a share of it.
_ROUNDING = 2.0**-24
_INFINITY = 1e30
_SMALLEST_SCALE = 1e-2
# Of so many numbers at most the choices of one run are kept: a quarter of a gigabyte.
_MOST_NUMBERS = 2**26

_aten = torch.ops.aten
_COMPARISONS = frozenset(
    getattr(getattr(_aten, name), kind) for name in ("gt", "ge", "lt", "le") for kind in ("Scalar", "Tensor")
)
_SORTS = frozenset({_aten.topk.default, _aten.sort.default, _aten.sort.stable})
_EXTREMES = frozenset({_aten.max.dim, _aten.min.dim, _aten.argmax.default, _aten.argmin.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which numbers of each row were taken, and in which order."""

    scores: torch.Tensor
    """What was taken from; rows lie along the last axis."""
    places: torch.Tensor
    """Where in their rows the taken ones stand."""
    sorted: bool
    """Whether their order is a choice too."""
    axis: int
    """Which axis of the model's tensors the rows lie along."""

    @property
    def scale(self) -> float:
        """How large the taken numbers are."""
        return _largest(self.taken())

    def taken(self) -> torch.Tensor:
        """Return the numbers that were taken."""
        return self.scores.gather(-1, self.places)

    def read(self, values: torch.Tensor) -> torch.Tensor:
        """Return what a graph has with its rows along the last axis, where it can be brought there."""
        if self.scores.dim() == 1 and values.numel() in (1, self.scores.numel()):
            return values.reshape(-1)
        if values.dim() == self.scores.dim() - 1:
            values = values.unsqueeze(self.axis)
        return values.movedim(self.axis, -1) if values.dim() == self.scores.dim() else values

    def distance(self, places: torch.Tensor) -> float | None:
        """Return how far what stands at other places is from what was taken; ``None``: those are no choice."""
        if places.shape != self.places.shape or places.dtype != torch.int64 or not places.numel():
            return None
        if int(places.min()) < 0 or int(places.max()) >= self.scores.shape[-1]:
            return None
        in_order = places.sort(-1).values
        if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
            return None
        mine, other = self.taken(), self.scores.gather(-1, places)
        if not self.sorted:
            mine, other = mine.sort(-1).values, other.sort(-1).values
        return float(torch.where(mine == other, 0.0, (mine - other).abs()).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Which numbers were found to lie beyond others."""

    scores: torch.Tensor
    """How far they lie beyond."""
    places: torch.Tensor
    """Whether they were found to."""

    @property
    def scale(self) -> float:
        """How far they lie apart usually; not the largest, since what is masked out is very far."""
        finite = self.scores[self.scores.abs() < _INFINITY]
        return float(finite.abs().median()) if finite.numel() else 0.0

    def read(self, values: torch.Tensor) -> torch.Tensor:
        """Return what a graph found."""
        return values

    def distance(self, places: torch.Tensor) -> float | None:
        """Return how far those lie from the threshold that ``places`` finds elsewhere; ``None``: it is no choice."""
        if places.shape != self.places.shape or places.dtype != torch.bool or not places.numel():
            return None
        return float(torch.where(places == self.places, 0.0, self.scores.abs()).max())


Choice = Order | Threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphChoice:
    """What a graph chose, and among which numbers."""

    scores: Array
    """What it took from; of a comparison, how far one side lies beyond the other."""
    places: Array
    """What it took, or what it found to lie beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """What a model returns where it is made to take certain choices."""

    outputs: Mapping[str, Array]
    precise: Mapping[str, Array]
    """The same in float64, where it took the same choices."""
    choices: Sequence[Choice]
    """As they were taken in float32."""
    errors: Sequence[float | None]
    """By how much each choice's numbers are off in float32; ``None``: too much to be the same choice."""
    exchanged: int
    """How many choices were taken that the model would not have made."""


Run = Callable[[torch.dtype, "ChoiceWatch"], Mapping[str, Array] | None]
"""Runs a model in float32 or float64 under a watch; ``None`` where it refuses."""


class ChoiceWatch(TorchDispatchMode):
    """Writes down the choices of a model while it runs, and may have it take others.

    Args:
        decide: Is given the number of a choice and the choice that the model would make; returns the places to take
            instead, or ``None``.
    """

    def __init__(self, decide: Callable[[int, Choice], torch.Tensor | None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decide = decide
        self._numbers = 0
        self.choices: list[Choice] = []
        """In the order in which they were made, as they were taken."""
        self.exchanged = 0
        """How many were not the model's own."""

    @property
    def overflowed(self) -> bool:
        """Whether there were more choices than are kept."""
        return self._numbers > _MOST_NUMBERS

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = func in _COMPARISONS or func in _SORTS or func in _EXTREMES
        if not known or not args[0].is_floating_point() or not args[0].numel():
            return result
        self._numbers += args[0].numel()
        if self.overflowed:
            return result
        if func in _COMPARISONS:
            return self._take(Threshold(scores=args[0] - args[1], places=result)).places.clone()
        if not args[0].dim():
            return result
        values = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        values.update(zip((a.name for a in func._schema.arguments), args, strict=False))
        values.update(kwargs)
        return _sorted(self._take, values, result) if func in _SORTS else _extreme(self._take, values, result)

    def _take(self, choice: Any) -> Any:
        """Return the choice as it is to be taken, which is written down."""
        places = None if self._decide is None else self._decide(len(self.choices), choice)
        if places is not None and not torch.equal(places, choice.places):
            choice = replace(choice, places=places)
            self.exchanged += 1
        # The model may write into its tensors afterwards.
        self.choices.append(replace(choice, scores=choice.scores.clone(), places=choice.places.clone()))
        return choice


def _sorted(take: Callable[[Order], Order], values: Mapping[str, Any], result: Any) -> Any:
    scores = values["self"]
    axis = values["dim"] % scores.dim()
    choice = take(
        Order(
            scores=scores.movedim(axis, -1),
            places=result[1].movedim(axis, -1),
            sorted=bool(values.get("sorted", True)),
            axis=axis,
        )
    )
    taken = choice.taken().movedim(-1, axis), choice.places.movedim(-1, axis)
    return tuple(_laid_out_as(before, new) for before, new in zip(result, taken, strict=True))


def _laid_out_as(before: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``new`` that lies in memory as ``before`` does, which the model may take another view of."""
    return torch.empty_like(before).copy_(new)


def _extreme(take: Callable[[Order], Order], values: Mapping[str, Any], result: Any) -> Any:
    scores, dim, keep = values["self"], values["dim"], values["keepdim"]
    found = result[1] if isinstance(result, tuple) else result
    if dim is None:
        flat = Order(scores=scores.reshape(-1), places=found.reshape(1), sorted=True, axis=0)
        return _laid_out_as(found, take(flat).places.reshape(found.shape))
    axis = dim % scores.dim()
    places = (found if keep else found.unsqueeze(axis)).movedim(axis, -1)
    choice = take(Order(scores=scores.movedim(axis, -1), places=places, sorted=True, axis=axis))
    taken = [t.movedim(-1, axis) for t in (choice.taken(), choice.places)]
    if not keep:
        taken = [t.squeeze(axis) for t in taken]
    if not isinstance(result, tuple):
        return _laid_out_as(found, taken[1])
    return tuple(_laid_out_as(before, new) for before, new in zip(result, taken, strict=True))


def as_model_chose(run: Run) -> Pinned | None:
    """Run a model in float32, and in float64 with the choices that it made in float32.

    Returns ``None`` where it refuses, makes no choices, or more than are kept.
    """
    return _pinned(run, ChoiceWatch())


def as_graph_chose(run: Run, before: Pinned, made: Iterable[GraphChoice]) -> Pinned | None:
    """Run a model with the choices that its graph made, among numbers that are equal but for rounding.

    A choice of the graph counts only where all the numbers that it chose among are the model's own but for rounding. It
    would not do that those it took are close to the best: what makes other scores takes others that are close, too.

    Args:
        run: Runs the model.
        before: What it returned with its own choices.
        made: What the graph chose, in its order; which of the model's choices each one is, is seen by its numbers.

    Returns ``None`` where none of them is another one than the model's own.
    """
    left = [(torch.from_numpy(np.array(choice.scores)), torch.from_numpy(np.array(choice.places))) for choice in made]
    used: list[tuple[torch.Tensor, torch.Tensor]] = []

    def decide(number: int, choice: Choice) -> torch.Tensor | None:
        error = before.errors[number] if number < len(before.errors) else None
        if error is None:
            return None
        allowed = SPREAD_FACTOR * max(error, _ROUNDING * choice.scale)
        for group in (left, used):
            for at, (scores, taken) in enumerate(group):
                if not _is_close(choice.read(scores.to(choice.scores.device)), choice.scores, allowed):
                    continue
                places = choice.read(taken.to(choice.places.device))
                distance = choice.distance(places)
                if distance is not None and distance <= allowed:
                    if group is left:
                        used.append(left.pop(at))
                    return places
        return None

    watch = ChoiceWatch(decide)
    pinned = _pinned(run, watch)
    return pinned if watch.exchanged else None


def _is_close(one: torch.Tensor, other: torch.Tensor, allowed: float) -> bool:
    """Return whether all numbers are the same within ``allowed``, those that count as infinite by their sign."""
    if one.shape != other.shape:
        return False
    infinite = (one.abs() >= _INFINITY) & (other.abs() >= _INFINITY) & (one.sign() == other.sign())
    return bool((infinite | ((one - other).abs() <= allowed)).all())


def _pinned(run: Run, watch: ChoiceWatch) -> Pinned | None:
    outputs = run(torch.float32, watch)
    if outputs is None or not watch.choices or watch.overflowed:
        return None
    errors: list[float | None] = []

    def decide(number: int, choice: Choice) -> torch.Tensor | None:
        taken = watch.choices[number] if number < len(watch.choices) else None
        errors.append(None if taken is None else _error(taken, choice))
        return None if taken is None or errors[-1] is None else taken.places

    again = ChoiceWatch(decide)
    precise = run(torch.float64, again)
    if precise is None:
        return None
    exchanged = watch.exchanged + again.exchanged
    return Pinned(outputs=outputs, precise=precise, choices=watch.choices, errors=errors, exchanged=exchanged)


def _error(single: Choice, double: Choice) -> float | None:
    """Return by how much the numbers of a choice are off in float32; ``None`` where they are not the same numbers."""
    if type(single) is not type(double) or single.scores.shape != double.scores.shape:
        return None
    if single.places.shape != double.places.shape:
        return None
    one, other = single.scores.double(), double.scores.double()
    # Masks are filled with the lowest number of the element type, which is another one in float64.
    both = (one.abs() < _INFINITY) & (other.abs() < _INFINITY)
    alike = (one == other) | (one.sign() == other.sign()) & (one.abs() >= _INFINITY) & (other.abs() >= _INFINITY)
    if not bool((both | alike).all()):
        return None
    error = float((one - other)[both].abs().max()) if bool(both.any()) else 0.0
    return error if error <= LARGEST_ERROR * max(single.scale, _SMALLEST_SCALE) else None


def _largest(values: torch.Tensor) -> float:
    finite = values[values.abs() < _INFINITY]
    return float(finite.abs().max()) if finite.numel() else 0.0
