"""Publish: hand a verified artifact on: to a folder, a repository of the Hub, or MLflow. Nothing else ever is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from onnx_config import hub
from onnx_config.errors import InputError
from onnx_config.export.artifact import FERRY_FILE, content_address, list_files, read_ferry_file
from tasks.mlflow_registry import register_version
from tasks.place import place
from tasks.report import ModelEntry, Status, Verdict

__all__ = ["Published", "check_publishable", "hub_layout", "publish_to_folder", "publish_to_hub", "publish_to_mlflow"]

_OF_GRAPHS = (".onnx", ".onnx_data", ".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was handed on, and where it is."""

    artifact: str
    """Content address of the artifact."""

    where: str
    """A folder, the address of a commit, or that of a version of a registered model."""

    files: tuple[str, ...]


def check_publishable(folder: Path) -> ModelEntry:
    """Return what is known of the artifact in ``folder``, all of whose files are read and compared with their hashes.

    Raises:
        InputError: If there is no artifact, it is not verified, or a file is missing, changed or one too many.
    """
    record = read_ferry_file(folder)
    if record is None:
        raise InputError(f"{str(folder)!r} has no {FERRY_FILE}, so it is no artifact. Convert the model first.")
    try:
        entry = ModelEntry.model_validate(record["model"])
    except ValueError as error:
        raise InputError(f"{str(folder / FERRY_FILE)!r} cannot be read: {error}. Convert the model again.") from error
    verdict = entry.parity.verdict if entry.parity is not None else Verdict.NOT_RUN
    if entry.status is not Status.CONVERTED or verdict is not Verdict.VERIFIED:
        raise InputError(
            f"The artifact of {entry.id!r} in {str(folder)!r} is not verified (status {entry.status.value}, parity "
            f"{verdict.value}), and only verified ones are published."
        )
    listed = {name: file.get("sha256") for name, file in record.get("files", {}).items()}
    found = {file.path: file.sha256 for file in list_files(folder)}
    if wrong := sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)):
        raise InputError(
            f"The artifact in {str(folder)!r} is not as it was verified: {', '.join(wrong[:3])} is missing, changed or "
            "new. Convert the model again."
        )
    return entry


def hub_layout(names: list[str]) -> dict[str, str]:
    """Return where the files of an artifact stand in a repository of the Hub: graphs and weights under ``onnx/``.

    >>> hub_layout(["config.json", "model.onnx"])
    {'config.json': 'config.json', 'model.onnx': 'onnx/model.onnx'}
    """
    return {name: f"onnx/{name}" if PurePosixPath(name).name.endswith(_OF_GRAPHS) else name for name in names}


def publish_to_folder(folder: Path, target: Path) -> Published:
    """Place a verified artifact in ``target``, which is new or holds an earlier one.

    Raises:
        InputError: As `check_publishable`, or if the folder cannot be written.
        TransientError: If the disk is full (``store``).
    """
    check_publishable(folder)
    files = list_files(folder)
    place(folder, target, [file.path for file in files])
    return Published(
        artifact=content_address(files), where=str(target), files=(*(file.path for file in files), FERRY_FILE)
    )


def publish_to_hub(folder: Path, repository: str, *, private: bool, branch: str | None = None) -> Published:
    """Write a verified artifact into a repository of the Hub as one commit; the repository is made where it is new.

    Files of the repository that are not the artifact's stay. Each graph carries its verdict in its metadata.

    Raises:
        InputError: As `check_publishable`, or if the Hub refuses it.
        TransientError: If the Hub does not answer (``network``); nothing was written then.
    """
    entry = check_publishable(folder)
    files = list_files(folder)
    layout = hub_layout([file.path for file in files])
    message = f"ONNX of {entry.id} at {entry.revision}, verified by onnx-ferry"
    where = hub.upload(
        {there: folder / name for name, there in layout.items()},
        repository,
        message=message,
        private=private,
        branch=branch,
    )
    return Published(artifact=content_address(files), where=where, files=tuple(layout.values()))


def publish_to_mlflow(folder: Path, name: str, *, key: str | None = None) -> Published:
    """Make a verified artifact a version of a registered model of MLflow; one that is a version of it stays that one.

    Its tags say what it was made from and what was proven of it. The files are those of the artifact, ``ferry.json``
    among them.

    Args:
        folder: The artifact.
        name: Of the registered model; made where there is none.
        key: Of the conversion, where a catalog knows it.

    Raises:
        InputError: As `check_publishable`, or if MLflow is not installed or refuses it.
        TransientError: If MLflow's server does not answer (``network``); no version was made that is not whole.
    """
    entry = check_publishable(folder)
    files = list_files(folder)
    artifact = content_address(files)
    assert entry.parity is not None
    told = {
        "source": entry.id,
        "revision": entry.revision,
        "key": key,
        "task": entry.task,
        "model_type": entry.model_type,
        "class": entry.architecture,
        "verdict": entry.parity.verdict.value,
        "max_abs_diff": entry.parity.max_abs_diff,
        "tolerance": entry.parity.tolerance,
        "opset": entry.graphs[0].opset if entry.graphs else None,
        **{f"sha256.{file.path}": file.sha256 for file in files if file.path.endswith(_OF_GRAPHS)},
    }
    names = (*(file.path for file in files), FERRY_FILE)
    where = register_version(
        name,
        {path: folder / path for path in names},
        artifact=artifact,
        tags={f"onnx_ferry.{tag}": str(value) for tag, value in told.items() if value is not None},
        description=f"ONNX of {entry.id} at {entry.revision}, verified by onnx-ferry",
    )
    return Published(artifact=artifact, where=where, files=names)
