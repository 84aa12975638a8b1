"""MLflow: the files of an artifact as a version of a registered model. The only module that knows MLflow.

Its server is the one that MLflow's own variables name: ``MLFLOW_TRACKING_URI``, and ``MLFLOW_REGISTRY_URI`` where the
registry is another one's.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, TransientError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["ARTIFACT_TAG", "EXPERIMENT", "register_version"]

EXPERIMENT = "onnx-ferry"
"""Experiment of the runs that hold the files; ``MLFLOW_EXPERIMENT_NAME`` names another one."""

ARTIFACT_TAG = "onnx_ferry.artifact"
"""Tag that says which artifact a version or a run is of: its content address."""

_FOLDER = "model"
_QUIET = {
    # It reports home otherwise.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # With the 7 of the default, a server that is not there is waited for longer than two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
_MISSING = "RESOURCE_DOES_NOT_EXIST"
_THERE_ALREADY = "RESOURCE_ALREADY_EXISTS"
_PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
_QUOTED_CHARACTERS = 300


def register_version(
    name: str, files: Mapping[str, Path], *, artifact: str, tags: Mapping[str, str], description: str
) -> str:
    """Make files a version of a registered model; return its address, ``models:/NAME/VERSION``.

    An artifact that is a version of the model already is that version, and nothing is written. Else the files go
    into a run first, and only when all of them are there, in their full length, the version is made, with its tags, in
    one call: whoever is killed before that leaves a run that is not finished, which the next call goes on with.

    Args:
        name: Of the registered model; made where there is none.
        files: Path in the version -> file.
        artifact: Content address of them all.
        tags: Of the version, beside the one that says ``artifact``.
        description: Of the version, a sentence.

    Raises:
        InputError: If MLflow is not installed, no server is named, or it refuses what it is told (``bad_input``).
        TransientError: If the server does not answer, or has not got a file as it is (``network``).
    """
    with _mlflow_errors():
        client = _client()
        if (there := _versions(client, name, artifact)) is not None and there:
            return _finished(client, there[0])
        run = _run(client, name, artifact)
        try:
            for path, file in files.items():
                folder = PurePosixPath(_FOLDER, path).parent
                client.log_artifact(run, str(file), str(folder))
            _check_arrived(client, run, files)
            if there is None:
                _make_model(client, name)
            # Somebody may have done the same meanwhile.
            if not _versions(client, name, artifact):
                client.create_model_version(
                    name,
                    source=f"{client.get_run(run).info.artifact_uri}/{_FOLDER}",
                    run_id=run,
                    tags={**tags, ARTIFACT_TAG: artifact},
                    description=description,
                )
        except BaseException:
            with _ignored():
                client.set_terminated(run, "FAILED")
            raise
        return _finished(client, _only_one(client, name, artifact))


def _client() -> MlflowClient:
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if not (os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")):
        raise InputError(
            "No MLflow server is named. Set MLFLOW_TRACKING_URI to its address, such as http://127.0.0.1:5000, and "
            "MLFLOW_TRACKING_TOKEN where it wants one."
        )
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise InputError(
            "MLflow is reached by the package mlflow-skinny, which is not installed. Type: pip install "
            '"onnx-ferry[mlflow]"'
        ) from error
    # It tells of each version that is made, in the middle of a document on standard output or beside it.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient()


def _versions(client: MlflowClient, name: str, artifact: str) -> list[Any] | None:
    """Return the versions of a model that are this artifact, the oldest first; ``None``: there is no such model."""
    try:
        client.get_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != _MISSING:
            raise
        return None
    # By name alone and not by tag, which not every registry can do.
    quoted = name.replace("'", "''")
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name='{quoted}'", max_results=200, page_token=token)
        found += [version for version in page if version.tags.get(ARTIFACT_TAG) == artifact]
        token = page.token
        if not token:
            return sorted((one for one in found if one.status == "READY"), key=lambda one: int(one.version))


def _only_one(client: MlflowClient, name: str, artifact: str) -> Any:
    """Return the version that counts where two have made one at once: the first; the others are taken back."""
    first, *others = _versions(client, name, artifact) or [None]
    if first is None:
        raise TransientError(
            f"MLflow has made a version of {name!r} and does not show it. Look at its pages, and publish again.",
            kind=ErrorKind.NETWORK,
        )
    for other in others:
        with _ignored():
            client.delete_model_version(name, other.version)
    return first


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description="ONNX models, verified by onnx-ferry")
    except Exception as error:
        if getattr(error, "error_code", None) != _THERE_ALREADY:
            raise


def _run(client: MlflowClient, name: str, artifact: str) -> str:
    """Return the run that gets the files: one that an earlier call did not finish, or a new one."""
    experiment = _experiment(client)
    tags = {ARTIFACT_TAG: artifact, "onnx_ferry.model": name, "mlflow.runName": f"{name} {artifact[:12]}"}
    begun = client.search_runs(
        [experiment], f"tags.`{ARTIFACT_TAG}` = '{artifact}' and tags.`onnx_ferry.model` = '{name}'", max_results=1
    )
    if begun:
        client.update_run(begun[0].info.run_id, status="RUNNING")
        return str(begun[0].info.run_id)
    return str(client.create_run(experiment, tags=tags).info.run_id)


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if (there := client.get_experiment_by_name(name)) is not None:
        return str(there.experiment_id)
    try:
        return str(client.create_experiment(name))
    except Exception as error:
        if getattr(error, "error_code", None) != _THERE_ALREADY:
            raise
    found = client.get_experiment_by_name(name)
    assert found is not None
    return str(found.experiment_id)


def _check_arrived(client: MlflowClient, run: str, files: Mapping[str, Path]) -> None:
    """Compare what the server has with the files, by their length."""
    there: dict[str, int | None] = {}
    folders = [_FOLDER]
    while folders:
        for item in client.list_artifacts(run, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                there[item.path.removeprefix(f"{_FOLDER}/")] = item.file_size
    wrong = [path for path, file in files.items() if there.get(path) != file.stat().st_size]
    if wrong:
        raise TransientError(
            f"MLflow has not got {', '.join(sorted(wrong)[:3])} in full, so that no version was made. Look at the disk "
            "of its store, and publish again.",
            kind=ErrorKind.NETWORK,
        )


def _finished(client: MlflowClient, version: Any) -> str:
    """End the run of a version, should its maker have been killed before that; return the version's address."""
    if version.run_id and client.get_run(version.run_id).info.status != "FINISHED":
        client.set_terminated(version.run_id)
    return f"models:/{version.name}/{version.version}"


@contextmanager
def _ignored() -> Iterator[None]:
    try:
        yield
    # What was to be tidied up is said by another error, or stays as it is.
    except Exception:  # noqa: BLE001
        return


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    try:
        yield
    except (InputError, TransientError):
        raise
    # MLflow's own, those of the HTTP library below it, and those of the clients of buckets, of which each is another.
    except Exception as error:
        code = getattr(error, "error_code", None)
        said = re.sub(r"://[^/@\s]*@", "://***@", " ".join(str(error).split()))[:_QUOTED_CHARACTERS]
        if code is None or code in _PASSING:
            raise TransientError(
                f"MLflow does not answer as it should: {type(error).__name__}: {said}. No version was made that is not "
                "whole. Look at the server that MLFLOW_TRACKING_URI names, and publish again.",
                kind=ErrorKind.NETWORK,
            ) from error
        raise InputError(
            f"MLflow refuses what it is told: {said}. Correct the name, or the rights of MLFLOW_TRACKING_TOKEN."
        ) from error
