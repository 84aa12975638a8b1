"""A plan: what a batch would do with a list, told from configs before any weights are downloaded.

Every model is detected and its needs are estimated; what will fail is said with the error that a conversion would end
in. A rehearsal also converts the twin of each model, small and with random weights: what fails there would have failed
after the download.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from onnx_config import hub
from onnx_config.config_file import read_config_dict
from onnx_config.errors import FerryError, InputError, TransientError
from onnx_config.export import isolate
from onnx_config.sentence_modules import MODULES_FILE, module_folders
from onnx_config.spec import ModelSpec
from tasks.crew import Crew
from tasks.detect import DETECTION_SERVER, scratch_for_detection
from tasks.detect_many import Detection, detect_many
from tasks.estimate import Estimate, estimate
from tasks.job import Job, raise_if_stopping, reproduce_command, run_child
from tasks.lookup import unforeseen
from tasks.memory import MemoryGate
from tasks.report import ErrorEntry, ModelEntry, ParityEntry, Status, Step, TensorEntry
from tasks.request import ConversionOptions, ConversionRequest, Device, Workspace
from tasks.retry import with_retries

__all__ = ["Outlook", "Plan", "PlanTotals", "PlannedModel", "Rehearsal", "plan_models"]

_LOOKUPS = 8
_END_SECONDS = 8.0
# Weights in formats that are not read.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite", ".mlmodel")
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class Outlook(StrEnum):
    """What is to be expected of a conversion."""

    WORKS = "works"
    FAILS = "fails"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rehearsal(_Value):
    """How the conversion of a model's twin ended."""

    status: Status
    """``converted`` where the twin's graph was compared and held."""
    parity: ParityEntry | None
    seconds: float
    """Wall time of all steps."""
    notes: tuple[str, ...] = ()


class PlannedModel(_Value):
    """One model of a plan. Figures are estimates; those of a model that fails before them are ``None``."""

    id: str
    """As written in the manifest."""
    revision: str | None
    """As asked for; ``None``: the newest."""
    outlook: Outlook
    task: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    inputs: tuple[TensorEntry, ...] = ()
    parameters: int | None = None
    weight_bytes: int | None = None
    """Of the weights in the graph, in the element type asked for."""
    download_bytes: int | None = None
    """Of the safetensors that would be fetched; ``None`` where nothing is, or the repository does not tell."""
    peak_memory_bytes: int | None = None
    """Resident, of this conversion alone."""
    disk_bytes: int | None = None
    """Of the artifact; a conversion needs twice the weights more while it runs."""
    seconds: float | None = None
    """Wall time on a quiet machine."""
    detect_seconds: float = 0.0
    """Wall time that detection took in its child; 0 where the answer was known."""
    notes: tuple[str, ...] = ()
    """What a reader should know before the batch runs."""
    rehearsal: Rehearsal | None = None
    """``None`` where none was asked for, or the model fails before it."""
    error: ErrorEntry | None = None
    """What the conversion would end in."""


class PlanTotals(_Value):
    """Sums over a plan; of the figures, those of the models that work."""

    works: int
    fails: int
    parameters: int
    weight_bytes: int
    download_bytes: int
    peak_memory_bytes: int
    """Of the model that needs most."""
    disk_bytes: int
    seconds: float
    """Of all conversions one after the other."""


class Plan(_Value):
    """What a batch would do."""

    schema_: int = Field(default=1, alias="schema")
    started_at: datetime
    seconds: float
    """Wall time of planning."""
    rehearsed: bool
    totals: PlanTotals
    models: tuple[PlannedModel, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def all_work(self) -> bool:
        """Whether no model is expected to fail."""
        return self.totals.fails == 0

    def to_json(self) -> str:
        """Return the plan as one JSON document."""
        return self.model_dump_json(by_alias=True, indent=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A model's small files, and what it would download."""

    source: Path
    """Folder with the config."""

    files: Mapping[str, int] | None
    """Files and their bytes; ``None`` where the Hub does not tell."""

    remote: bool
    """Whether its weights are yet to be downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rehearsing:
    """What rehearsals work with."""

    workspace: Workspace
    scratch: Path
    gate: MemoryGate
    stopping: threading.Event = field(default_factory=threading.Event)


def plan_models(
    requests: Sequence[ConversionRequest],
    workspace: Workspace,
    *,
    workers: int,
    rehearse: bool = False,
    told: Callable[[str, int, int], None] = lambda *_: None,
) -> Plan:
    """Return what converting ``requests`` would need and come to, in their order.

    Of a repository only its config is fetched; nothing is stored and nothing recorded. Never raises for what is wrong
    with a model.

    Args:
        requests: The models.
        workspace: Where things are kept, and the limits.
        workers: Models in work at a time.
        rehearse: Whether the twins are converted.
        told: Is called with what is being done, how many models are through with it, and of how many; from several
            threads.

    Raises:
        KeyboardInterrupt: If the user interrupts; no child is left.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    wanted = list(dict.fromkeys(requests))
    looked_up = _look_up(wanted, _counter(told, "looked up", len(wanted)))
    found = {request: answer for request, answer in looked_up.items() if isinstance(answer, _Found)}
    if found:
        # The imports take longer than to find out that all of it is known, and are needed only where it is not.
        detections = detect_many(
            {request: answer.source for request, answer in found.items()},
            workspace,
            workers=workers,
            told=_counter(told, "detected", len(found)),
        )
    else:
        detections = {}
    refusals = _refusals({request.options for request in found}, workspace)
    planned: dict[ConversionRequest, PlannedModel] = {}
    for request in wanted:
        answer = looked_up[request]
        if isinstance(answer, FerryError):
            planned[request] = _failing(request, answer, Step.FETCH)
        else:
            planned[request] = _planned(request, answer, detections[request], refusals[request.options], workspace)
    if rehearse:
        twins = [request for request in wanted if planned[request].outlook is Outlook.WORKS]
        keys = {request: detections[request].key for request in twins}
        rehearsed = _rehearse_all(keys, found, workspace, workers=workers, told=_counter(told, "rehearsed", len(twins)))
        for request, entry in rehearsed.items():
            planned[request] = _with_rehearsal(planned[request], request, entry)
    models = tuple(planned[request] for request in requests)
    return Plan(
        started_at=started_at,
        seconds=round(time.monotonic() - start, 3),
        rehearsed=rehearse,
        totals=_totals(models),
        models=models,
    )


def _counter(told: Callable[[str, int, int], None], what: str, total: int) -> Callable[[int], None]:
    """Return a function that adds up what it is told and passes on the sum."""
    lock, done = threading.Lock(), 0

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            told(what, done, total)

    return count


def _look_up(
    requests: Sequence[ConversionRequest], told: Callable[[int], None]
) -> dict[ConversionRequest, _Found | FerryError]:
    def look(request: ConversionRequest) -> _Found | FerryError:
        try:
            found: _Found = _find(request)
        except FerryError as error:
            return error
        # One model that nobody foresaw must not end the look at all the others.
        except Exception as error:  # noqa: BLE001
            return unforeseen(error)
        return found

    answers: dict[ConversionRequest, _Found | FerryError] = {}
    # The Hub takes its time to answer.
    for request, answer in Crew(look, requests, workers=_LOOKUPS).results():
        answers[request] = answer
        told(1)
    return answers


@with_retries
def _find(request: ConversionRequest) -> _Found:
    try:
        code = request.options.trust_remote_code
        return _Found(
            source=hub.fetch_config(request.model_id, revision=request.revision, code=code),
            files=_files(request),
            remote=not hub.is_folder(request.model_id),
        )
    # The second is what pathlib raises where nobody has the home folder that a "~" stands for.
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The model {request.model_id!r} cannot be read: {error}. Check the name and the permissions."
        ) from error


def _files(request: ConversionRequest) -> dict[str, int] | None:
    try:
        return hub.list_files(request.model_id, revision=request.revision)
    except TransientError:
        # A config that came from the Hub's cache is enough for a plan.
        return None


def _refusals(
    options: Iterable[ConversionOptions], workspace: Workspace
) -> dict[ConversionOptions, tuple[FerryError, Step] | None]:
    """Return the options with which no model can be converted here, and why."""
    checked: dict[tuple[str, int | None, Device], tuple[FerryError, Step] | None] = {}
    found = {}
    for option in options:
        # A GPU that is taken where there is one, and every other default, is refused nowhere.
        device = Device.AUTO if option.device is Device.CPU else option.device
        asked = (option.dtype, option.opset, device)
        if asked not in checked:
            plain = asked == ("float32", None, Device.AUTO)
            checked[asked] = None if plain else _check_options(option, workspace)
        found[option] = checked[asked]
    return found


def _check_options(options: ConversionOptions, workspace: Workspace) -> tuple[FerryError, Step] | None:
    request = ConversionRequest(model_id="the options", options=options)
    try:
        with scratch_for_detection(workspace) as scratch:
            job = _job(request, workspace, source=scratch, scratch=scratch)
            asked = {"dtype": options.dtype, "opset": options.opset, "device": options.device.value}
            run_child(job, Step.EXPORT, "check_options", asked, server=DETECTION_SERVER)
    except FerryError as error:
        return error, Step.PARITY if "device" in error.message else Step.EXPORT
    return None


def _job(
    request: ConversionRequest,
    workspace: Workspace,
    *,
    source: Path,
    scratch: Path,
    stopping: threading.Event | None = None,
) -> Job:
    return Job(
        request=request,
        workspace=workspace,
        revision="",
        key="",
        source=source,
        scratch=scratch,
        memory_bytes=workspace.memory_limit_bytes,
        weight_bytes=0,
        stopping=stopping or threading.Event(),
    )


def _failing(request: ConversionRequest, error: FerryError, step: Step) -> PlannedModel:
    return PlannedModel(
        id=request.model_id, revision=request.revision, outlook=Outlook.FAILS, error=_entry_of(request, error, step)
    )


def _entry_of(request: ConversionRequest, error: FerryError, step: Step) -> ErrorEntry:
    return ErrorEntry(kind=error.kind, message=error.message, step=step, reproduce=reproduce_command(request))


def _planned(
    request: ConversionRequest,
    found: _Found,
    detection: Detection,
    refusal: tuple[FerryError, Step] | None,
    workspace: Workspace,
) -> PlannedModel:
    spec = detection.found
    if isinstance(spec, FerryError):
        failing = _failing(request, spec, Step.DETECT)
        return failing.model_copy(update={"detect_seconds": round(detection.seconds, 3)})
    weights = _weights(request, found)
    problem = refusal
    if problem is None and isinstance(weights, FerryError):
        problem = weights, Step.EXPORT
    needed = _needed(request, spec, found)
    notes = [*spec.assumed]
    if weights is None:
        notes.append("no weights lie beside the config, so nothing is said of them")
    if needed is not None and needed.peak_memory_bytes > workspace.memory_limit_bytes:
        notes.append(
            "needs more memory than FERRY_MEMORY_LIMIT allows by its estimate: it will run alone, and may end out of it"
        )
    return PlannedModel(
        id=request.model_id,
        revision=request.revision,
        outlook=Outlook.FAILS if problem else Outlook.WORKS,
        task=spec.task,
        model_type=spec.model_type,
        architecture=spec.architecture,
        inputs=tuple(TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape) for t in spec.inputs),
        parameters=spec.parameters,
        weight_bytes=needed and needed.weight_bytes,
        download_bytes=weights if found.remote and isinstance(weights, int) else None,
        peak_memory_bytes=needed and needed.peak_memory_bytes,
        disk_bytes=needed and needed.disk_bytes,
        seconds=needed and needed.seconds,
        detect_seconds=round(detection.seconds, 3),
        notes=tuple(dict.fromkeys(notes)),
        error=problem and _entry_of(request, *problem),
    )


def _weights(request: ConversionRequest, found: _Found) -> int | FerryError | None:
    """Return the bytes of the safetensors; ``None``: not known, or a config alone; an error: only other formats."""
    if found.files is None:
        return None
    folders = {"", *(module_folders(found.source) if MODULES_FILE in found.files else ())}
    near = {name: size for name, size in found.files.items() if name.rpartition("/")[0] in folders}
    if taken := [size for name, size in near.items() if name.endswith(".safetensors")]:
        return sum(taken)
    others = sorted(name for name in near if name.endswith(_OTHER_WEIGHTS))
    if not others and not found.remote:
        return None
    what = f"in other formats alone ({', '.join(others[:3])})" if others else "not at all"
    return InputError(
        f"{request.model_id!r} has its weights {what}; only safetensors are read. Save the model with save_pretrained, "
        "or choose a revision that has safetensors."
    )


def _needed(request: ConversionRequest, spec: ModelSpec, found: _Found) -> Estimate | None:
    if spec.parameters is None:
        return None
    side = None
    if found.files is not None and any(name.endswith(".safetensors") for name in found.files):
        side = sum(size for name, size in found.files.items() if "/" not in name and name.endswith(_SIDE_FILES))
    return estimate(spec.parameters, read_config_dict(found.source), dtype=request.options.dtype, side_bytes=side)


def _rehearse_all(
    keys: Mapping[ConversionRequest, str | None],
    found: Mapping[ConversionRequest, _Found],
    workspace: Workspace,
    *,
    workers: int,
    told: Callable[[int], None],
) -> dict[ConversionRequest, ModelEntry | FerryError]:
    """Convert the twin of each model; models of one config and the same options have the same twin."""
    groups: dict[tuple[str | None, ConversionOptions], list[ConversionRequest]] = {}
    for request, key in keys.items():
        groups.setdefault((key, request.options), []).append(request)
    if not groups:
        return {}
    isolate.warm_up()
    firsts = list(enumerate(group[0] for group in groups.values()))
    with scratch_for_detection(workspace) as scratch:
        means = _Rehearsing(
            workspace=workspace, scratch=scratch, gate=MemoryGate(workspace.memory_limit_bytes, workers=workers)
        )
        crew: Crew[tuple[int, ConversionRequest], ModelEntry | FerryError] = Crew(
            lambda item: _rehearse(item[1], found[item[1]].source, means, number=item[0]), firsts, workers=workers
        )
        answers: dict[ConversionRequest, ModelEntry | FerryError] = {}
        try:
            for (_, first), entry in crew.results():
                same = groups[keys[first], first.options]
                answers |= dict.fromkeys(same, entry)
                told(len(same))
        except BaseException:
            means.stopping.set()
            crew.dismiss(seconds=_END_SECONDS, meanwhile=isolate.kill_all)
            raise
    return answers


def _rehearse(request: ConversionRequest, source: Path, means: _Rehearsing, *, number: int) -> ModelEntry | FerryError:
    """Return how the conversion of the twin ended, or why there is no twin."""
    # Brings the catalog's libraries along, which nothing else here needs.
    from tasks.pipeline import rehearse_model

    folder = means.scratch / f"twin-{number}"
    folder.mkdir()
    try:
        job = _job(request, means.workspace, source=source, scratch=folder, stopping=means.stopping)
        asked = {
            "folder": str(source),
            "output": str(folder / "model"),
            "task": request.options.task,
            "trust_remote_code": request.options.trust_remote_code,
        }
        run_child(job, Step.EXPORT, "onnx_config.export.twin_folder:write_twin", asked)
        return rehearse_model(request, means.workspace, folder / "model", gate=means.gate, stopping=means.stopping)
    except FerryError as error:
        raise_if_stopping(means.stopping)
        return error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_rehearsal(planned: PlannedModel, request: ConversionRequest, entry: ModelEntry | FerryError) -> PlannedModel:
    """Return what was planned with what the twin showed; where the twin failed, the model is expected to."""
    if isinstance(entry, FerryError):
        # No twin says nothing of the model.
        note = f"could not be rehearsed: {entry.message}"
        return planned.model_copy(update={"notes": (*planned.notes, note)})
    rehearsal = Rehearsal(
        status=entry.status, parity=entry.parity, seconds=round(sum(entry.seconds.values()), 3), notes=entry.notes
    )
    error = entry.error and entry.error.model_copy(
        update={
            "message": f"Its small twin with random weights fails: {entry.error.message}",
            "reproduce": reproduce_command(request),
        }
    )
    outlook = Outlook.FAILS if error else Outlook.WORKS
    return planned.model_copy(update={"rehearsal": rehearsal, "error": error, "outlook": outlook})


def _totals(models: Sequence[PlannedModel]) -> PlanTotals:
    working = [model for model in models if model.outlook is Outlook.WORKS]
    return PlanTotals(
        works=len(working),
        fails=len(models) - len(working),
        parameters=sum(model.parameters or 0 for model in working),
        weight_bytes=sum(model.weight_bytes or 0 for model in working),
        download_bytes=sum(model.download_bytes or 0 for model in working),
        peak_memory_bytes=max((model.peak_memory_bytes or 0 for model in working), default=0),
        disk_bytes=sum(model.disk_bytes or 0 for model in working),
        seconds=round(sum(model.seconds or 0.0 for model in working), 1),
    )
