"""Detect a whole list: what is known is looked up, the rest shares a few children, and none can sink another.

A child takes many models one after the other, since its start and the imports of a model's code cost as much as a
detection. One that dies or hangs loses only the model it was at; that one, and each that failed in it by anything but
its class's own refusal, is tried again in a child of its own, whose word counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnx_config.errors import ErrorKind, FerryError, ModelError, error_of_kind
from onnx_config.export.detect_many import read_answers
from onnx_config.export.isolate import ChildError, Server
from onnx_config.spec import ModelSpec
from tasks.crew import Crew
from tasks.detect import DETECTION_SERVER, detect, key_of, known_detection, scratch_for_detection
from tasks.detection_cache import DetectionCache
from tasks.job import Job, raise_if_stopping
from tasks.lookup import unforeseen
from tasks.request import ConversionRequest, Workspace

__all__ = ["LONGEST_SECONDS", "Detection", "detect_many"]

LONGEST_SECONDS = 120.0
"""Wall time for the detection of one model of a list, at most; a conversion gives it `Workspace.timeout_seconds`."""

_SHARED_SECONDS = 20.0
_SLACK_SECONDS = 60.0
_MOST_AT_ONCE = 40
_END_SECONDS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What was found for a model of a list."""

    found: ModelSpec | FerryError
    """Its spec, or why there is none."""

    key: str | None
    """Under which it is kept; ``None`` where the config could not be read."""

    seconds: float
    """Wall time that the child spent on it; 0 where it was known, or where another model has the same config."""

    cached: bool
    """Whether it was found by an earlier run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A model to detect."""

    request: ConversionRequest
    source: Path
    key: str | None
    model_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """What detections work with."""

    workspace: Workspace
    server: Server
    scratch: Path
    told: Callable[[int], None]
    stopping: threading.Event = field(default_factory=threading.Event)


def detect_many(
    sources: Mapping[ConversionRequest, Path],
    workspace: Workspace,
    *,
    workers: int,
    server: Server = DETECTION_SERVER,
    told: Callable[[int], None] = lambda _: None,
) -> dict[ConversionRequest, Detection]:
    """Detect every model; models with the same config and options are detected once.

    Args:
        sources: Folders with the configs.
        workspace: Where things are kept; the memory is shared among the workers.
        workers: Children at a time.
        server: Whose children detect.
        told: Is called with the number of models that were settled, whenever some were; from several threads.

    Raises:
        KeyboardInterrupt: If the user interrupts; no child is left.
    """
    done: dict[ConversionRequest, Detection] = {}
    todo: dict[str, list[_Item]] = {}
    for request, source in sources.items():
        found = _look_up(request, source, workspace)
        if isinstance(found, Detection):
            done[request] = found
        else:
            # Without a key, no other model is known to be the same.
            todo.setdefault(found.key or f"{source} {request}", []).append(found)
    told(len(done))
    if todo:
        # Children of one model type import its code once.
        leaders = sorted((items[0] for items in todo.values()), key=lambda item: item.model_type)
        answers = _detect_all(leaders, workspace, workers=workers, server=server, told=told)
        for same in todo.values():
            first = answers[same[0].request]
            for item in same:
                done[item.request] = first if item is same[0] else _shared(first, same[0].source, item.source)
            told(len(same) - 1)
    return {request: done[request] for request in sources}


def _shared(first: Detection, source: Path, own: Path) -> Detection:
    """Return the detection of one model as that of another with the same config, in another folder."""
    found = first.found
    if isinstance(found, FerryError):
        found = error_of_kind(found.kind, found.message.replace(str(source), str(own)))
    return replace(first, found=found, seconds=0.0)


def _look_up(request: ConversionRequest, source: Path, workspace: Workspace) -> Detection | _Item:
    try:
        key = key_of(source, request.options)
    except FerryError as error:
        return Detection(found=error, key=None, seconds=0.0, cached=False)
    try:
        known = known_detection(key, source, workspace)
    except FerryError as error:
        return Detection(found=error, key=key, seconds=0.0, cached=True)
    if known is not None:
        return Detection(found=known, key=key, seconds=0.0, cached=True)
    return _Item(request=request, source=source, key=key, model_type=_model_type(source))


def _model_type(source: Path) -> str:
    from onnx_config.config_file import read_config_dict

    try:
        return str(read_config_dict(source).get("model_type"))
    except (FerryError, OSError, ValueError, RecursionError):
        return ""


def _detect_all(
    items: Sequence[_Item], workspace: Workspace, *, workers: int, server: Server, told: Callable[[int], None]
) -> dict[ConversionRequest, Detection]:
    server.warm_up()
    share = replace(workspace, memory_limit_bytes=max(1, workspace.memory_limit_bytes // workers))
    with scratch_for_detection(workspace) as scratch:
        means = _Means(workspace=share, server=server, scratch=scratch, told=told)
        chunks = list(enumerate(_chunks(items, workers)))
        crew: Crew[tuple[int, Sequence[_Item]], dict[ConversionRequest, Detection]] = Crew(
            lambda chunk: _detect_chunk(chunk[1], means, number=chunk[0]), chunks, workers=workers
        )
        answers: dict[ConversionRequest, Detection] = {}
        try:
            for _, some in crew.results():
                answers |= some
        except BaseException:
            means.stopping.set()
            crew.dismiss(seconds=_END_SECONDS, meanwhile=server.kill_all)
            raise
    return answers


def _chunks(items: Sequence[_Item], workers: int) -> Iterator[Sequence[_Item]]:
    """Cut a list into parts that get smaller towards its end, so that all workers end at about the same time."""
    at = 0
    while at < len(items):
        size = max(1, min(_MOST_AT_ONCE, (len(items) - at) // (2 * workers)))
        yield items[at : at + size]
        at += size


def _detect_chunk(items: Sequence[_Item], means: _Means, *, number: int) -> dict[ConversionRequest, Detection]:
    answers: dict[ConversionRequest, Detection] = {}
    # Code of one model's own must not meet the detection of another's.
    alone: list[_Item] = [item for item in items if item.key is None or item.request.options.trust_remote_code]
    rest = [item for item in items if item not in alone]
    rounds = 0
    while rest:
        found = _share_a_child(rest, means, folder=means.scratch / f"{number}-{rounds}")
        rounds += 1
        for item, detection in zip(rest, found, strict=False):
            if detection is None:
                alone.append(item)
            else:
                answers[item.request] = detection
        # The one that the child was at when it ended, if it ended early.
        alone += rest[len(found) : len(found) + 1]
        rest = rest[len(found) + 1 :]
    for at, item in enumerate(alone):
        answers[item.request] = _detect_alone(item, means, folder=means.scratch / f"{number}-alone-{at}")
    return answers


def _share_a_child(items: Sequence[_Item], means: _Means, *, folder: Path) -> list[Detection | None]:
    """Return what a child found, item by item up to the one it ended at; ``None`` for one to be tried alone."""
    raise_if_stopping(means.stopping)
    folder.mkdir()
    path = folder / "answers.jsonl"
    request = {"items": [_as_request(item) for item in items], "answers": str(path), "seconds": _SHARED_SECONDS}
    try:
        means.server.run(
            "onnx_config.export.detect_many:detect_many",
            request,
            folder=folder,
            timeout_seconds=_SHARED_SECONDS * len(items) + _SLACK_SECONDS,
            memory_limit_bytes=means.workspace.memory_limit_bytes,
            threads=means.workspace.threads,
            name=f"detection of {len(items)} models",
        )
    # What it says is about the child; the model that ended it will say it again, alone.
    except (FerryError, ChildError):
        raise_if_stopping(means.stopping)
    cache = DetectionCache(means.workspace.detections)
    found: list[Detection | None] = []
    # One answer less than there are lines at most, and none for what came after the end.
    for item, answer in zip(items, read_answers(path), strict=False):
        result: ModelSpec | FerryError
        if answer["spec"] is not None:
            result = ModelSpec.from_json(answer["spec"])
        elif answer["refusal"] is not None:
            result = ModelError(answer["refusal"], kind=ErrorKind.UNSUPPORTED)
        else:
            found.append(None)
            continue
        # A config that was changed meanwhile is not the one that was looked up.
        if item.key is None or item.key != _key_again(item):
            found.append(None)
            continue
        cache.write(item.key, result, folder=item.source, scratch=folder)
        found.append(Detection(found=result, key=item.key, seconds=answer["seconds"], cached=False))
    means.told(sum(detection is not None for detection in found))
    return found


def _key_again(item: _Item) -> str | None:
    try:
        return key_of(item.source, item.request.options)
    except FerryError:
        return None


def _as_request(item: _Item) -> dict[str, object]:
    options = item.request.options
    return {"folder": str(item.source), "task": options.task, "trust_remote_code": options.trust_remote_code}


def _detect_alone(item: _Item, means: _Means, *, folder: Path) -> Detection:
    raise_if_stopping(means.stopping)
    folder.mkdir()
    workspace = replace(means.workspace, timeout_seconds=min(means.workspace.timeout_seconds, LONGEST_SECONDS))
    job = Job(
        request=item.request,
        workspace=workspace,
        revision="",
        key="",
        source=item.source,
        scratch=folder,
        memory_bytes=workspace.memory_limit_bytes,
        weight_bytes=0,
        stopping=means.stopping,
    )
    started = time.monotonic()
    found: ModelSpec | FerryError
    try:
        found = detect(job, server=means.server)[0]
    except FerryError as error:
        raise_if_stopping(means.stopping)
        found = error
    # One model that nobody foresaw must not end the look at all the others.
    except Exception as error:  # noqa: BLE001
        raise_if_stopping(means.stopping)
        found = unforeseen(error)
    means.told(1)
    return Detection(found=found, key=item.key, seconds=time.monotonic() - started, cached=False)
