"""Settles what a class takes and gives: on a twin that really runs, then at the full model's sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from onnx_config.config_sizes import sub_configs
from onnx_config.full_size import (
    answer_at_full_size,
    at_full_size,
    is_confirmed,
    with_full_widths,
    with_larger_images,
)
from onnx_config.shape_inference import Inference, infer

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration
    from onnx_config.preprocessors import Preprocessor
    from onnx_config.probe import Probe, ProbeResult
    from onnx_config.trial import Trial
    from onnx_config.twin import Twin

__all__ = ["Settled", "Subject", "settle"]

_MAX_TWINS = 3
_MOST_PARAMETERS = 100_000_000
"""Of a model that is really run at its full size where no twin can be: 400 MB, and seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What was found out, and by which small model."""

    inference: Inference
    """Inputs, outputs and axes; with a refusal where nothing was accepted."""

    twin: Twin | None = None
    """The twin that accepted the inputs; ``None``: none did, and only the full model was asked, on shapes alone."""

    trial: Trial | None = None
    """That twin, built."""

    shallow: Callable[[], Probe] | None = None
    """Returns the full model with the twin's few layers, to be run on shapes alone; raises what its class raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A class and a config, and what is known of them before anything is run."""

    build: Any
    """What makes the module of a config."""

    config: Any
    """The full model's config."""

    declaration: Declaration
    """What the class declares."""

    preprocessors: Sequence[Preprocessor]
    """What its users feed it with."""

    task_family: str
    """The family of the task."""

    flags: Mapping[str, Any]
    """Keyword arguments of ``forward`` beside the inputs."""

    probe: Probe
    """The full model, without weights."""

    _accepted: dict[str, tuple[Inference, Trial]] = field(default_factory=dict)
    """Config of a twin that accepted inputs -> what it showed, and the twin."""

    _hopeless: set[str] = field(default_factory=set)
    """Refusals, as words without numbers, at which all guesses failed."""

    def asked(self, runner: Probe | Trial, config: Any, *, guesses: bool = True) -> Inference:
        """Return what ``runner``, built from ``config``, shows, with or without guesses at what it refuses."""
        return infer(
            self.declaration,
            config,
            self.preprocessors,
            runner,
            task_family=self.task_family,
            flags=self.flags,
            limits=self.config,
            unused_positions=self.probe.offset_position_tables,
            guesses=guesses,
            hopeless=self._hopeless,
        )

    def tried(self, twin: Twin, *, guesses: bool) -> tuple[Inference, Trial | None] | None:
        """Return what a twin shows, and the twin itself where it accepts inputs; ``None`` where it cannot be run."""
        from onnx_config.trial import Trial

        name = twin.config.to_json_string(use_diff=False)
        if name in self._accepted:
            return self._accepted[name]
        try:
            trial = Trial(self.build, twin.config)
            found = self.asked(trial, twin.config, guesses=guesses)
        except (MemoryError, RecursionError):
            return None
        if found.refusal is not None:
            return found, None
        self._accepted[name] = found, trial
        return found, trial

    def shallow(self, twin: Twin) -> Callable[[], Probe]:
        """Return what returns the full model with the twin's layers, which is built when it is first wanted."""
        from onnx_config.probe import Probe

        return cache(partial(Probe, self.build, twin.shallow))

    def twins(self, *, compared: bool) -> Iterator[Twin]:
        """Yield the twins to try; where they are ``compared``, those that answer as the full model does come first."""
        from onnx_config.twin import twins

        return islice(twins(self.config, self.build, model=self.probe.model, asked=compared), _MAX_TWINS)


def settle(subject: Subject) -> Settled:
    """Return what the class takes and gives.

    Whether a twin is like the full model shows in what both say to the inputs that the twin accepted. Only where they
    do not say the same, or the twin accepts none, all are asked beforehand with inputs as simple as can be, and the
    twins that answer as the full model does come first; that takes longer than all the rest. A config of several parts
    is cut wrongly so often that its twins are compared at once.

    Raises:
        Exception: Whatever the class raises when it is built, from the config or for a twin.
    """
    refused: Inference | None = None
    composite = len(sub_configs(subject.config)) > 1
    for compared in (True,) if composite else (False, True):
        refused = None
        for twin in subject.twins(compared=compared):
            # A twin that was cut wrongly refuses everything, after as many guesses as there are.
            shown = subject.tried(twin, guesses=compared or twin.is_full)
            if shown is None:
                continue
            found, trial = shown
            if trial is None:
                refused = refused or found
                if twin.is_full:
                    return _by_shapes(subject, refused)
                if not compared:
                    break
                continue
            if twin.is_full:
                return Settled(inference=found, twin=twin, trial=trial)
            shallow = subject.shallow(twin)
            found, answer = _at_sizes_for_all(subject, found, twin, shallow)
            if not compared and not is_confirmed(found, answer):
                break
            return Settled(inference=at_full_size(found, twin, answer), twin=twin, trial=trial, shallow=shallow)
    return _by_itself(subject) or _by_shapes(subject, refused)


def _by_itself(subject: Subject) -> Settled | None:
    """Return what the full model really takes and gives, where it is small enough; ``None`` where that is not found.

    A config may say one size in several ways, of a backbone and of what reads it say, that no cut keeps together.
    """
    from onnx_config.twin import Twin

    parameters = subject.probe.parameters
    if parameters > _MOST_PARAMETERS:
        return None
    itself = Twin(config=copy.deepcopy(subject.config), parameters=parameters, full_parameters=parameters, changes={})
    try:
        shown = subject.tried(itself, guesses=True)
    # What a class raises when it is built with weights, it may not have raised without.
    except Exception:  # noqa: BLE001
        return None
    if shown is None or shown[1] is None:
        return None
    return Settled(inference=shown[0], twin=itself, trial=shown[1])


def _at_sizes_for_all(
    subject: Subject, found: Inference, twin: Twin, shallow: Callable[[], Probe]
) -> tuple[Inference, ProbeResult]:
    """Return what a twin showed, at widths and images that are large enough for the full model, and what that says."""
    ask = partial(answer_at_full_size, twin=twin, shallow=shallow, full=subject.probe, flags=subject.flags)
    first = ask(found)
    if first.outputs is None and not first.undecidable:
        for wider in with_full_widths(found, twin):
            answer = ask(wider)
            if answer.outputs is not None or answer.undecidable:
                return wider, answer
        for larger in with_larger_images(found):
            answer = ask(larger)
            if answer.outputs is not None or answer.undecidable:
                note = f"images are larger than the smallest that a shrunken model takes: {first.refusal}"[:300]
                return replace(larger, learned=(*larger.learned, note)), answer
    return found, first


def _by_shapes(subject: Subject, refused: Inference | None) -> Settled:
    """Return what the full model shows on shapes alone; where that is nothing, what the first twin said."""
    found = subject.asked(subject.probe, subject.config)
    return Settled(inference=found if found.refusal is None else refused or found)
