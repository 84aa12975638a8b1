"""One model through all steps: look it up, detect, export, simplify, compare, register.

Whatever happens to a model becomes its entry in the report; only an interruption by the user gets out.
Who runs the steps is a value (`Steps`): plain functions with retries here, Prefect tasks in ``flows``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnx_config import hub
from onnx_config.cache_layout import with_past
from onnx_config.errors import ErrorKind, FerryError, InputError, ModelError
from onnx_config.export import isolate
from onnx_config.export.artifact import FERRY_FILE
from onnx_config.export.scratch import scratch_folder
from onnx_config.spec import ModelSpec, base_axis
from onnx_config.task_detector import normalize_task
from tasks.detect import detect
from tasks.export import Exported, export
from tasks.file_lock import file_lock
from tasks.job import Job, StepCost, raise_if_stopping, reproduce_command
from tasks.lookup import resolve, unforeseen, usable
from tasks.memory import MemoryGate, estimate_bytes, weight_bytes_in
from tasks.parity import Checked, check
from tasks.register import catalog, known_results, record_entry, register
from tasks.report import ErrorEntry, ModelEntry, ParityEntry, Status, Step, Verdict
from tasks.request import ConversionRequest, Listener, SilentListener, Workspace
from tasks.retry import with_retries
from tasks.simplify import Simplified, simplify
from tasks.store import disk_errors, place
from tasks.versions import package_versions

__all__ = [
    "PLAIN_STEPS",
    "Steps",
    "convert_model",
    "place_known",
    "refused",
    "rehearse_model",
]

_IMAGE_SIDES = frozenset({"height", "width"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The functions that do the work, each with its retry rule."""

    detect: Callable[..., tuple[ModelSpec, StepCost]]
    export: Callable[..., Exported]
    simplify: Callable[..., Simplified]
    parity: Callable[..., Checked]
    register: Callable[..., ModelEntry]


PLAIN_STEPS = Steps(
    detect=with_retries(detect),
    export=with_retries(export),
    simplify=with_retries(simplify),
    parity=with_retries(check),
    register=with_retries(register),
)
"""The steps without Prefect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """What a conversion works with."""

    workspace: Workspace
    output: Path | None
    steps: Steps
    gate: MemoryGate
    stopping: threading.Event
    retried: frozenset[ErrorKind]
    batch_id: int | None


@dataclass(slots=True)
class _Progress:
    """What is known of a conversion so far; becomes its entry whenever it ends."""

    request: ConversionRequest
    listener: Listener
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[Step, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    step: Step = Step.FETCH
    revision: str | None = None
    key: str | None = None
    spec: ModelSpec | None = None
    parity: ParityEntry | None = None
    template: str | None = None
    simplified: bool = False
    attempts: int = 1
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        self.step = step
        self.listener.step_started(self.request.model_id, step)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - start, 3)

    def saw(self, cost: StepCost) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes or 0, cost.peak_rss_bytes)

    def entry(self, status: Status, *, error: FerryError | None = None, **fields: Any) -> ModelEntry:
        spec = self.spec
        return ModelEntry(
            id=self.request.model_id,
            revision=self.revision,
            status=status,
            task=spec.task if spec else None,
            model_type=spec.model_type if spec else None,
            architecture=spec.architecture if spec else None,
            artifact=fields.pop("artifact", None),
            template=self.template,
            simplified=self.simplified,
            parity=self.parity,
            seconds=dict(self.seconds),
            peak_rss_bytes=self.peak_rss_bytes,
            attempts=self.attempts,
            notes=tuple(dict.fromkeys(self.notes)),
            error=None
            if error is None
            else ErrorEntry(
                kind=error.kind,
                message=error.message,
                step=self.step,
                reproduce=reproduce_command(self.request),
            ),
            **fields,
        )


def convert_model(
    request: ConversionRequest,
    workspace: Workspace,
    *,
    output: Path | None = None,
    listener: Listener | None = None,
    steps: Steps = PLAIN_STEPS,
    gate: MemoryGate | None = None,
    retry_failed: frozenset[ErrorKind] | None = None,
    batch_id: int | None = None,
    stopping: threading.Event | None = None,
) -> ModelEntry:
    """Convert one model, or find it converted; return its entry.

    Never raises for what goes wrong with a model. What is left behind when this process is killed: at most a
    temporary folder, which the next run removes.

    Args:
        request: The model and its options.
        workspace: Where things are kept.
        output: Folder to place the artifact's files in, beside the store; ``None``: the store alone.
        listener: Is told of each step.
        steps: Who runs the steps.
        gate: The memory that all conversions share; ``None``: this one has it all.
        retry_failed: Kinds of remembered failures to try again; ``None``: all, since this model was named.
        batch_id: The batch's number in the catalog.
        stopping: Set elsewhere when the user interrupts; nothing is recorded of a model that this ends.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set.
    """
    listener = listener or SilentListener()
    gate = gate or MemoryGate(workspace.memory_limit_bytes)
    progress = _Progress(request=request, listener=listener)
    means = _Means(
        workspace=workspace,
        output=output,
        steps=steps,
        gate=gate,
        stopping=stopping or threading.Event(),
        retried=frozenset(ErrorKind) if retry_failed is None else retry_failed,
        batch_id=batch_id,
    )
    listener.model_started(request.model_id)
    try:
        entry = _convert(progress, means)
    except FerryError as error:
        # What an interruption broke says nothing about the model.
        raise_if_stopping(means.stopping)
        entry = _failed(progress, workspace, error, batch_id)
    # A bug of ours in one model must not end the batch of a thousand.
    except Exception as error:  # noqa: BLE001
        raise_if_stopping(means.stopping)
        entry = _failed(progress, workspace, unforeseen(error), batch_id)
    listener.model_finished(entry)
    return entry


def _failed(progress: _Progress, workspace: Workspace, error: FerryError, batch_id: int | None) -> ModelEntry:
    """Record a failure; where even that fails, the entry says both."""
    entry = progress.entry(Status.FAILED, error=error)
    try:
        record_entry(
            workspace, progress.request, entry, key=progress.key, started_at=progress.started_at, batch_id=batch_id
        )
    except FerryError as second:
        if error.kind is not ErrorKind.CATALOG:
            progress.notes.append(f"not in the catalog: {second.message}")
        entry = progress.entry(Status.FAILED, error=error)
    # What cannot be recorded is reported all the same.
    except Exception as second:  # noqa: BLE001
        progress.notes.append(f"not in the catalog: {unforeseen(second).message}")
        entry = progress.entry(Status.FAILED, error=error)
    return entry


def _convert(progress: _Progress, means: _Means) -> ModelEntry:
    request, workspace = progress.request, means.workspace
    with progress.during(Step.FETCH):
        with disk_errors(f"the folder {str(workspace.home)!r}"):
            (workspace.home / "locks").mkdir(parents=True, exist_ok=True)
        catalog(workspace)
        lookup = resolve(request)
    progress.revision, progress.key = lookup.source.revision, lookup.key
    # One model, one converter: whoever waits here finds the result of the other.
    with file_lock(workspace.home / "locks" / f"{lookup.key}.lock", stopping=means.stopping):
        with progress.during(Step.FETCH):
            record = known_results(workspace, [lookup.key]).get(lookup.key)
            known = usable(record, request, workspace, means.retried) if record is not None else None
            if known is not None:
                return place_known(known, request, means.output)
            # The server's imports take seconds; they go on beside the download.
            isolate.warm_up()
            source = with_retries(hub.download)(lookup.source)
            weight_bytes = weight_bytes_in(source)
        with means.gate.admit(estimate_bytes(weight_bytes), stopping=means.stopping) as share:
            try:
                return _run_steps(progress, means, source, weight_bytes=weight_bytes, memory_bytes=share)
            except FerryError as error:
                if not error.kind.retried_alone:
                    raise
                first = error
        progress.attempts += 1
        progress.notes.append(f"the first try ended with {first.kind.value}; the second ran alone")
        with means.gate.alone(stopping=means.stopping) as share:
            return _run_steps(progress, means, source, weight_bytes=weight_bytes, memory_bytes=share)


def refused(
    request: ConversionRequest, error: FerryError, workspace: Workspace, *, batch_id: int | None = None
) -> ModelEntry:
    """Return the entry of a model that could not even be looked up, and record it."""
    return _failed(_Progress(request=request, listener=SilentListener()), workspace, error, batch_id)


def rehearse_model(
    request: ConversionRequest,
    workspace: Workspace,
    source: Path,
    *,
    gate: MemoryGate | None = None,
    stopping: threading.Event | None = None,
) -> ModelEntry:
    """Take the model in ``source`` through every step but the last; return the entry that it would have.

    Nothing is stored or recorded, and nothing is left. Never raises for what goes wrong with a model.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set.
    """
    gate = gate or MemoryGate(workspace.memory_limit_bytes)
    progress = _Progress(request=request, listener=SilentListener())
    means = _Means(
        workspace=workspace,
        output=None,
        steps=replace(
            PLAIN_STEPS,
            # A model made small is no structure that anybody asks for again.
            export=lambda job, spec, **options: PLAIN_STEPS.export(job, spec, **{**options, "direct": True}),
            register=lambda _job, draft, **_: draft,
        ),
        gate=gate,
        stopping=stopping or threading.Event(),
        retried=frozenset(),
        batch_id=None,
    )
    weight_bytes = weight_bytes_in(source)
    try:
        with gate.admit(estimate_bytes(weight_bytes), stopping=means.stopping) as share:
            return _run_steps(progress, means, source, weight_bytes=weight_bytes, memory_bytes=share)
    except FerryError as error:
        raise_if_stopping(means.stopping)
        return progress.entry(Status.FAILED, error=error)
    # A bug of ours in one model must not end the look at all the others.
    except Exception as error:  # noqa: BLE001
        raise_if_stopping(means.stopping)
        return progress.entry(Status.FAILED, error=unforeseen(error))


def place_known(entry: ModelEntry, request: ConversionRequest, output: Path | None) -> ModelEntry:
    """Return the entry of a verified model with its files placed in ``output``; of any other as it is.

    Where they cannot be placed, the entry is a failed one that says where they are. The catalog does not hear of
    that: it says what is in the store, whatever became of a copy.
    """
    if output is None or entry.artifact is None or entry.status not in (Status.CONVERTED, Status.REUSED):
        return entry
    try:
        placed: ModelEntry = _placed(entry, output)
    except FerryError as error:
        failure = ErrorEntry(
            kind=error.kind,
            message=error.message,
            step=Step.REGISTER,
            reproduce=reproduce_command(request, output=output),
        )
        note = f"the model is {entry.status.value} all the same; its files are in {entry.artifact}"
        return entry.model_copy(update={"status": Status.FAILED, "error": failure, "notes": (*entry.notes, note)})
    return placed


@with_retries
def _placed(entry: ModelEntry, output: Path) -> ModelEntry:
    source = Path(entry.artifact or "")
    names = [p.relative_to(source).as_posix() for p in sorted(source.rglob("*")) if p.is_file()]
    place(source, output, [name for name in names if name != FERRY_FILE])
    graphs = tuple(
        graph.model_copy(update={"path": str(output / Path(graph.path).relative_to(source))}) for graph in entry.graphs
    )
    return entry.model_copy(update={"artifact": str(output), "graphs": graphs})


def _run_steps(progress: _Progress, means: _Means, source: Path, *, weight_bytes: int, memory_bytes: int) -> ModelEntry:
    workspace, steps = means.workspace, means.steps
    with (
        disk_errors(f"the folder {str(workspace.home)!r}"),
        scratch_folder(workspace.home, progress.request.model_id) as scratch,
    ):
        job = Job(
            request=progress.request,
            workspace=workspace,
            revision=progress.revision or "",
            key=progress.key or "",
            source=source,
            scratch=scratch,
            memory_bytes=memory_bytes,
            weight_bytes=weight_bytes,
            stopping=means.stopping,
        )
        with progress.during(Step.DETECT):
            spec, cost = steps.detect(job)
        progress.saw(cost)
        progress.notes += spec.notes
        spec, exported, stored, checked = _best_graph(progress, job, spec, steps)
        progress.template = exported.use
        progress.notes += exported.notes
        progress.simplified = stored.simplified
        progress.parity = checked.entry
        progress.notes += checked.notes
        verified = checked.entry.verdict is Verdict.VERIFIED
        if verified and (narrow := _narrow_axes(spec, stored)):
            raise ModelError(
                f"A graph that takes other sizes of {', '.join(narrow)} was asked for, as the model does; the one that "
                f"could be traced takes the traced size only. {' '.join(progress.notes[-1:])}".strip(),
                kind=ErrorKind.EXPORT_FAILED,
            )
        error = None if verified else _mismatch(checked.entry)
        progress.step = Step.PARITY
        status = Status.CONVERTED if verified else Status.MISMATCH
        draft = progress.entry(status, error=error, graphs=(stored.graph,))
        with progress.during(Step.REGISTER):
            registered: ModelEntry = steps.register(
                job,
                draft,
                started_at=progress.started_at,
                batch_id=means.batch_id,
                template=None if exported.template is None else exported.template.folder,
            )
            registered = place_known(registered, progress.request, means.output)
        return registered.model_copy(update={"seconds": dict(progress.seconds)})


def _best_graph(
    progress: _Progress, job: Job, spec: ModelSpec, steps: Steps
) -> tuple[ModelSpec, Exported, Simplified, Checked]:
    """Return the graph of a model with its verdict, and the spec that it fulfils.

    One that generates text carries its cache, unless its task was asked for without; where that cannot be had, and was
    not asked for, the graph of the bare forward pass takes its place.
    """
    asked = job.request.options.task
    continued = _continued(spec, asked)
    if continued is None:
        progress.spec = spec
        return spec, *_verified_graph(progress, job, spec, steps)
    progress.spec = continued
    try:
        exported, stored, checked = _verified_graph(progress, job, continued, steps)
    except ModelError as error:
        if asked is not None:
            raise
        failure = error.message
    else:
        if asked is not None or checked.entry.verdict is Verdict.VERIFIED:
            return continued, exported, stored, checked
        failure = checked.entry.detail or checked.entry.verdict.value
    progress.notes.append(f"without its cache, since with it the graph does not hold: {failure}")
    progress.spec = spec
    return spec, *_verified_graph(progress, job, spec, steps)


def _continued(spec: ModelSpec, asked: str | None) -> ModelSpec | None:
    """Return the spec of the graph with a cache where there is to be one.

    Raises:
        ModelError: If one was asked for and the model keeps none that could be carried (``unsupported``).
    """
    if asked is not None:
        return with_past(spec) if normalize_task(asked)[1] else None
    if spec.task_family != "text-generation":
        return None
    try:
        return with_past(spec)
    except ModelError:
        return None


def _verified_graph(
    progress: _Progress, job: Job, spec: ModelSpec, steps: Steps
) -> tuple[Exported, Simplified, Checked]:
    """Return a graph and its verdict; one that was bound to a template and does not hold gives way to one that was not.

    What is unstable is so by itself.
    """
    exported, stored, checked = _graph_of(progress, job, spec, steps)
    if checked.entry.verdict is Verdict.MISMATCH and exported.template is not None:
        why = checked.entry.detail or checked.entry.verdict.value
        progress.notes.append(f"traced with its weights, since what was bound to the template does not hold: {why}")
        exported, stored, checked = _graph_of(progress, job, spec, steps, direct=True)
    return exported, stored, checked


def _graph_of(
    progress: _Progress, job: Job, spec: ModelSpec, steps: Steps, *, direct: bool = False
) -> tuple[Exported, Simplified, Checked]:
    """Return a graph and its verdict; one whose axes are in doubt gives way to one that has them fixed."""
    with progress.during(Step.EXPORT):
        exported = steps.export(job, spec, direct=direct)
    progress.saw(exported.cost)
    stored, checked = _simplify_and_check(progress, job, spec, exported, steps)
    if doubtful := _doubtful_axes(spec, stored, checked.entry):
        with progress.during(Step.EXPORT):
            exported = steps.export(job, spec, fixed=doubtful, direct=direct)
        progress.saw(exported.cost)
        progress.notes.append(
            f"{', '.join(doubtful)} is fixed, since as a dynamic axis it did not hold: "
            f"{checked.entry.detail or 'the model takes no second size to compare at'}"
        )
        stored, checked = _simplify_and_check(progress, job, spec, exported, steps)
    return exported, stored, checked


def _doubtful_axes(spec: ModelSpec, stored: Simplified, parity: ParityEntry) -> list[str]:
    """Return the dynamic axes that the graph should rather not have.

    Of a verified graph, those that were not compared at two sizes. Of any other, the size of an image: the one axis
    that a model may take and yet bake into its graph.
    """
    dynamic = {axis for tensor in stored.graph.inputs for axis in tensor.shape if isinstance(axis, str)}
    dynamic &= spec.axis_ranges.keys()
    doubtful = dynamic - set(parity.axes_proven) if parity.verdict is Verdict.VERIFIED else dynamic & _IMAGE_SIDES
    # An image with one free side is of no use.
    return sorted(doubtful | (dynamic & _IMAGE_SIDES if doubtful & _IMAGE_SIDES else set()))


def _narrow_axes(spec: ModelSpec, stored: Simplified) -> list[str]:
    """Return the axes at which the model takes many sizes and the graph one that nobody declared.

    The sides of an image are none of them: a preprocessor makes every image the size that was traced.
    """
    fixed = {tensor.name: tensor.shape for tensor in stored.graph.inputs}
    narrow = set()
    for tensor in spec.inputs:
        for here, there in zip(tensor.shape, fixed.get(tensor.name, ()), strict=False):
            if isinstance(here, str) and isinstance(there, int):
                low, high = spec.axis_ranges.get(base_axis(here), (there, there))
                if base_axis(here) not in _IMAGE_SIDES and low != high:
                    narrow.add(base_axis(here))
    return sorted(narrow)


def _simplify_and_check(
    progress: _Progress, job: Job, spec: ModelSpec, exported: Exported, steps: Steps
) -> tuple[Simplified, Checked]:
    """Return the graph to store and its verdict; a simplified graph that fails gives way to a plain one that holds."""
    metadata = _birth_certificate(job, spec)
    with progress.during(Step.SIMPLIFY):
        try:
            stored = steps.simplify(job, spec, exported, metadata, enabled=job.request.options.simplify)
        except InputError:
            # A checkpoint that cannot be bound is one that cannot be exported.
            progress.step = Step.EXPORT
            raise
    progress.saw(stored.cost)
    if stored.reason is not None:
        progress.notes.append(f"the plain graph is kept: {stored.reason}")
    failure: FerryError | None = None
    checked: Checked | None = None
    with progress.during(Step.PARITY):
        try:
            checked = steps.parity(job, spec, stored, reused=exported.use == "reused")
        except FerryError as error:
            if not stored.simplified or error.kind is not ErrorKind.RUNTIME_FAILED:
                raise
            failure = error
    if checked is not None:
        progress.saw(checked.cost)
        if checked.entry.verdict is Verdict.VERIFIED or not stored.simplified:
            return stored, checked
    with progress.during(Step.SIMPLIFY):
        plain = steps.simplify(job, spec, exported, metadata, enabled=False)
    with progress.during(Step.PARITY):
        again = steps.parity(job, spec, plain)
    progress.saw(again.cost)
    if again.entry.verdict is not Verdict.VERIFIED:
        return plain, again
    why = failure.message if failure is not None else checked.entry.detail if checked is not None else None
    progress.notes.append(f"the plain graph is kept: the simplified one does not hold ({why})")
    return plain, again


def _mismatch(parity: ParityEntry) -> FerryError:
    if parity.verdict is Verdict.UNSTABLE:
        text = (
            f"The graph cannot be verified, since the model is unstable: {parity.detail}. "
            "The artifact is in quarantine and is not served."
        )
    else:
        text = (
            f"The graph does not compute what PyTorch computes: {parity.detail}. "
            "The artifact is in quarantine and is not served."
        )
    return ModelError(text, kind=ErrorKind.MISMATCH)


def _birth_certificate(job: Job, spec: ModelSpec) -> dict[str, str]:
    """Return what a graph says of its origin in ``metadata_props``.

    The verdict stands there as ``verified`` while the file is still in the scratch folder, so that the file compared
    is the file stored; one that fails is stamped anew on its way to the quarantine.
    """
    certificate = {
        "onnx_ferry.source": job.request.model_id if not hub.is_folder(job.request.model_id) else "local folder",
        "onnx_ferry.revision": job.revision,
        "onnx_ferry.task": spec.task,
        "onnx_ferry.architecture": spec.architecture,
        "onnx_ferry.key": job.key,
        "onnx_ferry.verdict": Verdict.VERIFIED.value,
    }
    return certificate | {f"onnx_ferry.version.{name}": text for name, text in package_versions().items()}
