"""One model in work: what every step is given."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, FerryError, InternalError, ModelError, ResourceError
from onnx_config.export import isolate
from tasks.report import Step
from tasks.request import ConversionRequest, Device, Workspace

if TYPE_CHECKING:
    from tasks.lease import Lease

__all__ = ["Job", "StepCost", "raise_if_stopping", "reproduce_command", "run_child"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model with its files at hand, and what it may use."""

    request: ConversionRequest
    """What was asked for."""

    workspace: Workspace
    """Where things are kept."""

    revision: str
    """Commit or content hash."""

    key: str
    """Action key."""

    source: Path
    """Folder with config and weights."""

    scratch: Path
    """Folder of this job alone, on the store's file system, removed when the job ends."""

    memory_bytes: int
    """Resident bytes that a child may use."""

    weight_bytes: int
    """Bytes of the weights; 0 where they could not be read."""

    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the user interrupts: no child is started any more."""

    lease: Lease | None = None
    """What keeps other workers from the model; ``None``: nothing is stored, so nobody need be kept from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What a step's child used."""

    seconds: float
    """Wall time, start of the child included."""

    peak_rss_bytes: int
    """Largest resident size."""


def run_child(
    job: Job,
    step: Step,
    function: str,
    request: Mapping[str, Any],
    *,
    architecture: str | None = None,
    server: isolate.Server | None = None,
) -> tuple[dict[str, Any], StepCost]:
    """Run a function of ``onnx_config.export.steps``, or ``"package.module:function"``, in a child.

    Returns its answer and cost. The child is one of ``server``; ``None``: of the one that all steps share.
    ``architecture`` is the model's class, where it was detected and will be used: the server imports it for all.

    Raises:
        FerryError: What the function raised, or how the child ended.
        LeaseLostError: If another worker has the model by now.
        KeyboardInterrupt: If the user interrupted; how the child ended says nothing of the model then.
    """
    raise_if_stopping(job.stopping)
    if job.lease is not None:
        job.lease.check()
    folder = job.scratch / step.value
    folder.mkdir(exist_ok=True)
    try:
        answer = (isolate.run if server is None else server.run)(
            function if ":" in function else f"onnx_config.export.steps:{function}",
            request,
            folder=folder,
            timeout_seconds=job.workspace.timeout_seconds,
            memory_limit_bytes=job.memory_bytes,
            threads=job.workspace.threads,
            imports=() if architecture is None else (f"transformers:{architecture}",),
            name=f"{step.value} of {job.request.model_id}",
        )
    except isolate.ChildError as error:
        raise _judge(step, error) from error
    except ResourceError:
        raise_if_stopping(job.stopping)
        raise
    return answer.value, StepCost(seconds=answer.seconds, peak_rss_bytes=answer.peak_rss_bytes)


def raise_if_stopping(stopping: threading.Event) -> None:
    """End this model's work where the user has interrupted the batch.

    Raises:
        KeyboardInterrupt: If ``stopping`` is set.
    """
    if stopping.is_set():
        raise KeyboardInterrupt


def _judge(step: Step, error: isolate.ChildError) -> FerryError:
    """Return what an exception that nobody foresaw means at a step."""
    last = re.sub(r"\s+", " ", error.message)[:500]
    text = f"The step {step.value} ended with {error.type_name}: {last}"
    match step:
        case Step.EXPORT:
            return ModelError(text, kind=ErrorKind.EXPORT_FAILED)
        case Step.DETECT:
            return ModelError(text, kind=ErrorKind.UNSUPPORTED)
        case Step.SIMPLIFY | Step.PARITY:
            return ModelError(text, kind=ErrorKind.RUNTIME_FAILED)
        case Step.FETCH | Step.REGISTER:
            return InternalError(text)


def reproduce_command(request: ConversionRequest, *, output: Path | None = None) -> str:
    """Return the shell command that converts this model with these options, and places it in ``output``.

    >>> reproduce_command(ConversionRequest(model_id="org/name"))
    'ferry convert org/name'
    """
    options = request.options
    words = ["ferry", "convert", request.model_id]
    if request.revision is not None:
        words += ["--revision", request.revision]
    if options.task is not None:
        words += ["--task", options.task]
    if options.device is not Device.AUTO:
        words += ["--device", options.device.value]
    if options.opset is not None:
        words += ["--opset", str(options.opset)]
    if options.dtype != "float32":
        words += ["--dtype", options.dtype]
    if not options.simplify:
        words.append("--no-simplify")
    if options.weights != "copy":
        words += ["--weights", options.weights]
    for variant in options.variants:
        words += ["--variant", variant.value]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if output is not None:
        words += ["--output", str(output)]
    return shlex.join(words)
