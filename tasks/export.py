"""Export: from a model to a graph: its structure's template, traced once, or one of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_config.spec import ModelSpec
from tasks.disk import disk_errors
from tasks.job import Job, StepCost, run_child
from tasks.report import Step
from tasks.template_key import template_key
from tasks.template_store import Template, TemplateStore

__all__ = ["Exported", "export"]

_STEPS = "onnx_config.export.template_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A traced graph: a template or one that holds its weights."""

    use: str
    """``"traced"``: the template was made for this model; ``"reused"``: for another; ``"direct"``: there is none."""

    path: Path
    """The plain graph with its weights; of a template, the one without."""

    notes: tuple[str, ...]
    """Axes that had to be fixed, outputs that were declared in vain."""

    cost: StepCost
    """What tracing used."""

    template: Template | None = None
    """The template, where there is one."""


def export(job: Job, spec: ModelSpec, *, fixed: Sequence[str] = (), direct: bool = False) -> Exported:
    """Return a graph for the model as ``spec`` says, with the axes ``fixed`` at the sample's size.

    A structure is traced once, without weights, and kept; a model whose structure cannot be traced so is traced with
    its weights, and so is any where ``direct`` is true.

    Raises:
        InputError: If the weights are missing, truncated, incomplete or not finite.
        ModelError: If the model cannot be traced.
        ResourceError: If the child ran out of time or memory, or died.
    """
    if direct:
        return _export_directly(job, spec, fixed)
    try:
        key = template_key(job, spec, fixed=fixed)
    except (OSError, ValueError, RecursionError):
        # A file that cannot be read so far; a child may tell better what is wrong with it.
        return _export_directly(job, spec, fixed)
    store = TemplateStore(job.workspace.templates)
    known, cost, use = store.read(key), StepCost(seconds=0.0, peak_rss_bytes=0), "reused"
    if known is None:
        with store.locked(key, stopping=job.stopping):
            known = store.read(key)
            if known is None:
                known, cost = _trace(job, spec, fixed, store, key)
                use = "traced"
    if known.direct is not None:
        exported = _export_directly(job, spec, fixed)
        return replace(exported, notes=(*exported.notes, f"traced with its weights, since {known.direct}"))
    return Exported(use=use, path=known.plain, notes=known.notes, cost=cost, template=known)


def _trace(
    job: Job, spec: ModelSpec, fixed: Sequence[str], store: TemplateStore, key: str
) -> tuple[Template, StepCost]:
    with disk_errors(f"the folder {str(job.scratch)!r}"):
        made = job.scratch / "template"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    request = _request(job, spec, fixed, made / "plain.onnx")
    answer, cost = run_child(job, Step.EXPORT, f"{_STEPS}:trace", request, architecture=spec.architecture)
    template = store.publish(
        key,
        made,
        notes=answer["notes"],
        nodes=answer.get("nodes", 0),
        direct=answer["direct"],
        operators=answer.get("operators"),
    )
    return template, cost


def _export_directly(job: Job, spec: ModelSpec, fixed: Sequence[str]) -> Exported:
    path = job.scratch / "traced.onnx"
    request = _request(job, spec, fixed, path)
    answer, cost = run_child(job, Step.EXPORT, "export", request, architecture=spec.architecture)
    return Exported(use="direct", path=path, notes=tuple(answer["notes"]), cost=cost)


def _request(job: Job, spec: ModelSpec, fixed: Sequence[str], output: Path) -> dict[str, object]:
    return {
        "folder": str(job.source),
        "spec": spec.to_json(),
        "dtype": job.request.options.dtype,
        "opset": job.request.options.opset,
        "fixed": list(fixed),
        "output": str(output),
    }
