"""Detect: what a model takes and gives, from its config alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from onnx_config.errors import InputError
from onnx_config.hub import fetch_config, is_folder
from onnx_config.spec import ModelSpec
from tasks.job import Job, StepCost, run_child
from tasks.report import Step
from tasks.request import ConversionRequest, Workspace

__all__ = ["detect", "detect_model"]


def detect(job: Job) -> tuple[ModelSpec, StepCost]:
    """Return the spec of the job's model.

    Raises:
        InputError: If the config cannot be read or the task is not possible.
        ModelError: If transformers has no class for it, or the class cannot be built.
        ResourceError: If the child ran out of time or memory, or died.
    """
    options = job.request.options
    answer, cost = run_child(
        job,
        Step.DETECT,
        "detect",
        {"folder": str(job.source), "task": options.task, "trust_remote_code": options.trust_remote_code},
    )
    return ModelSpec.from_json(answer), cost


def detect_model(request: ConversionRequest, workspace: Workspace) -> ModelSpec:
    """Return the spec of a model that is not being converted; of a repository only ``config.json`` is fetched.

    Writes nothing but a temporary folder.

    Raises:
        FerryError: As `detect`, and what reading from the Hub raises.
    """
    source = fetch_config(request.model_id, revision=request.revision)
    if is_folder(request.model_id) and not (source / "config.json").is_file():
        raise InputError(f"The folder {str(source)!r} has no config.json, so it is no transformers model.")
    with tempfile.TemporaryDirectory(prefix="ferry-detect-") as scratch:
        job = Job(
            request=request,
            workspace=workspace,
            revision="",
            key="",
            source=source,
            scratch=Path(scratch),
            memory_bytes=workspace.memory_limit_bytes,
            weight_bytes=0,
        )
        return detect(job)[0]
