"""Parity: the stored graph against the unmodified model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx_config.export.shapes import Float64
from onnx_config.spec import ModelSpec
from tasks.job import Job, StepCost, run_child
from tasks.memory import estimate_bytes
from tasks.report import OutputDifference, ParityCellEntry, ParityEntry, Step, Verdict
from tasks.simplify import Simplified

__all__ = ["USUAL", "Checked", "Effort", "case_folder", "check"]

_LARGE_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A verdict and what it cost."""

    entry: ParityEntry
    """For the report."""

    notes: tuple[str, ...]
    """What was compared beside, and shapes that the model itself refuses."""

    cost: StepCost
    """What the comparison used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is compared."""

    levels: tuple[str, ...] = ("all",)
    """ONNX Runtime's optimisation levels; the first is the one that a verdict is about."""

    shapes: int = 0
    """How many shapes at least; there are never fewer than the usual ones."""

    bisect: bool = False
    """Whether the first node that goes wrong is looked for, where something does."""


USUAL = Effort()
"""What a conversion is compared by: five shapes or more, as ONNX Runtime runs it unless told otherwise."""


def case_folder(job: Job) -> Path:
    """Return where a comparison that does not hold leaves what shows it again, a folder for each graph."""
    return job.scratch / "case"


def check(
    job: Job,
    spec: ModelSpec,
    stored: Simplified,
    *,
    reused: bool = False,
    proven: bool = False,
    effort: Effort = USUAL,
) -> Checked:
    """Compare the graph as stored with the model in PyTorch, on the device asked for; where it does not hold, inputs
    and answers are in `case_folder`.

    Of a graph whose template was ``reused``, the model's own error is measured only where it decides, since its
    structure was looked at before; so is that of a large model, for the memory. One that was ``proven`` with other
    weights is not compared at a long text again. Where the model's share of the memory is less than it may need, both
    sides read their weights from the disk as they go, and float64 is not used.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph, or the model takes too few shapes to judge.
        ResourceError: If the child ran out of time or memory, or died.
    """
    short_of_memory = estimate_bytes(job.weight_bytes) > job.memory_bytes
    sparing = reused or job.weight_bytes > _LARGE_BYTES
    answer, cost = run_child(
        job,
        Step.PARITY,
        "parity",
        {
            "folder": str(job.source),
            "spec": spec.to_json(),
            "graph": str(stored.path),
            "inputs": [tensor.model_dump() for tensor in stored.graph.inputs],
            "limits": list(stored.limits),
            "device": job.request.options.device.value,
            "threads": job.workspace.threads,
            "float64": str(Float64.NEVER if short_of_memory else Float64.NEEDED if sparing else Float64.HALF),
            "mapped": short_of_memory,
            "levels": list(effort.levels),
            "count": effort.shapes,
            "proven": proven,
            "bisect": effort.bisect,
            "case": str(case_folder(job) / spec.part),
        },
        architecture=spec.architecture,
    )
    outputs = tuple(OutputDifference(**output) for output in answer["outputs"])
    closest = max(outputs, key=lambda o: o.max_abs_diff / o.tolerance if o.tolerance else o.max_abs_diff, default=None)
    entry = ParityEntry(
        verdict=Verdict(answer["outcome"]),
        device=answer["device"],
        provider=answer["provider"],
        shapes=answer["shapes"],
        max_abs_diff=max((o.max_abs_diff for o in outputs), default=None),
        tolerance=closest.tolerance if closest is not None else None,
        axes_proven=tuple(answer["axes_proven"]),
        outputs=outputs,
        detail=answer["detail"],
        cells=tuple(ParityCellEntry(graph=spec.part, **cell) for cell in answer["cells"]),
        session=answer["session"],
        device_memory_bytes=answer["device_memory_bytes"],
    )
    notes = (*answer["notes"], *(f"not compared, {text}" for text in answer["skipped"]))
    return Checked(entry=entry, notes=notes, cost=cost)
