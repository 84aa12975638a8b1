"""Simplify: onnxsim over the traced graph; where it fails, the plain graph goes on, with the reason."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_config.errors import FerryError, ModelError, ResourceError
from onnx_config.parts import GRAPH_FILES, role_of
from onnx_config.spec import ModelSpec
from tasks.export import Exported
from tasks.job import Job, StepCost, run_child
from tasks.report import GraphEntry, Step, TensorEntry
from tasks.template_store import Template, TemplateStore

__all__ = ["Simplified", "clear_artifact", "graph_entry", "simplify"]

_STEPS = "onnx_config.export.template_steps"


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

    limits: tuple[dict[str, Any], ...] = ()
    """The sizes beyond which it refuses, each an `onnx_config.export.limits.AxisLimit` as JSON."""


def simplify(
    job: Job, spec: ModelSpec, exported: Exported, metadata: dict[str, str], *, enabled: bool = True
) -> Simplified:
    """Write the graph to be stored to the job's ``artifact`` folder, with its weights and its birth certificate.

    A template is simplified once, and its graph then bound to the weights.

    Args:
        job: The model.
        spec: What it takes and gives.
        exported: The plain graph.
        metadata: The birth certificate.
        enabled: Whether onnxsim runs.

    Raises:
        InputError: If the checkpoint does not fit its config.
        FerryError: If even the plain graph cannot be written.
    """
    output = job.scratch / "artifact" / GRAPH_FILES[role_of(spec)]
    output.parent.mkdir(exist_ok=True)
    for left in (output, output.with_name(f"{output.name}_data")):
        left.unlink(missing_ok=True)
    if exported.template is None:
        return _simplify_file(job, spec, exported.path, output, metadata, enabled=enabled)
    return _bind(job, spec, exported.template, output, metadata, enabled=enabled)


def clear_artifact(job: Job) -> None:
    """Remove the graphs that were written so far, for others to take their place."""
    shutil.rmtree(job.scratch / "artifact", ignore_errors=True)


def _bind(
    job: Job, spec: ModelSpec, template: Template, output: Path, metadata: dict[str, str], *, enabled: bool
) -> Simplified:
    before = _simplify_template(job, template) if enabled else StepCost(seconds=0.0, peak_rss_bytes=0)
    simplified = enabled and template.simplified.is_file()
    graph = template.simplified if simplified else template.plain
    request: dict[str, Any] = {
        "graph": str(graph),
        "folder": str(job.source),
        "spec": spec.to_json(),
        "output": str(output),
        "metadata": metadata,
        "link": job.request.options.weights == "link",
    }
    answer, cost = run_child(job, Step.SIMPLIFY, f"{_STEPS}:bind", request)
    return Simplified(
        path=output,
        graph=graph_entry(output, answer["graph"], template.nodes, role=spec.part, operators_before=template.operators),
        simplified=simplified,
        reason=template.why_plain() if enabled and not simplified else None,
        cost=StepCost(
            seconds=before.seconds + cost.seconds, peak_rss_bytes=max(before.peak_rss_bytes, cost.peak_rss_bytes)
        ),
        limits=tuple(answer["graph"]["limits"]),
    )


def _simplify_template(job: Job, template: Template) -> StepCost:
    """Simplify the template where nobody has tried that; return what it cost."""
    nothing = StepCost(seconds=0.0, peak_rss_bytes=0)
    if template.is_tried:
        return nothing
    with TemplateStore(job.workspace.templates).locked(template.folder.name, stopping=job.stopping):
        if template.is_tried:
            return nothing
        scratch = job.scratch / "simplified"
        scratch.mkdir(exist_ok=True)
        request = {"graph": str(template.plain), "output": str(scratch / "simplified.onnx")}
        cost = nothing
        try:
            answer, cost = run_child(job, Step.SIMPLIFY, f"{_STEPS}:simplify", request)
            reason = answer["reason"]
        except (ModelError, ResourceError) as error:
            reason = f"onnxsim failed: {_short(error)}"
        template.keep_simplified(scratch, reason=reason)
        return cost


def _simplify_file(
    job: Job,
    spec: ModelSpec,
    traced: Path,
    output: Path,
    metadata: dict[str, str],
    *,
    enabled: bool,
    reason: str | None = None,
) -> Simplified:
    request = {"graph": str(traced), "output": str(output), "metadata": metadata, "simplify": enabled}
    try:
        answer, cost = run_child(job, Step.SIMPLIFY, "simplify", request)
    except (ModelError, ResourceError) as error:
        if not enabled:
            raise
        why = f"onnxsim failed: {_short(error)}"
        return _simplify_file(job, spec, traced, output, metadata, enabled=False, reason=why)
    return Simplified(
        path=output,
        graph=graph_entry(
            output,
            answer["graph"],
            answer["nodes_before"],
            role=spec.part,
            operators_before=answer["operators_before"],
        ),
        simplified=answer["simplified"],
        reason=reason or answer["reason"],
        cost=cost,
        limits=tuple(answer["graph"]["limits"]),
    )


def graph_entry(
    output: Path,
    summary: dict[str, Any],
    nodes_before: int,
    *,
    role: str,
    operators_before: dict[str, int] | None = None,
) -> GraphEntry:
    """Return the report's entry of the graph in ``output``, by what a child says of it."""
    return GraphEntry(
        role=role,
        path=output.name,
        opset=summary["opset"],
        nodes=summary["nodes"],
        nodes_before_simplify=nodes_before,
        operators=summary.get("operators", {}),
        operators_before_simplify=operators_before or {},
        inputs=tuple(TensorEntry(**tensor) for tensor in summary["inputs"]),
        outputs=tuple(TensorEntry(**tensor) for tensor in summary["outputs"]),
    )


def _short(error: FerryError) -> str:
    return error.message[:300]
