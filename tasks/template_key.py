"""What decides what graph a model's structure gives: the key under which its template is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_config.errors import InputError
from onnx_config.export.checkpoint import weight_files
from onnx_config.export.safetensors_file import FLOATS, StoredTensor, read_header
from onnx_config.preprocessors import image_size_in
from onnx_config.sentence_modules import module_folders
from onnx_config.spec import ModelSpec
from tasks.detection_cache import detection_parts
from tasks.job import Job
from tasks.key import content_sha256
from tasks.versions import CODE_EPOCH, detection_versions, package_versions

__all__ = ["template_key"]

_SCHEMA = 1

_COSMETIC = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "dtype",
        "finetuning_task",
        "license",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
    }
)
"""Keys of a config that decide nothing about a graph beside what the spec says: the class and the task."""

_LABELS = ("id2label", "label2id")
_COUNTERS = "num_batches_tracked"


def template_key(job: Job, spec: ModelSpec, *, fixed: Sequence[str] = ()) -> str:
    """Return the full SHA-256 over all that decides what graph the job's model gives, its weights' values excepted.

    Whole numbers in the checkpoint count by value, since they are part of the graph.

    Raises:
        InputError: If the config or a checkpoint cannot be read.
        OSError, ValueError: If a file cannot be read, or is too large to be what it should be.
    """
    options = job.request.options
    parts = detection_parts(job.source, task=options.task, trust_remote_code=options.trust_remote_code)
    described = {name: value for name, value in spec.to_json().items() if name != "notes"}
    return content_sha256(
        {
            "schema": _SCHEMA,
            "epoch": CODE_EPOCH,
            "spec": described,
            "config": _structural(parts["config"]),
            "modules": parts["modules"],
            "image_size": image_size_in(job.source),
            # Every graph is float32 first, whatever is made of it.
            "dtype": "float32",
            "opset": options.opset,
            "fixed": sorted(fixed),
            "tensors": _tensors(job.source),
            "versions": {**package_versions(), **detection_versions()},
        }
    )


def _structural(value: Any) -> Any:
    """Return a config without what decides nothing; of labels their number stays."""
    if isinstance(value, list):
        return [_structural(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: _structural(item) for name, item in value.items() if name not in _COSMETIC}
    for name in _LABELS:
        if isinstance(kept.get(name), dict):
            kept[name] = len(kept[name])
    return kept


def _tensors(source: Path) -> list[list[Any]]:
    """Return name, shape and kind of every tensor of the model's checkpoints, in their order by name."""
    found = []
    for folder in (".", *module_folders(source)):
        try:
            files = weight_files(source / folder)
        except InputError:
            continue  # Whoever needs weights there says so.
        for path in files:
            for key, tensor in read_header(path).items():
                what = "float" if tensor.dtype in FLOATS else _digest(path, key, tensor)
                found.append([folder, key, list(tensor.shape), what])
    return sorted(found)


def _digest(path: Path, key: str, tensor: StoredTensor) -> str:
    """Return element type and content of a tensor that is part of the structure."""
    if key.endswith(_COUNTERS):
        return tensor.dtype
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return f"{tensor.dtype}:{hashlib.sha256(file.read(tensor.nbytes)).hexdigest()}"
