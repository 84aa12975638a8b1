"""Twins of a model: ways of making its config smaller are tried until one gives a class that is like the full one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.twin.built import MOST_KINDS, Built, build, seen
from onnx_config.twin.cutter import MOST_PREFIX, Cutter, Rung, prefix
from onnx_config.twin.keys import TOKEN_ID
from onnx_config.twin.values import Values, differences, pairs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["PARAMETER_BUDGET", "Twin", "default_config", "shrink", "twins"]

PARAMETER_BUDGET = 5_000_000
"""Parameters of a twin, at most; 20 MB of float32."""


_MOST_ATTEMPTS = 30


_FEWEST_ATTEMPTS = 8


_MOST_MODULES_BUILT = 40_000
"""Over all attempts, if each were as large as the full model; a count, not a time, gives the same twin everywhere."""


_MOST_STEPS_BACK = 2


_TOLERATED = 8
"""A twin of up to so many budgets is preferred to one that fits and is not like the full model."""


_STEPS = (
    *((factor, False) for factor in (1, 2, 4, 8, 16, 32)),
    *((32, True), (64, False), (64, True)),
)
"""What widths are divided by, and whether tables of positions are cut too; the mildest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A config of the same class as the one it was made from, and what differs between the two.

    >>> Twin(config=None, parameters=9, full_parameters=90, changes={"hidden_size": (4096, 128)}).to_full(128)
    4096
    """

    config: PreTrainedConfig
    """What to build: ``cls(twin.config)``. Nobody else holds it; building may write into it."""

    parameters: int
    """Parameters of the class built from `config`, shared ones counted once."""

    full_parameters: int | None
    """Parameters of the full model; ``None`` where the class cannot be counted without real tensors."""

    changes: Mapping[str, tuple[Any, Any]]
    """Dotted path in the config -> (value in the full config, value in the twin's); empty: the config was small."""

    alike: bool = True
    """Whether every kind of layer remains, and the simplest inputs are taken, or refused, at the same place as by the
    full model. Where not, `notes` say what is amiss, and `twins` had nothing better."""

    shallow: PreTrainedConfig | None = None
    """The full config with the twin's layers: as wide as the full model, and as soon run as it is shallow. ``None``
    where nothing was cut, or where the class takes no such config."""

    notes: tuple[str, ...] = ()
    """What was done, and what could not be kept, in sentences."""

    @property
    def is_full(self) -> bool:
        """Whether the twin is the model itself, since that is small already."""
        return not self.changes

    def to_full(self, size: int) -> int | None:
        """Return the size in the full model of a dimension that has ``size`` in the twin.

        ``None`` where no changed value of the config, or more than one, explains it. A size that did not change is
        explained by no change either: ask this only for a dimension that is neither an input's nor a label's.
        """
        if self.is_full:
            return size
        found = {
            old
            for path, change in self.changes.items()
            if not TOKEN_ID.search(path)
            for old, new in pairs(*change)
            if new == size
        }
        return found.pop() if len(found) == 1 else None


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default config of a model type of transformers, e.g. ``"bert"``.

    Raises:
        ModelError: ``unsupported``, where the type is unknown, or has no default that its own config class accepts;
            the message says which, in that class's words.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        raise ModelError(
            f"The default config of {model_type!r} was asked for; the installed transformers has no such model type. "
            "Upgrade transformers, or check the spelling.",
            kind=ErrorKind.UNSUPPORTED,
        ) from None
    try:
        config: PreTrainedConfig = config_class()
    # The config class's own code decides what it raises; whatever it is, it is the reason.
    except Exception as error:
        raise ModelError(
            f"The model type {model_type!r} has no default config: {config_class.__name__}() refuses with "
            f"{_words(error)}. Pass the config of a real model.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    return config


def shrink(config: PreTrainedConfig, cls: type, *, budget: int = PARAMETER_BUDGET) -> Twin:
    """Return the twin of ``cls`` built from ``config``, with at most ``budget`` parameters where that can be had.

    Where it cannot, the twin is the smallest that the class can be built from, and `Twin.notes` says so. ``config``
    stays as it is. The same arguments give the same twin.

    Raises:
        ModelError: ``unsupported``, where the class cannot even be built from ``config``.
    """
    return next(twins(config, cls, budget=budget))


def twins(
    config: PreTrainedConfig,
    cls: type,
    *,
    budget: int = PARAMETER_BUDGET,
    model: torch.nn.Module | None = None,
    asked: bool = True,
) -> Iterator[Twin]:
    """Yield twins of ``cls`` built from ``config``: the one of `shrink` first, then ones that were cut otherwise.

    For a caller whose first twin can be built and refuses to run: what follows keeps more of the config, or cuts
    elsewhere. Each is found only when asked for, and has been built on the meta device.

    Args:
        config: The full config.
        cls: What is built from it.
        budget: Parameters that a twin may have.
        model: ``cls`` built from ``config``, where the caller has it already, without real weights.
        asked: Whether the full model and each twin are run on shapes alone, to see whether they answer alike. A
            caller that runs the twins anyway need not.

    Raises:
        ModelError: as `shrink`.
    """
    full = build(config, cls, asked=_nobody) if model is None else seen(model, asked=_nobody)
    if isinstance(full, Exception) and not _wants_real_tensors(full):
        raise _unbuildable(cls, full) from full
    if isinstance(full, Built) and full.parameters <= budget:
        count = full.parameters
        yield Twin(config=copy.deepcopy(config), parameters=count, full_parameters=count, changes={})
        return
    rest: list[Twin] = []
    found = False
    known = full if isinstance(full, Built) else None
    ladder = _Ladder(config, cls, full=known, budget=budget, asked=asked)
    for twin in ladder.twins():
        if twin.alike and twin.parameters <= budget:
            found = True
            yield twin
        else:
            rest.append(twin)
    if not found and not rest:
        error = full if isinstance(full, Exception) else RuntimeError("no smaller config of this class can be built")
        raise _unbuildable(cls, error) from error
    yield from sorted(rest, key=lambda twin: _rank(twin, budget))


def _nobody(_: int) -> bool:
    return False


def _everybody(_: int) -> bool:
    return True


def _unbuildable(cls: type, error: Exception) -> ModelError:
    return ModelError(
        f"{cls.__name__} was to be built from its config to learn its inputs; the class refuses with {_words(error)}. "
        "Correct the config, or install what the class asks for.",
        kind=ErrorKind.UNSUPPORTED,
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _answers_alike(full: Mapping[str, str], small: Mapping[str, str]) -> bool:
    return all(small.get(name, answer) == answer for name, answer in full.items())


def _wants_real_tensors(error: Exception) -> bool:
    return "meta" in str(error).lower()


_FAMILIES: tuple[Mapping[str, Any], ...] = (
    {},
    {"heads": "kept"},
    {"heads": "wide"},
    {"experts": False},
    {"vocabulary": False},
    {"vocabulary": False, "experts": False, "heads": "kept"},
)
"""Ways of cutting, the preferred one first; each is tried with every depth and factor."""


def _rank(twin: Twin, budget: int) -> tuple[int, int]:
    """Sort twins: those like the model first, also where they are somewhat large; then small ones; then by size."""
    if twin.alike and twin.parameters <= _TOLERATED * budget:
        return 0, twin.parameters
    return (1 if twin.parameters <= budget else 2), twin.parameters


class _Ladder:
    """Tries rungs, each once, until there were too many."""

    def __init__(self, config: PreTrainedConfig, cls: type, *, full: Built | None, budget: int, asked: bool) -> None:
        self._config = config
        self._asked = asked
        self._shallows: dict[str, PreTrainedConfig | None] = {}
        if full is not None and asked:
            # As wide as the full model, and much sooner run; where the class takes no such config, the full one is.
            shallow = self._shallow(_depths_to_try(full)[0], full)
            built = None if shallow is None else build(shallow, cls, asked=_everybody)
            if not isinstance(built, Built):
                built = build(config, cls, asked=_everybody)
            full = replace(full, answers=built.answers) if isinstance(built, Built) else full
        self._cls = cls
        self._full = full
        self._budget = budget
        self._tried: dict[str, Twin | None] = {}
        affordable = _MOST_MODULES_BUILT // full.modules if full else _MOST_ATTEMPTS
        self._most = min(_MOST_ATTEMPTS, max(_FEWEST_ATTEMPTS, affordable))

    def twins(self) -> Iterator[Twin]:
        """Yield what can be built, the preferred ways of cutting first; nothing twice."""
        seen: set[int] = set()
        for depth in _depths_to_try(self._full):
            for choice in _FAMILIES:
                for twin in self._of_family(Rung(depth=depth, **choice)):
                    if id(twin) not in seen:
                        seen.add(id(twin))
                        yield twin

    def _of_family(self, family: Rung) -> Iterator[Twin]:
        skipped: list[Rung] = []
        best: Twin | None = None
        least: float = 1
        for factor, positions in _STEPS:
            rung = replace(family, factor=factor, positions=positions)
            # Parameters fall with the square of the factor at most, so that smaller factors need no try.
            if factor < least:
                skipped.append(rung)
                continue
            twin = self._try(rung)
            if twin is not None:
                yield twin
                best = twin
                if twin.parameters <= self._budget:
                    break
                least = math.sqrt(twin.parameters / self._budget) * factor / 2
            elif factor == 1:
                return
        if best is None or (best.alike and best.parameters <= self._budget):
            return
        # Where the larger factors cannot be built, or are unlike the model, a somewhat large twin is better.
        for rung in skipped[: -_MOST_STEPS_BACK - 1 : -1]:
            if (twin := self._try(rung)) is not None:
                yield twin
                if twin.alike:
                    return

    def _try(self, rung: Rung) -> Twin | None:
        values = self._config.to_dict()
        Cutter(values, self._full.stacks if self._full else {}, rung).cut()
        key = repr(values)
        if key not in self._tried and len(self._tried) < self._most:
            self._tried[key] = self._built(values, rung)
        return self._tried.get(key)

    def _built(self, values: Values, rung: Rung) -> Twin | None:
        config, full = self._config, self._full
        try:
            small = type(config).from_dict(values)
        # A validator of the config class refuses the combination: the next rung is tried.
        except Exception:  # noqa: BLE001
            return None
        for name in ("_attn_implementation", "_experts_implementation"):
            if (chosen := getattr(config, name, None)) is not None:
                setattr(small, name, chosen)
        built = build(
            small, self._cls, asked=lambda parameters: self._asked and parameters <= _TOLERATED * self._budget
        )
        if isinstance(built, Exception) or built.empty > (full.empty if full else 0):
            return None
        notes = [f"Cut to {rung}."]
        if full:
            lost = [name for name, kinds in full.stacks.items() if _kinds_lost(kinds, built.stacks.get(name))]
            notes += [f"Not all kinds of layers of {name} remain." for name in lost]
            if self._asked and not _answers_alike(full.answers, built.answers):
                notes.append("The full model and this one do not say the same to the simplest inputs.")
        return Twin(
            config=small,
            parameters=built.parameters,
            full_parameters=full.parameters if full else None,
            changes=MappingProxyType(dict(differences(config.to_dict(), small.to_dict()))),
            shallow=self._shallow(rung.depth, self._full),
            alike=len(notes) == 1,
            notes=tuple(notes),
        )

    def _shallow(self, depth: str, full: Built | None) -> PreTrainedConfig | None:
        """Return the config with fewer layers alone; one for all rungs of a depth, since whoever builds it copies."""
        if depth not in self._shallows:
            self._shallows[depth] = self._cut_shallow(depth, full)
        return self._shallows[depth]

    def _cut_shallow(self, depth: str, full: Built | None) -> PreTrainedConfig | None:
        values = self._config.to_dict()
        Cutter(values, full.stacks if full else {}, Rung(depth=depth, vocabulary=False, experts=False)).cut()
        try:
            return type(self._config).from_dict(values)
        # A validator of the config class refuses it: the full model tells as well, only later.
        except Exception:  # noqa: BLE001
            return None


def _depths_to_try(full: Built | None) -> tuple[str, ...]:
    needed = max((prefix(kinds) for kinds in full.stacks.values()), default=2) if full else 2
    return ("picked", "prefix", "full") if needed > MOST_PREFIX else ("prefix", "picked", "full")


def _kinds_lost(full: tuple[int, ...], small: tuple[int, ...] | None) -> bool:
    kinds = max(full) + 1
    return small is not None and 1 < kinds <= MOST_KINDS and max(small) + 1 < kinds <= len(full) // 2
