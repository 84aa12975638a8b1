"""Verify: compare what is registered with its model once more, after an upgrade or on another device.

A verdict binds afterwards too: an artifact that no longer holds where it once did goes to the quarantine, its
``ferry.json`` and the catalog say so, and the loader refuses it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

import db
from onnx_config import hub
from onnx_config.errors import ErrorKind, FerryError, InputError
from onnx_config.export.artifact import FERRY_FILE, finite, read_ferry_file, write_ferry_value
from onnx_config.export.scratch import scratch_folder
from onnx_config.runtime.integrity import check_files
from onnx_config.spec import ModelSpec
from tasks.basis import Basis, read_basis
from tasks.disk import disk_errors
from tasks.failures import FailureFolders
from tasks.graphs import verdict_on_all
from tasks.job import Job, StepCost, raise_if_stopping
from tasks.join import compare_together
from tasks.lookup import unforeseen
from tasks.memory import MemoryGate, estimate_bytes, weight_bytes_in
from tasks.parity import Effort, case_folder, check
from tasks.register import catalog, catalog_errors, environment_now, parity_record
from tasks.report import ErrorEntry, GraphEntry, ParityEntry, Step, VariantEntry, Verdict
from tasks.request import Device, Workspace
from tasks.retry import with_retries
from tasks.simplify import Simplified
from tasks.store import file_in, store_of
from tasks.variant_verdicts import judge_again
from tasks.variants import DTYPES, parity_of
from tasks.verify_report import Change, VerifyEntry, change_between
from tasks.verify_targets import Target
from tasks.verify_variants import error_of_variants, verify_variants, withhold

__all__ = ["verify_target"]

_NOTHING = StepCost(seconds=0.0, peak_rss_bytes=0)


def verify_target(
    target: Target,
    workspace: Workspace,
    *,
    device: Device,
    effort: Effort,
    gate: MemoryGate | None = None,
    stopping: threading.Event | None = None,
) -> VerifyEntry:
    """Compare an artifact with its model, record the verdict, and put what no longer holds into quarantine.

    Never raises for what goes wrong with an artifact.

    Args:
        target: The artifact.
        workspace: Where things are kept.
        device: Where both sides run.
        effort: How much is compared.
        gate: The memory that all comparisons share; ``None``: this one has it all.
        stopping: Set elsewhere when the user interrupts.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set.
    """
    started = time.monotonic()
    stopping = stopping or threading.Event()
    means = _Means(workspace, gate or MemoryGate(workspace.memory_limit_bytes, workers=1), stopping, device, effort)
    basis: Basis | None = None
    try:
        folder = store_of(workspace, target.place).folder(target.place)
        basis = read_basis(folder)
        entry = _verify(target, folder, basis, means)
    except FerryError as error:
        raise_if_stopping(stopping)
        entry = _failed(target, basis, error)
    # A bug of ours in one artifact must not end the look at all the others.
    except Exception as error:  # noqa: BLE001
        raise_if_stopping(stopping)
        entry = _failed(target, basis, unforeseen(error))
    return entry.model_copy(update={"seconds": round(time.monotonic() - started, 3)})


@dataclass(frozen=True, slots=True)
class _Means:
    workspace: Workspace
    gate: MemoryGate
    stopping: threading.Event
    device: Device
    effort: Effort


def _verify(target: Target, folder: Path, basis: Basis, means: _Means) -> VerifyEntry:
    value = read_ferry_file(folder) or {}
    there = [entry for entry in basis.entry.variants if entry.graphs]
    files = [*basis.entry.graphs, *(graph for entry in there for graph in entry.graphs)]
    check_files(folder, value, [graph.path for graph in files])
    source = _source(target, basis)
    workspace = means.workspace
    with (
        means.gate.admit(estimate_bytes(weight_bytes_in(source)), stopping=means.stopping) as share,
        disk_errors(f"the folder {str(workspace.home)!r}"),
        scratch_folder(workspace.home, "verify") as scratch,
    ):
        job = Job(
            request=replace(basis.request, options=replace(basis.request.options, device=means.device)),
            workspace=workspace,
            revision=basis.entry.revision or "",
            key="",
            source=source,
            scratch=scratch,
            memory_bytes=share,
            weight_bytes=weight_bytes_in(source),
            stopping=means.stopping,
        )
        parity, notes = _compare(job, folder, basis, means.effort)
        before = next((c for c in reversed(target.checks) if c.device == parity.device), None)
        first = before or _parity_at_conversion(basis, parity.device)
        place = target.place
        error = None if parity.verdict is Verdict.VERIFIED else _error(target, basis, parity)
        if error is not None:
            failures = FailureFolders(workspace.home)
            request = replace(basis.request, options=replace(basis.request.options, device=Device(parity.device)))
            kept = failures.keep(request, error, revision=basis.entry.revision, cases=case_folder(job))
            # A device on which it never held says nothing of those on which it does.
            if first is not None or parity.device == "cpu":
                place = _quarantine(target, folder, value, parity, error, workspace=workspace)
            if kept is not None:
                notes += (f"{kept / 'reproduce.sh'} shows the difference again",)
                failures.point_to(kept, [(graph.role, file_in(place, graph.path)) for graph in basis.entry.graphs])
        _record(target, parity, workspace)
        variants = verify_variants(job, _at_hand(folder, basis), there, folder) if error is None and there else ()
        if fallen := [found for found in variants if found.verdict is not Verdict.VERIFIED]:
            error = error_of_variants(target, basis.entry.id, fallen, device=parity.device)
            # As of whole artifacts: a device on which one never held says nothing of those on which it does.
            if binding := [found for found in fallen if found.change is not Change.FIRST or parity.device == "cpu"]:
                withhold(target, folder, value, binding, workspace=workspace)
    return VerifyEntry(
        id=basis.entry.id,
        revision=basis.entry.revision,
        artifact=place,
        conversion=target.conversion_id,
        task=basis.entry.task,
        architecture=basis.entry.architecture,
        verdict=parity.verdict,
        change=_change(first, parity),
        parity=parity,
        before=first,
        variants=variants,
        notes=notes,
        error=error,
    )


def _parity_at_conversion(basis: Basis, device: str) -> ParityEntry | None:
    parity = basis.entry.parity
    return parity if parity is not None and parity.device == device else None


def _source(target: Target, basis: Basis) -> Path:
    """Return the folder of the model that an artifact was made of, at the same content.

    A folder is looked for where the catalog says that it is: the artifact has it as it was written, which may mean
    another one, or none, where this is called from.
    """
    entry = basis.entry
    model = entry.id
    if target.model is not None and target.model[1] == entry.revision:
        model = target.model[0]
    is_folder = hub.is_folder(model)
    if is_folder and not (folder := Path(model).expanduser()).is_dir() and not folder.is_absolute():
        raise InputError(
            f"The artifact was made of the folder {model!r}, which is not there as seen from {str(Path.cwd())!r}. Call "
            "`ferry verify` where the model was converted, or with the FERRY_HOME whose catalog knows it.",
            kind=ErrorKind.NOT_FOUND,
        )
    found = with_retries(hub.resolve)(model, revision=None if is_folder else entry.revision)
    if found.revision != entry.revision:
        raise InputError(
            f"The model {model!r} has another content now ({found.revision:.12}) than when it was converted "
            f"({entry.revision!s:.12}), so that there is nothing to compare with. Convert it again.",
            kind=ErrorKind.NOT_FOUND,
        )
    source: Path = with_retries(hub.download)(found, code=basis.request.options.trust_remote_code)
    return source


def _compare(job: Job, folder: Path, basis: Basis, effort: Effort) -> tuple[ParityEntry, tuple[str, ...]]:
    """Return the verdict on all graphs, one by one and together, and what was noted."""
    if basis.request.options.dtype != "float32":
        return _compare_halves(job, folder, basis), ()
    verdicts: list[tuple[str, ParityEntry]] = []
    notes: list[str] = []
    for graph in _at_hand(folder, basis):
        checked = check(job, graph.spec, graph.stored, effort=effort)
        verdicts.append((graph.spec.part, checked.entry))
        notes += checked.notes
    parity = verdict_on_all(verdicts)
    if len(basis.graphs) > 1 and parity.verdict is Verdict.VERIFIED:
        paths = {graph.role: str(folder / graph.path) for graph in basis.entry.graphs}
        together = compare_together(job, basis.spec, [graph.spec for graph in basis.graphs], paths)
        notes += together.notes
        if together.difference is not None:
            parity = parity.model_copy(update={"verdict": Verdict.MISMATCH, "detail": together.difference})
    return parity, tuple(dict.fromkeys(notes))


def _compare_halves(job: Job, folder: Path, basis: Basis) -> ParityEntry:
    """Return the verdict on graphs in half precision, as they were judged when they took the float32 ones' place."""
    variant = VariantEntry(variant=DTYPES[basis.request.options.dtype], graphs=basis.entry.graphs)
    (found,) = judge_again(job, _at_hand(folder, basis), [variant], folder, suffixed=False)
    before = basis.entry.parity
    if before is None:
        raise InputError(f"The {FERRY_FILE} in {str(folder)!r} has no verdict. Convert the model again.")
    return parity_of(found, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtHand:
    """A graph of an artifact."""

    spec: ModelSpec
    stored: Simplified


def _at_hand(folder: Path, basis: Basis) -> list[_AtHand]:
    """Return the graphs that are compared one by one.

    Raises:
        InputError: If the artifact does not list one of them.
    """
    stored: dict[str, GraphEntry] = {graph.role: graph for graph in basis.entry.graphs}
    found = []
    for graph in basis.graphs:
        entry = stored.get(graph.role)
        if entry is None:
            raise InputError(f"The artifact in {str(folder)!r} lists no graph {graph.role!r}. Convert the model again.")
        at_hand = Simplified(
            path=folder / entry.path, graph=entry, simplified=True, reason=None, cost=_NOTHING, limits=graph.limits
        )
        found.append(_AtHand(spec=graph.spec, stored=at_hand))
    return found


def _error(target: Target, basis: Basis, parity: ParityEntry) -> ErrorEntry:
    what = "cannot be verified, since the model is unstable" if parity.verdict is Verdict.UNSTABLE else "differs"
    return ErrorEntry(
        kind=ErrorKind.MISMATCH,
        message=f"The artifact of {basis.entry.id} {what}, on {parity.device}: {parity.detail}.",
        step=Step.PARITY,
        reproduce=f"ferry verify {quote(target.place)} --device {parity.device}",
    )


def _quarantine(
    target: Target, folder: Path, value: dict[str, Any], parity: ParityEntry, error: ErrorEntry, *, workspace: Workspace
) -> str:
    """Have nobody serve an artifact any more; return where it is."""
    model = {
        **value["model"],
        "status": "mismatch",
        "parity": parity.model_dump(mode="json"),
        "error": error.model_dump(mode="json"),
    }
    changed = finite({**value, "model": model})
    if target.sha256 is None:
        with disk_errors(f"the folder {str(folder)!r}"):
            write_ferry_value(folder, changed)
        return target.place
    place = store_of(workspace, target.place).quarantine(target.place, changed)
    record = db.ErrorRecord(**error.model_dump(mode="json"))
    with catalog_errors(), db.session_scope(catalog(workspace)) as session:
        db.quarantine_artifact(session, target.sha256, path=place, error=record)
    return place


def _record(target: Target, parity: ParityEntry, workspace: Workspace) -> None:
    if target.conversion_id is None:
        return
    record = parity_record(parity, at=datetime.now(UTC), environment=environment_now())
    with catalog_errors(), db.session_scope(catalog(workspace)) as session:
        db.record_parity(session, target.conversion_id, record)


def _change(before: ParityEntry | None, now: ParityEntry) -> Change:
    if before is None:
        return Change.FIRST
    grown = (now.max_abs_diff or 0.0) - (before.max_abs_diff or 0.0)
    return change_between(before.verdict, now.verdict, grown=grown, tolerance=now.tolerance)


def _failed(target: Target, basis: Basis | None, error: FerryError) -> VerifyEntry:
    entry = None if basis is None else basis.entry
    refused = error.kind is ErrorKind.RUNTIME_FAILED
    return VerifyEntry(
        id=target.name if entry is None else entry.id,
        revision=None if entry is None else entry.revision,
        artifact=target.place,
        conversion=target.conversion_id,
        task=None if entry is None else entry.task,
        architecture=target.architecture if entry is None else entry.architecture,
        verdict=Verdict.NOT_RUN,
        change=Change.NEWLY_FAILING if refused and target.checks else Change.NONE,
        parity=None,
        before=target.checks[-1] if target.checks else None,
        notes=(),
        error=ErrorEntry(
            kind=error.kind,
            message=error.message,
            step=Step.PARITY,
            reproduce=f"ferry verify {quote(target.place)}",
        ),
    )
