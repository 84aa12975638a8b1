"""Export: from a model to a traced graph in the job's scratch folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_config.spec import ModelSpec
from tasks.job import Job, StepCost, run_child
from tasks.report import Step

__all__ = ["Exported", "export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A traced graph."""

    path: Path
    """The plain graph."""

    notes: tuple[str, ...]
    """Axes that had to be fixed, outputs that were declared in vain."""

    cost: StepCost
    """What tracing used."""


def export(job: Job, spec: ModelSpec, *, fixed: Sequence[str] = ()) -> Exported:
    """Trace the model as ``spec`` says, with the axes ``fixed`` at the sample's size.

    Raises:
        InputError: If the weights are missing, truncated, incomplete or not finite.
        ModelError: If the model cannot be traced.
        ResourceError: If the child ran out of time or memory, or died.
    """
    path = job.scratch / "traced.onnx"
    answer, cost = run_child(
        job,
        Step.EXPORT,
        "export",
        {
            "folder": str(job.source),
            "spec": spec.to_json(),
            "dtype": job.request.options.dtype,
            "opset": job.request.options.opset,
            "fixed": list(fixed),
            "output": str(path),
        },
    )
    return Exported(path=path, notes=tuple(answer["notes"]), cost=cost)
