"""One model through all steps: look it up, detect, export, simplify, compare, register.

Whatever happens to a model becomes its entry in the report; only an interruption by the user gets out.
Who runs the steps is a value (`Steps`): plain functions with retries here, Prefect tasks in ``flows``.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, ModelError, TransientError
from onnx_config.export import isolate
from onnx_config.export.artifact import FERRY_FILE
from onnx_config.export.scratch import scratch_folder
from tasks.basis import basis_of
from tasks.disk import disk_errors
from tasks.failures import FailureFolders
from tasks.file_lock import file_lock
from tasks.graphs import Graphs, best_graphs, narrow_axes
from tasks.job import Job, raise_if_stopping, reproduce_command
from tasks.lease import Lease, LeaseLostError, held_lease
from tasks.lookup import Lookup, find_known, resolve, unforeseen
from tasks.memory import MemoryGate, estimate_bytes, weight_bytes_in
from tasks.parity import case_folder
from tasks.place import place
from tasks.progress import Progress
from tasks.register import catalog, catalog_id, record_entry
from tasks.report import ErrorEntry, GraphEntry, ModelEntry, ParityEntry, Status, Step, VariantEntry, Verdict
from tasks.request import ConversionRequest, Listener, Refresh, SilentListener, Workspace
from tasks.retry import RETRIES, with_retries
from tasks.simplify import clear_artifact
from tasks.steps import PLAIN_STEPS, Steps
from tasks.store import file_in, store_of
from tasks.variants import DTYPES, moved, parity_of

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
    refresh: Refresh | None
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
    refresh: Refresh | None = None,
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
        refresh: What counts as changed beside commit and options; ``None``: nothing.
        batch_id: The batch's number in the catalog.
        stopping: Set elsewhere when the user interrupts; nothing is recorded of a model that this ends.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set.
    """
    listener = listener or SilentListener()
    gate = gate or MemoryGate(workspace.memory_limit_bytes, workers=1)
    progress = Progress(request=request, listener=listener)
    means = _Means(
        workspace=workspace,
        output=output,
        steps=steps,
        gate=gate,
        stopping=stopping or threading.Event(),
        retried=frozenset(ErrorKind) if retry_failed is None else retry_failed,
        refresh=refresh,
        batch_id=batch_id,
    )
    listener.model_started(request.model_id)
    try:
        entry = _convert(progress, means)
    # A bug of ours in one model must not end the batch of a thousand.
    except Exception as error:  # noqa: BLE001
        entry = _judged(progress, means, error)
    listener.model_finished(entry)
    return entry


def _judged(progress: Progress, means: _Means, error: Exception, *, lease: Lease | None = None) -> ModelEntry:
    # What an interruption broke says nothing about the model.
    raise_if_stopping(means.stopping)
    known = error if isinstance(error, FerryError) else unforeseen(error)
    return _failed(progress, means.workspace, known, means.batch_id, lease=lease)


def _failed(
    progress: Progress, workspace: Workspace, error: FerryError, batch_id: int | None, *, lease: Lease | None = None
) -> ModelEntry:
    """Record a failure; where even that fails, the entry says both.

    Raises:
        LeaseLostError: If another worker has the model by now: what it makes of it counts.
    """
    entry = progress.entry(Status.FAILED, error=error)
    try:
        record_entry(
            workspace,
            progress.request,
            entry,
            key=progress.key,
            started_at=progress.started_at,
            batch_id=batch_id,
            lease=lease,
        )
    except LeaseLostError:
        raise
    except FerryError as second:
        if error.kind is not ErrorKind.CATALOG:
            progress.notes.append(f"not in the catalog: {second.message}")
        entry = progress.entry(Status.FAILED, error=error)
    # What cannot be recorded is reported all the same.
    except Exception as second:  # noqa: BLE001
        progress.notes.append(f"not in the catalog: {unforeseen(second).message}")
        entry = progress.entry(Status.FAILED, error=error)
    if entry.error is not None and not error.kind.transient:
        FailureFolders(workspace.home).keep(progress.request, entry.error, revision=progress.revision)
    return entry


def _convert(progress: Progress, means: _Means) -> ModelEntry:
    request, workspace = progress.request, means.workspace
    with progress.during(Step.FETCH):
        with disk_errors(f"the folder {str(workspace.home)!r}"):
            (workspace.home / "locks").mkdir(parents=True, exist_ok=True)
        catalog(workspace)
        lookup = resolve(request)
    progress.revision, progress.key = lookup.source.revision, lookup.key
    # One model, one converter: whoever waits here finds the result of the other. On this machine the file's lock
    # tells, which costs nothing and ends with its process; among machines the lease does.
    with file_lock(workspace.home / "locks" / f"{lookup.key}.lock", stopping=means.stopping):
        for _ in range(1 + RETRIES):
            # Of what is lost with its lease nothing is told.
            fresh = replace(progress, seconds=dict(progress.seconds), notes=list(progress.notes))
            held = held_lease(
                workspace,
                lookup.key,
                stopping=means.stopping,
                model_id=catalog_id(request.model_id),
                batch_id=means.batch_id,
            )
            with held as lease, suppress(LeaseLostError):
                fresh.lease = lease
                try:
                    return _convert_alone(fresh, means, lookup, lease)
                except LeaseLostError:
                    raise
                # Recorded before others may begin: who waits for the model hears what became of it.
                except Exception as error:  # noqa: BLE001
                    return _judged(fresh, means, error, lease=lease)
    raise TransientError(
        f"The model {request.model_id!r} was taken over by another worker {1 + RETRIES} times, since nothing was heard "
        "of this one for minutes. Look whether this machine is suspended or overloaded, or cut off from the catalog, "
        "and run again.",
        kind=ErrorKind.CATALOG,
    )


def _convert_alone(progress: Progress, means: _Means, lookup: Lookup, lease: Lease) -> ModelEntry:
    request, workspace = progress.request, means.workspace
    with progress.during(Step.FETCH):
        known = find_known([lookup], workspace, means.retried, means.refresh).get(request)
        if known is not None:
            return place_known(known, request, means.output, workspace)
        # Before hours of work whose result nobody would take.
        store_of(workspace).check()
        # The server's imports take seconds; they go on beside the download.
        isolate.warm_up()
        source = with_retries(hub.download)(lookup.source, code=request.options.trust_remote_code)
        weight_bytes = weight_bytes_in(source)
    progress.waits()
    with means.gate.admit(estimate_bytes(weight_bytes), stopping=means.stopping) as share:
        try:
            return _run_steps(progress, means, source, weight_bytes=weight_bytes, memory_bytes=share, lease=lease)
        except FerryError as error:
            if not error.kind.retried_alone:
                raise
            first = error
    progress.attempts += 1
    progress.notes.append(f"the first try ended with {first.kind.value}; the second ran alone")
    progress.waits()
    with means.gate.alone(stopping=means.stopping) as share:
        return _run_steps(progress, means, source, weight_bytes=weight_bytes, memory_bytes=share, lease=lease)


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
    gate = gate or MemoryGate(workspace.memory_limit_bytes, workers=1)
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
        refresh=None,
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
    return entry.model_copy(
        update={"artifact": str(output), "graphs": graphs, "variants": moved(entry.variants, str(output))}
    )


def _run_steps(
    progress: Progress,
    means: _Means,
    source: Path,
    *,
    weight_bytes: int,
    memory_bytes: int,
    lease: Lease | None = None,
) -> ModelEntry:
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
            lease=lease,
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
        entries, parity = graphs.entries, graphs.parity
        if verified:
            _add_variants(progress, job, graphs, steps)
            entries, parity = _in_dtype(progress, job, graphs, steps)
            verified = parity.verdict is Verdict.VERIFIED
        progress.parity = parity
        error = None if verified else _mismatch(parity)
        progress.step = Step.PARITY
        status = Status.CONVERTED if verified else Status.MISMATCH
        failures, kept = FailureFolders(workspace.home), None
        draft = progress.entry(status, error=error, graphs=entries)
        if draft.error is not None:
            kept = failures.keep(progress.request, draft.error, revision=progress.revision, cases=case_folder(job))
            note = [] if kept is None else [f"{kept / 'reproduce.sh'} shows the difference again"]
            draft = draft.model_copy(update={"notes": (*draft.notes, *note)})
        with progress.during(Step.REGISTER):
            registered: ModelEntry = steps.register(
                job,
                draft,
                started_at=progress.started_at,
                batch_id=means.batch_id,
                templates=[(made.template.folder, made.use) for made in graphs.templates if made.template is not None],
                basis=basis_of(progress.request, graphs),
            )
            if kept is None:
                failures.forget(progress.request)
            else:
                failures.point_to(kept, [(graph.role, graph.path) for graph in registered.graphs])
            registered = place_known(registered, progress.request, means.output, workspace)
        return registered.model_copy(update={"seconds": dict(progress.seconds)})


def _add_variants(progress: Progress, job: Job, graphs: Graphs, steps: Steps) -> None:
    """Put those variants that hold beside the graphs; of the others only the entry tells."""
    wanted = job.request.options.variants
    if not wanted:
        return
    with progress.during(Step.PARITY):
        varied = steps.vary(job, graphs.parts, graphs.merged, wanted)
    progress.saw(varied.cost)
    progress.variants = varied.entries
    progress.notes += [_told(entry) for entry in varied.entries]
    for folder in varied.folders.values():
        for path in sorted(folder.iterdir()):
            path.replace(job.scratch / "artifact" / path.name)


def _told(entry: VariantEntry) -> str:
    """Return a variant's verdict for a reader."""
    parity = entry.parity
    if parity is None:
        return f"there is no variant {entry.variant}: {'; '.join(entry.notes)}"
    if parity.verdict is not Verdict.VERIFIED:
        return f"the variant {entry.variant} does not hold and is left out: {parity.detail}"
    agreement = parity.agreement
    said = "" if agreement is None else f", {agreement.rate:.1%} of {agreement.choices} choices are the same"
    off = "" if parity.relative_error is None else f", off by {parity.relative_error:.2%} at most"
    return f"the variant {entry.variant} is verified{off}{said}; {'; '.join(entry.notes)}"


def _in_dtype(progress: Progress, job: Job, graphs: Graphs, steps: Steps) -> tuple[tuple[GraphEntry, ...], ParityEntry]:
    """Put the graphs in the element type asked for in the place of the verified ones; return them and their verdict.

    Raises:
        ModelError: If they cannot be had in it (``unsupported``).
    """
    variant = DTYPES.get(job.request.options.dtype)
    if variant is None:
        return graphs.entries, graphs.parity
    with progress.during(Step.PARITY):
        varied = steps.vary(job, graphs.parts, graphs.merged, (variant,), suffixed=False)
    progress.saw(varied.cost)
    entry = varied.entries[0]
    if entry.variant not in varied.folders:
        raise ModelError(
            f"The graph was asked for in {job.request.options.dtype} and cannot be had so: {'; '.join(entry.notes)}",
            kind=ErrorKind.UNSUPPORTED,
        )
    progress.notes += [f"in {job.request.options.dtype}, after it was verified in float32: {n}" for n in entry.notes]
    clear_artifact(job)
    varied.folders[entry.variant].replace(job.scratch / "artifact")
    return entry.graphs, parity_of(entry, graphs.parity)


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
