"""Values that leave the tensors: what a model's own code reads of them with ``if``, ``item``, ``tolist`` or ``numpy``.

A graph has no place for such values. Where a model reads the same one whatever it is given, since it comes from the
weights or asks for something that no ordinary input has, the value is as good as a constant. So the model is run on
several inputs, of several sizes, and what it reads is written down by the line that reads it; while it is traced, the
lines that always read the same get that. A decision that is not always the same cannot be in one trace: where inputs of
both kinds were tried, the model is traced once with either.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["DecisionError", "EscapeWatch", "Escapes", "Way", "escapes_of", "replayed"]

_MODELS = "transformers.models."
_Tensor = torch.Tensor

_READS: Mapping[Any, str] = {
    _Tensor.__bool__: "decides by",
    _Tensor.item: "reads",
    _Tensor.__int__: "reads",
    _Tensor.__float__: "reads",
    _Tensor.__index__: "reads",
    _Tensor.tolist: "reads",
    _Tensor.numpy: "reads",
}
"""What takes a value out of a tensor -> what a model does with it."""

_COUNTS = frozenset({_Tensor.nonzero, torch.nonzero, torch.where, _Tensor.__getitem__, torch.masked_select})
"""What returns as many rows as the values say."""

_ENOUGH = 2
"""Inputs of either kind on which a graph of both decisions is compared with its model, at least."""

_DATA = _Tensor.data.__get__  # type: ignore[attr-defined]  # a property

Place = tuple[str, int, str]
"""File, line and what is done there."""


class EscapeWatch(TorchFunctionMode):
    """Writes down, while a model runs, what its code reads of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Place, list[Any]] = defaultdict(list)
        """By place, in the order of the readings."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            if (place := _place(func.__name__)) is not None:
                self.read[place].append(np.array(result) if isinstance(result, np.ndarray) else result)
        elif func in _COUNTS and (place := _place(func.__name__)) is not None:
            first = result[0] if isinstance(result, tuple) and result else result
            self.read[place].append(tuple(first.shape) if isinstance(first, torch.Tensor) else ())
        return result


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a model."""

    feed: Any
    """What it was given."""
    read: Mapping[Place, Sequence[Any]]
    compared: bool
    """Whether its graph will be compared with it on that."""


@dataclass(frozen=True, slots=True)
class Way:
    """Inputs for which a model decides alike."""

    feed: Any
    """One of them, to trace with."""
    reading: Escapes
    """What the model's code reads on all of them."""
    decides: str
    """Where it decides, and what it finds there."""


class DecisionError(ValueError):
    """What a model's code does depends on the values of its inputs."""

    def __init__(self, place: Place, ways: tuple[Way, Way] | None) -> None:
        super().__init__(f"the model's code decides by the values of its inputs ({_where(place)})")
        self.ways = ways
        """Both decisions, that of the inputs that were traced first; ``None``: not enough inputs of each are known."""


class Escapes:
    """What a model's code read on several inputs."""

    def __init__(self, runs: Sequence[_Run], *, decided: str | None = None) -> None:
        self.decided = decided
        """What only these inputs have in common, and others have not."""
        self._runs = tuple(runs)
        self._first = self._runs[0].read
        self._others = [run.read for run in self._runs[1:]]

    def read(self, place: Place, number: int) -> tuple[bool, Any, bool]:
        """Return whether something was read there for the ``number``-th time, what, and whether it is always that."""
        found = self._first.get(place, ())
        if number >= len(found):
            return False, None, False
        value = found[number]
        same = all(number < len(run.get(place, ())) and _same(run[place][number], value) for run in self._others)
        return True, value, same

    def ways(self, place: Place, number: int) -> tuple[Way, Way] | None:
        """Return both decisions that are taken there for the ``number``-th time, that of the first inputs first.

        ``None`` where a model does not come there with all inputs, is not compared often enough either way, or with
        inputs of the first ones' sizes always decides as with those.
        """
        if any(number >= len(run.read.get(place, ())) for run in self._runs):
            return None
        value = bool(self._first[place][number])
        ways = []
        for decision in (value, not value):
            kind = [run for run in self._runs if bool(run.read[place][number]) is decision]
            traced = next((run for run in kind if _shapes(run.feed) == _shapes(self._runs[0].feed)), None)
            if traced is None or sum(run.compared for run in kind) < _ENOUGH:
                return None
            others = [run for run in kind if run is not traced]
            found = _found(place, decision)
            ways.append(Way(traced.feed, Escapes([traced, *others], decided=found), found))
        return ways[0], ways[1]


def escapes_of(call: Callable[[Any], Any], feeds: Sequence[Any], *, beside: Sequence[Any] = ()) -> Escapes:
    """Return what ``call`` reads on each of ``feeds``, the first of which is the one to be traced.

    Feeds other than the first that are refused are left out. Those ``beside`` are no more than read and traced with: on
    all other feeds but the first, what is traced will be compared.
    """
    runs = []
    for number, feed in enumerate((*feeds, *beside)):
        with torch.no_grad(), EscapeWatch() as watch:
            try:
                call(feed)
            # The model's own code decides what it raises on inputs that it does not take.
            except Exception:
                if not number:
                    raise
                continue
        runs.append(_Run(feed, watch.read, compared=0 < number < len(feeds)))
    return Escapes(runs)


class replayed(TorchFunctionMode):  # noqa: N801  # used as a context manager only
    """Gives a model that is being traced what it always reads, and names what it takes for granted."""

    def __init__(self, escapes: Escapes) -> None:
        super().__init__()
        self._escapes = escapes
        self._count: Counter[Place] = Counter()
        self._all: dict[int, tuple[torch.Tensor, int]] = {}
        self.notes: list[str] = []
        """What the graph takes for granted."""
        self.granted: dict[str, list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        """The same: what is taken for granted -> what was read while it is traced, and what it is taken to be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DATA:  # made anew whenever it is asked for
            # What is read past the trace would be a tensor that the trace does not know.
            return args[0].detach()
        if func is _Tensor.unbind and id(args[0]) in self._all:
            # All there might be, rather than those that are: a graph has as many steps for every input.
            return tuple(torch.tensor([index]) for index in range(self._all[id(args[0])][1]))
        if func is _Tensor.__format__ and _is_known(args[0]):
            return format(args[0].item(), *args[1:])
        if func in _READS and not _is_known(args[0]):
            return self._replay(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _COUNTS:
            self._keep(func, args, result)
        return result

    def _replay(self, func: Any, args: Any, kwargs: Any) -> Any:
        place = _place(func.__name__)
        number = 0 if place is None else self._count[place]
        known, value, always = (False, None, False) if place is None else self._next(place)
        if not known or place is None:
            return func(*args, **kwargs)
        where = _where(place)
        if isinstance(value, bool) or func is _Tensor.__bool__:
            if not always:
                raise DecisionError(place, self._escapes.ways(place, number))
            found = _found(place, bool(value))
            if found != self._escapes.decided:
                self._note(f"{found}, as it does for all inputs that were tried")
            self.granted[found].append((args[0] != 0, bool(value)))
            return value
        if always:
            self._note(f"{where} is taken to read what it does for all inputs that were tried")
            # Of fractions, which are rounded one way here and another there, nobody could say that they are the same.
            if not args[0].is_floating_point() and all(isinstance(size, int) for size in args[0].shape):
                self.granted[f"{where} is taken to read"].append((args[0], torch.tensor(value)))
            return value
        result = func(*args, **kwargs)
        _hint(result, value)
        return result

    def _keep(self, func: Any, args: Any, result: Any) -> None:
        place = _place(func.__name__)
        first = result[0] if isinstance(result, tuple) and result else result
        if place is None or not isinstance(first, torch.Tensor):
            return
        known, shape, _ = self._next(place)
        if known and len(shape) == first.dim():
            for size, value in zip(first.shape, shape, strict=True):
                _hint(size, value)
        counted = args[0] if args else None
        if isinstance(counted, torch.Tensor) and counted.dim() == 1 and isinstance(counted.shape[0], int):
            self._all[id(first)] = (first, counted.shape[0])

    def _next(self, place: Place) -> tuple[bool, Any, bool]:
        number = self._count[place]
        self._count[place] += 1
        return self._escapes.read(place, number)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _is_known(value: torch.Tensor) -> bool:
    """Return whether a tensor that is traced is one number that does not depend on the inputs."""
    return getattr(value, "constant", None) is not None and value.numel() == 1


def _hint(size: Any, value: Any) -> None:
    """Let torch answer what it asks of a size that depends on values as it is for the sample."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)) and isinstance(value, (int, float)):
        expression = size.node.expr
        if expression.is_symbol and expression not in size.node.shape_env.backed_var_to_val:
            size.node.shape_env.set_real_tensor_prop_unbacked_vals(expression, value)


def _where(place: Place) -> str:
    return f"{place[0].rpartition('/')[2]}:{place[1]}"


def _found(place: Place, decision: bool) -> str:
    return f"{_where(place)} is taken to find {decision}"


def _shapes(feed: Any) -> Any:
    return {name: tuple(tensor.shape) for name, tensor in feed.items()} if isinstance(feed, Mapping) else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.array_equal(one, other))
    return bool(one == other)


def _place(action: str) -> Place | None:
    """Return the line of the library's models that is running; ``None``: none of theirs reads here."""
    for frame in _frames():
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_MODELS):
            return frame.f_code.co_filename, frame.f_lineno, action
        if name.startswith("transformers."):
            # The library's common code asks for other things while it is traced.
            return None
    return None


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]  # the last one has none
