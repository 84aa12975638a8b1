"""Detect: what a model takes and gives, from its config alone."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onnx_config.cache_layout import with_past
from onnx_config.errors import FerryError
from onnx_config.export.isolate import DETECTION_PRELOAD, Server
from onnx_config.export.scratch import scratch_folder
from onnx_config.hub import fetch_config
from onnx_config.spec import ModelSpec
from onnx_config.task_detector import normalize_task
from tasks.detection_cache import DetectionCache, detection_key, detection_parts, is_kept
from tasks.job import Job, StepCost, raise_if_stopping, run_child
from tasks.report import Step
from tasks.request import ConversionOptions, ConversionRequest, Workspace

__all__ = ["DETECTION_SERVER", "detect", "detect_model", "key_of", "known_detection", "scratch_for_detection"]

DETECTION_SERVER = Server(preload=DETECTION_PRELOAD)
"""Whose children only detect: started where there is no conversion to share a server with, and only when needed."""


_LOOK_SECONDS = 0.2
_turns: dict[str, threading.Lock] = {}
_turns_lock = threading.Lock()


def detect(job: Job, *, server: Server | None = None) -> tuple[ModelSpec, StepCost]:
    """Return the spec of the job's model: as found before for the same content and versions, else by a child.

    Args:
        job: The model.
        server: Whose child detects; ``None``: that of all steps of conversions.

    Raises:
        InputError: If the config cannot be read or the task is not possible.
        ModelError: If transformers has no class for it, or the class cannot be built.
        ResourceError: If the child ran out of time or memory, or died.
    """
    started = time.monotonic()
    options = job.request.options
    key = key_of(job.source, options)
    if (known := known_detection(key, job.source, job.workspace)) is not None:
        return known, StepCost(seconds=time.monotonic() - started, peak_rss_bytes=0)
    with _turn(key, job.stopping):
        # Of many models with one config the first to come detects, and the others wait for what it finds.
        if (known := known_detection(key, job.source, job.workspace)) is not None:
            return known, StepCost(seconds=time.monotonic() - started, peak_rss_bytes=0)
        return _detect(job, key, server)


def _detect(job: Job, key: str | None, server: Server | None) -> tuple[ModelSpec, StepCost]:
    options = job.request.options
    cache = DetectionCache(job.workspace.detections)
    request = {"folder": str(job.source), "task": options.task, "trust_remote_code": options.trust_remote_code}
    try:
        answer, cost = run_child(job, Step.DETECT, "detect", request, server=server)
    except FerryError as error:
        if key is not None and is_kept(error) and key == key_of(job.source, options):
            cache.write(key, error, folder=job.source, scratch=job.scratch)
        raise
    spec = ModelSpec.from_json(answer)
    # A config that was changed meanwhile is not the one that was looked up.
    if key is not None and key == key_of(job.source, options):
        cache.write(key, spec, folder=job.source, scratch=job.scratch)
    return spec, cost


@contextmanager
def _turn(key: str | None, stopping: threading.Event) -> Iterator[None]:
    """Hold the right to detect ``key`` in this process; ``None``: at once.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set meanwhile.
    """
    if key is None:
        yield
        return
    with _turns_lock:
        lock = _turns.setdefault(key, threading.Lock())
    raise_if_stopping(stopping)
    while not lock.acquire(timeout=_LOOK_SECONDS):
        raise_if_stopping(stopping)
    try:
        yield
    finally:
        lock.release()
        with _turns_lock:
            _turns.pop(key, None)


def key_of(source: Path, options: ConversionOptions) -> str | None:
    """Return the key of a detection; ``None`` where the folder cannot be read so far, which a child may tell better.

    Raises:
        InputError: If the config is not there, or no config.
    """
    try:
        parts = detection_parts(source, task=options.task, trust_remote_code=options.trust_remote_code)
        return detection_key(parts)
    except (OSError, ValueError, RecursionError):
        return None


def known_detection(key: str | None, source: Path, workspace: Workspace) -> ModelSpec | None:
    """Return what was found before; ``None`` if nothing was.

    Raises:
        FerryError: What it ended in.
    """
    found = None if key is None else DetectionCache(workspace.detections).read(key, folder=source)
    if isinstance(found, FerryError):
        raise found
    return found


def detect_model(request: ConversionRequest, workspace: Workspace) -> ModelSpec:
    """Return the spec of a model that is not being converted; of a repository only ``config.json`` is fetched.

    Its cache is told beside inputs and outputs; where the task ends in ``-with-past``, it is among them.

    Writes nothing but a temporary folder, and the answer where answers are kept.

    Raises:
        FerryError: As `detect`, and what reading from the Hub raises.
    """
    code = request.options.trust_remote_code
    source = fetch_config(request.model_id, revision=request.revision, code=code)
    known = known_detection(key_of(source, request.options), source, workspace)
    if known is not None:
        return _as_asked(known, request.options)
    with scratch_for_detection(workspace) as scratch:
        job = Job(
            request=request,
            workspace=workspace,
            revision="",
            key="",
            source=source,
            scratch=scratch,
            memory_bytes=workspace.memory_limit_bytes,
            weight_bytes=0,
        )
        return _as_asked(detect(job, server=DETECTION_SERVER)[0], request.options)


def _as_asked(spec: ModelSpec, options: ConversionOptions) -> ModelSpec:
    """Return the spec with its cache among inputs and outputs, where the task asks for that."""
    return with_past(spec) if options.task is not None and normalize_task(options.task)[1] else spec


@contextmanager
def scratch_for_detection(workspace: Workspace) -> Iterator[Path]:
    """Make a temporary folder: beside the kept answers, or elsewhere where nothing can be written there."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(workspace.home, "detect"))
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferry-detect-")))
        yield folder
