"""Simplify: onnxsim over the traced graph; where it fails, the plain graph goes on, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx_config.errors import FerryError, ModelError, ResourceError
from tasks.job import Job, StepCost, run_child
from tasks.report import GraphEntry, Step, TensorEntry

__all__ = ["Simplified", "simplify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplified:
    """The graph as it will be stored."""

    path: Path
    """The ``.onnx`` file."""

    graph: GraphEntry
    """Its summary; the path is the file's name."""

    simplified: bool
    """Whether it is onnxsim's."""

    reason: str | None
    """Why it is not, although asked for."""

    cost: StepCost
    """What it used."""


def simplify(
    job: Job, traced: Path, metadata: dict[str, str], *, enabled: bool = True, reason: str | None = None
) -> Simplified:
    """Write the graph to be stored to the job's ``artifact`` folder, with its birth certificate.

    Args:
        job: The model.
        traced: The plain graph.
        metadata: The birth certificate.
        enabled: Whether onnxsim runs.
        reason: Why it does not, for the record.

    Raises:
        FerryError: If even the plain graph cannot be written.
    """
    folder = job.scratch / "artifact"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("model.onnx*"):
        stale.unlink()
    output = folder / "model.onnx"
    request = {"graph": str(traced), "output": str(output), "metadata": metadata, "simplify": enabled}
    try:
        answer, cost = run_child(job, Step.SIMPLIFY, "simplify", request)
    except (ModelError, ResourceError) as error:
        if not enabled:
            raise
        return simplify(job, traced, metadata, enabled=False, reason=f"onnxsim failed: {_short(error)}")
    summary = answer["graph"]
    graph = GraphEntry(
        role="model",
        path=output.name,
        opset=summary["opset"],
        nodes=summary["nodes"],
        nodes_before_simplify=answer["nodes_before"],
        inputs=tuple(TensorEntry(**tensor) for tensor in summary["inputs"]),
        outputs=tuple(TensorEntry(**tensor) for tensor in summary["outputs"]),
    )
    return Simplified(
        path=output, graph=graph, simplified=answer["simplified"], reason=reason or answer["reason"], cost=cost
    )


def _short(error: FerryError) -> str:
    return error.message[:300]
