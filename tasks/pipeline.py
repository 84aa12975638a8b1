"""One model through all steps: look it up, detect, export, simplify, compare, register.

Whatever happens to a model becomes its entry in the report; only an interruption by the user gets out.
Who runs the steps is a value (`Steps`): plain functions with retries here, Prefect tasks in ``flows``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, ModelError
from onnx_config.export import isolate
from onnx_config.export.artifact import FERRY_FILE
from onnx_config.export.scratch import scratch_folder
from tasks.disk import disk_errors
from tasks.file_lock import file_lock
from tasks.graphs import best_graphs, narrow_axes
from tasks.job import Job, raise_if_stopping, reproduce_command
from tasks.lookup import resolve, unforeseen, usable
from tasks.memory import MemoryGate, estimate_bytes, weight_bytes_in
from tasks.place import place
from tasks.progress import Progress
from tasks.register import catalog, known_results, record_entry
from tasks.report import ErrorEntry, ModelEntry, ParityEntry, Status, Step, Verdict
from tasks.request import ConversionRequest, Listener, SilentListener, Workspace
from tasks.retry import with_retries
from tasks.steps import PLAIN_STEPS, Steps
from tasks.store import file_in, store_of

__all__ = [
    "convert_model",
    "place_known",
    "refused",
    "rehearse_model",
]


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
    progress = Progress(request=request, listener=listener)
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


def _failed(progress: Progress, workspace: Workspace, error: FerryError, batch_id: int | None) -> ModelEntry:
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


def _convert(progress: Progress, means: _Means) -> ModelEntry:
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
                return place_known(known, request, means.output, workspace)
            # Before hours of work whose result nobody would take.
            store_of(workspace).check()
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
    return _failed(Progress(request=request, listener=SilentListener()), workspace, error, batch_id)


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
    progress = Progress(request=request, listener=SilentListener())
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


def place_known(entry: ModelEntry, request: ConversionRequest, output: Path | None, workspace: Workspace) -> ModelEntry:
    """Return the entry of a verified model with its files placed in ``output``; of any other as it is.

    Where they cannot be placed, the entry is a failed one that says where they are. The catalog does not hear of
    that: it says what is in the store, whatever became of a copy.
    """
    if output is None or entry.artifact is None or entry.status not in (Status.CONVERTED, Status.REUSED):
        return entry
    try:
        placed: ModelEntry = _placed(entry, entry.artifact, output, workspace)
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
def _placed(entry: ModelEntry, artifact: str, output: Path, workspace: Workspace) -> ModelEntry:
    source = store_of(workspace, artifact).folder(artifact)
    names = [p.relative_to(source).as_posix() for p in sorted(source.rglob("*")) if p.is_file()]
    place(source, output, [name for name in names if name != FERRY_FILE])
    graphs = tuple(
        graph.model_copy(update={"path": str(output / graph.path.removeprefix(file_in(artifact, "")))})
        for graph in entry.graphs
    )
    return entry.model_copy(update={"artifact": str(output), "graphs": graphs})


def _run_steps(progress: Progress, means: _Means, source: Path, *, weight_bytes: int, memory_bytes: int) -> ModelEntry:
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
        graphs = best_graphs(progress, job, spec, steps)
        progress.template = graphs.template
        progress.simplified = graphs.simplified
        progress.parity = graphs.parity
        verified = graphs.parity.verdict is Verdict.VERIFIED
        narrow = {axis for part in graphs.parts for axis in narrow_axes(part.spec, part.stored)}
        if verified and narrow:
            raise ModelError(
                f"A graph that takes other sizes of {', '.join(sorted(narrow))} was asked for, as the model does; the "
                "one that could be traced takes the traced size only. "
                f"{' '.join(progress.notes[-1:])}".strip(),
                kind=ErrorKind.EXPORT_FAILED,
            )
        error = None if verified else _mismatch(graphs.parity)
        progress.step = Step.PARITY
        status = Status.CONVERTED if verified else Status.MISMATCH
        draft = progress.entry(status, error=error, graphs=graphs.entries)
        with progress.during(Step.REGISTER):
            registered: ModelEntry = steps.register(
                job,
                draft,
                started_at=progress.started_at,
                batch_id=means.batch_id,
                templates=[(made.template.folder, made.use) for made in graphs.templates if made.template is not None],
            )
            registered = place_known(registered, progress.request, means.output, workspace)
        return registered.model_copy(update={"seconds": dict(progress.seconds)})


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
