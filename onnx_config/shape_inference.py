"""From declared shapes to graph inputs and outputs with fixed sizes and named, tied axes.

Sizes that the config fixes become numbers; the rest become axis names. The proposal is then put to the class:
where it refuses, its own words say what to change; where it accepts, one axis at a time is varied, and an output
size that moves with an axis is tied to it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from onnx_config.config_sizes import config_size, modality_of
from onnx_config.declarations import Declaration, Role
from onnx_config.draft import GEOMETRY, Draft
from onnx_config.input_lessons import text_only
from onnx_config.lessons import candidates
from onnx_config.preprocessors import Preprocessor
from onnx_config.probe import ProbeResult
from onnx_config.proposal import propose_inputs
from onnx_config.spec import TensorSpec, ValueRule
from onnx_config.variation import Moved, grow_unseen_axes, vary_axes

if TYPE_CHECKING:
    from onnx_config.probe import Probe
    from onnx_config.trial import Trial

__all__ = ["Inference", "infer"]

_MAX_RUNS = 250
_MAX_SECONDS = 30.0
_MAX_ROUNDS = 20
_NUMBER = re.compile(r"\d+")
_NOISE = re.compile(r"(^|_)noise(_|$)")
_MOST_NUMBERS = 1 << 23
"""In all inputs of a changed draft together, unless the draft that is changed has a quarter of that; 32 MiB of float32.
What asks for more is a guess at an axis that is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What is known about a model's graph after asking."""

    inputs: tuple[TensorSpec, ...]
    """In the order of ``forward``."""

    outputs: tuple[TensorSpec, ...]
    """In the order of the output class."""

    axis_ranges: Mapping[str, tuple[int, int | None]]
    """Dynamic axis -> smallest and largest size."""

    sizes: Mapping[str, int]
    """Dynamic axis -> the size at which the model accepts its inputs."""

    axis_steps: Mapping[str, int] = field(default_factory=dict)
    """Dynamic axis -> what its size must be a multiple of, where that is more than one."""

    values: Mapping[str, ValueRule]
    """Input name -> what its values must be, where that had to be found out."""

    learned: tuple[str, ...] = ()
    """What the class said when it was run."""

    assumed: tuple[str, ...] = ()
    """What could not be settled by running it."""

    refusal: str | None = None
    """What the class said last where it accepted nothing; ``None`` where it did, or where nothing was run."""

    runs: int = 0
    """How many proposals were run until the class accepted one, or nothing was left to try."""


def infer(
    declaration: Declaration,
    config: Any,
    preprocessors: Sequence[Preprocessor],
    runner: Probe | Trial | None,
    *,
    task_family: str,
    flags: Mapping[str, Any],
    limits: Any = None,
    unused_positions: Mapping[int, int] | None = None,
    guesses: bool = True,
    hopeless: set[str] | None = None,
) -> Inference:
    """Return inputs, outputs and axes of the class behind ``declaration``.

    Args:
        declaration: What the class declares.
        config: Its config, the one that ``runner`` was built from.
        preprocessors: What its users feed it with.
        runner: The class on real values or on shapes alone; ``None``: nothing is run, shapes are as documented.
        task_family: The family of the task.
        flags: Further keyword arguments of ``forward``, such as ``use_cache=False``.
        limits: The config that says how long inputs may be; ``None``: ``config``.
        unused_positions: Rows of a table of positions -> how many of them are never used.
        guesses: Whether a refusal that does not say what to change is guessed at; else it is the answer.
        hopeless: Refusals, as words without numbers, at which all guesses failed before, with another config of the
            class; such a one is not guessed at again. Added to.
    """
    names = list(propose_inputs(declaration, config, preprocessors, task_family=task_family))
    draft = Draft(declaration, config, names, limits=limits, unused_positions=unused_positions)
    if runner is None:
        return _finish(
            draft, _documented_outputs(declaration, config, names), ("nothing was run: shapes as documented",)
        )

    from onnx_config.foretold import Refusals
    from onnx_config.probe import Probe

    refusals = None if isinstance(runner, Probe) else Refusals(runner, flags)

    def really(draft: Draft, sizes: Mapping[str, int] | None = None) -> ProbeResult:
        if isinstance(runner, Probe):
            return runner.run(draft.shapes(sizes), **flags)
        result = runner.run(draft.arrays(sizes), **flags)
        assert refusals is not None
        refusals.learn(result)
        return result

    def run(draft: Draft, sizes: Mapping[str, int] | None = None) -> ProbeResult:
        foretold = None if refusals is None else refusals.foretell(draft.shapes(sizes))
        return foretold or really(draft, sizes)

    draft, result, runs = _settle(draft, run, really, guesses=guesses, hopeless=set() if hopeless is None else hopeless)
    if guesses and result.outputs is None and any(rule.grid is not None for rule in draft.rules.values()):
        draft, result = _without_images(draft, result, run)
    if result.outputs is None:
        why = "depends on values" if result.undecidable else "was refused"
        note = f"a run {why}: {result.refusal}"[:400]
        found = _finish(draft, _documented_outputs(declaration, config, names), (note,))
        return found if result.undecidable else replace(found, refusal=result.refusal, runs=runs)
    if isinstance(runner, Probe):
        return _varied(draft, result.outputs, lambda sizes: run(draft, sizes))
    draft, result = _without_measuring_masks(draft, result, runner, run, flags=flags)
    draft, result = _without_chance(draft, result, run)
    return _varied_on_trial(draft, result, runner, run, flags=flags)


def _settle(
    draft: Draft,
    run: Callable[[Draft], ProbeResult],
    really: Callable[[Draft], ProbeResult],
    *,
    guesses: bool,
    hopeless: set[str],
) -> tuple[Draft, ProbeResult, int]:
    """Propose, and change what the model says is wrong, until it accepts or nothing helps any more.

    ``run`` may foretell a refusal; what ``really`` says is gone on from. Returns the last proposal, what the model said
    to it, and how many were run.
    """
    runs, started = 0, time.monotonic()

    def ask(proposal: Draft, *, foretold: bool = False) -> ProbeResult:
        nonlocal runs
        runs += 1
        return run(proposal) if foretold else really(proposal)

    answer = ask(draft)
    seen = {draft.signature}
    for _ in range(_MAX_ROUNDS):
        if answer.outputs is not None:
            break
        guesses = guesses and _told(answer.refusal) not in hopeless
        best: tuple[Draft, ProbeResult] | None = None
        most = max(_MOST_NUMBERS, 4 * _count(draft))
        for candidate in candidates(draft, answer, ask):
            if runs > _MAX_RUNS or time.monotonic() - started > _MAX_SECONDS:
                break
            signature = candidate.draft.signature
            if signature in seen or not candidate.draft.specs or _count(candidate.draft) > most:
                continue
            if not guesses and not candidate.sure:
                return draft, answer, runs
            seen.add(signature)
            # Where it says what to change its words are needed, which shapes alone may put otherwise.
            got = ask(candidate.draft, foretold=not candidate.sure)
            accepted = got.outputs is not None
            if not accepted and candidate.leaves_out:
                continue
            further = _is_further(got, best[1] if best else answer)
            other = candidate.sure and got.refusal != answer.refusal and got.progress >= answer.progress
            if accepted or further or (other and best is None):
                if got.foretold:
                    got = really(candidate.draft)
                notes = candidate.draft.assumed if candidate.leaves_out else candidate.draft.learned
                notes.append(candidate.why)
                best = (candidate.draft, got)
                if accepted or candidate.sure:
                    break
        if best is None:
            if guesses:
                hopeless.add(_told(answer.refusal))
            break
        draft, answer = best
    return draft, answer, runs


def _told(refusal: str | None) -> str:
    """Return a refusal without its numbers, which differ between a small model and the full one."""
    return _NUMBER.sub("#", refusal or "")


def _without_images(
    draft: Draft, result: ProbeResult, run: Callable[[Draft], ProbeResult]
) -> tuple[Draft, ProbeResult]:
    """Give up images whose grids are told, where no text with them was accepted in all that was tried."""
    for candidate in text_only(draft, result.refusal or ""):
        without = run(candidate.draft)
        if without.outputs is not None:
            candidate.draft.assumed.append(candidate.why)
            return candidate.draft, without
    return draft, result


def _count(draft: Draft) -> int:
    return sum(math.prod(shape) for shape, _ in draft.shapes().values())


def _is_further(new: ProbeResult, old: ProbeResult) -> bool:
    """Return whether a run came further: more modules returned, or the same function stopped at a later line."""
    if new.progress != old.progress:
        return new.progress > old.progress
    for here, there in zip(new.frames, old.frames, strict=False):
        if here.place != there.place:
            return here.place[0] == there.place[0] and here.function == there.function and here.place > there.place
    return False


def _without_measuring_masks(
    draft: Draft,
    result: ProbeResult,
    trial: Trial,
    run: Callable[[Draft], ProbeResult],
    *,
    flags: Mapping[str, Any],
) -> tuple[Draft, ProbeResult]:
    """Leave out optional masks of sounds and images whose values say how long something inside is.

    No graph holds such a length. Texts keep their masks: nobody deploys a model of texts that cannot be padded.
    """
    from onnx_config.probe import Probe

    main = draft.declaration.main_input
    optional = {a.name for a in draft.declaration.arguments if not a.required and a.name != main}
    masks = [name for name in draft.specs if name in optional and name.endswith("mask")]
    if not masks or modality_of(main) == "text":
        return draft, result
    probe = Probe.of(trial.model)
    measured = probe.run(draft.shapes(), **flags)
    if not measured.undecidable:
        return draft, result
    other = draft.copy()
    for name in masks:
        other.remove(name)
    without = run(other)
    if without.outputs is None or probe.run(other.shapes(), **flags).outputs is None:
        return draft, result
    other.assumed.append(
        f"{', '.join(masks)} was left out: what is inside depends on its values: {measured.refusal}"[:300]
    )
    return other, without


def _without_chance(
    draft: Draft, result: ProbeResult, run: Callable[[Draft], ProbeResult]
) -> tuple[Draft, ProbeResult]:
    """Give a model what it draws at random unless it is given: no graph draws the numbers that PyTorch does.

    One optional input mostly takes the place of all that is drawn; where none does, all of them together may. Noise has
    a number for each step of what comes out, where its own shape is not told.
    """
    if not result.drew or result.outputs is None:
        return draft, result
    optional = [
        argument.name
        for argument in draft.declaration.arguments
        if argument.role is Role.DATA and argument.name not in draft.specs and not GEOMETRY.search(argument.name)
    ]
    lengths = dict.fromkeys(size for shape, _ in result.outputs.values() for size in shape[1:2])
    tries: list[tuple[list[str], int | None]]
    tries = [([name], length) for name in optional if _NOISE.search(name) for length in lengths]
    tries += [([name], None) for name in optional]
    tries += [(optional, None)] if len(optional) > 1 else []
    for names, length in tries:
        other = draft.copy()
        for name in names:
            other.add(name)
        if length is not None:
            other.reshape(names[0], (other.specs[names[0]].shape[0], length))
        given = run(other)
        if given.outputs is not None and not given.drew and (length is None or given.outputs == result.outputs):
            other.learned.append(f"{', '.join(names)} was added, since the model draws it at random otherwise")
            return other, given
    draft.assumed.append("the model draws random numbers, and has no argument for them")
    return draft, result


def _varied_on_trial(
    draft: Draft,
    result: ProbeResult,
    trial: Trial,
    run: Callable[[Draft, Mapping[str, int]], ProbeResult],
    *,
    flags: Mapping[str, Any],
) -> Inference:
    """Vary the axes of a draft that really ran, on shapes alone as far as that is sooner and tells the same."""
    from onnx_config.spared_runs import SparedRuns, are_large

    outputs = result.outputs or {}
    if are_large(draft):
        other = draft.copy()
        spared = SparedRuns(other, trial, lambda sizes: run(other, sizes), flags)
        if spared.agrees(result):
            found = _varied(other, outputs, spared.run)
            if spared.are_proven():
                return found
    return _varied(draft, outputs, lambda sizes: run(draft, sizes))


def _varied(
    draft: Draft, outputs: Mapping[str, tuple[tuple[int, ...], str]], run: Callable[[Mapping[str, int]], ProbeResult]
) -> Inference:
    """Vary the axes of a draft that was accepted with ``outputs``."""
    before = dict(draft.sizes)
    moved = vary_axes(draft, run)
    grow_unseen_axes(draft, moved, outputs, run)
    if any(draft.sizes[axis] != before.get(axis) for axis in draft.axes()):
        # A text that had to grow was not yet as long when the first axes were varied.
        outputs = run(draft.sizes).outputs or outputs
        moved = vary_axes(draft, run)
    sizes = {axis: size for axis, size in draft.sizes.items() if axis in moved}
    taken: dict[str, tuple[int, ...]] = {}
    declared = draft.declaration
    tensors = tuple(
        TensorSpec(name=name, dtype=dtype, shape=_tie(name, shape, moved, sizes, _symbols(declared, name), taken=taken))
        for name, (shape, dtype) in outputs.items()
        if _is_kept(name, declared, draft.config, draft.specs)
    )
    return _finish(draft, tensors, ())


def _symbols(declaration: Declaration, name: str) -> tuple[int | str, ...] | None:
    return next((f.shape for f in declaration.outputs if f.name == name), None)


def _finish(draft: Draft, outputs: tuple[TensorSpec, ...], assumed: tuple[str, ...]) -> Inference:
    used = set(draft.axes())
    return Inference(
        inputs=tuple(draft.specs.values()),
        outputs=outputs,
        axis_ranges={axis: limits for axis, limits in draft.ranges().items() if axis in used},
        sizes={axis: size for axis, size in draft.sizes.items() if axis in used},
        axis_steps={axis: step for axis, step in draft.steps.items() if axis in used},
        values={name: rule for name, rule in draft.rules.items() if name in draft.specs},
        learned=tuple(draft.learned),
        assumed=(*draft.assumed, *assumed),
    )


def _tie(
    name: str,
    shape: tuple[int, ...],
    moved: Moved,
    sizes: Mapping[str, int],
    symbols: tuple[int | str, ...] | None,
    *,
    taken: dict[str, tuple[int, ...]],
) -> tuple[int | str, ...]:
    """Return ``shape`` with each size that moves named after what it moves with.

    ``taken`` holds the sizes that a documented name stood for in other outputs, and is added to: one name is
    one size throughout.
    """
    tied: list[int | str] = []
    for position, size in enumerate(shape):
        causes = []
        for axis, (other, outputs) in moved.items():
            there = outputs.get(name, (shape, ""))[0]
            if len(there) == len(shape) and there[position] != size:
                causes.append((axis, other, there[position]))
        if not causes:
            tied.append(size)
        elif len(causes) == 1 and size == sizes[causes[0][0]] and causes[0][2] == causes[0][1]:
            tied.append(causes[0][0])
        else:
            symbol = symbols[position] if symbols and len(symbols) == len(shape) else None
            here = (size, *(o.get(name, (shape, ""))[0][position] for _, o in moved.values()))
            if not isinstance(symbol, str) or symbol in sizes or taken.setdefault(symbol, here) != here:
                symbol = f"{name}_dim_{position}".replace(".", "_")
            tied.append(symbol)
    return tuple(tied)


def _is_kept(name: str, declaration: Declaration, config: Any, inputs: Mapping[str, Any]) -> bool:
    """Return whether an output that the model returned belongs into the graph."""
    field = next((f for f in declaration.outputs if f.name == name.split(".", maxsplit=1)[0]), None)
    if field is None:
        return True
    if field.flag is not None and field.flag not in inputs:
        return bool(getattr(config, field.flag, False)) or field.flag.startswith("add_")
    # The outputs of inner models repeat what their own graphs would give.
    return field.tensor or "." not in name or name.split(".")[1].isdigit()


def _documented_outputs(declaration: Declaration, config: Any, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    inputs = dict.fromkeys(names)
    # Samples of sound and patches of an image are not the steps of an output that documents the same name.
    is_text = modality_of(declaration.main_input) == "text"
    outputs = []
    for found in declaration.outputs:
        if not found.tensor or not _is_kept(found.name, declaration, config, inputs):
            continue
        shape: list[int | str] = []
        for position, axis in enumerate(found.shape or ()):
            if isinstance(axis, int) or axis.endswith("batch_size") or ("sequence_length" in axis and is_text):
                shape.append(axis)
            else:
                shape.append(config_size(config, axis, "text") or f"{found.name}_dim_{position}")
        outputs.append(TensorSpec(name=found.name, dtype="float32", shape=tuple(shape)))
    return tuple(outputs)
