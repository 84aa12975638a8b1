"""``ferry publish``: hands a verified artifact on."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.progress import clean
from flows.terminal import only_a_document, write_document
from onnx_config.errors import InputError

if TYPE_CHECKING:
    from tasks.publish import Published

__all__ = ["publish"]

_KINDS = ("hub", "mlflow")


def publish(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact, or a model's id in the catalog.")
    ],
    *,
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="hub:org/name, mlflow:name, or a folder.")],
    private: Annotated[
        bool, typer.Option("--private", help="Where the repository is new, only its owner sees it.")
    ] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Branch of the repository; without it, main.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Copy a verified artifact to a folder, into a repository of the Hub with its graphs under onnx/, or to MLflow.

    MLflow's server is the one of MLFLOW_TRACKING_URI; the same artifact is one version of the model however often it
    is published.
    """
    from flows.places import find_in_catalog

    kind, separator, rest = to.partition(":")
    if separator and kind not in _KINDS:
        raise InputError(
            f"--to {to!r}: there is no place of the kind {kind!r}. Write hub:org/name, mlflow:name, or a folder."
        )
    if (private or branch) and kind != "hub":
        raise InputError("--private and --branch are of the Hub; a folder has neither, and nor has MLflow.")
    if kind == "mlflow" and (not rest.strip() or set(rest) & set("/:")):
        raise InputError(
            f"--to {to!r}: {rest!r} is no name of a registered model. Write one such as mlflow:my-classifier, without "
            "'/' and ':'; the server is named by MLFLOW_TRACKING_URI."
        )
    with only_a_document(json):
        folder = Path(artifact) if Path(artifact).is_dir() else find_in_catalog(artifact)
        if folder is None:
            raise InputError(
                f"{artifact!r} is no folder, and the catalog has no artifact of it. `ferry catalog list` shows what "
                "is there."
            )
        done = _publish(folder, kind if separator else None, rest, to, private=private, branch=branch)
    if json:
        write_document(jsonlib.dumps(asdict(done), indent=2))
    else:
        typer.echo(f"{len(done.files)} files of artifact {done.artifact[:12]} are in {clean(done.where)}")


def _publish(folder: Path, kind: str | None, name: str, to: str, *, private: bool, branch: str | None) -> Published:
    from tasks.publish import publish_to_folder, publish_to_hub, publish_to_mlflow

    match kind:
        case "hub":
            return publish_to_hub(folder, name, private=private, branch=branch)
        case "mlflow":
            return publish_to_mlflow(folder, name, key=_key_of(folder))
        case _:
            return publish_to_folder(folder, Path(to).expanduser().absolute())


def _key_of(folder: Path) -> str | None:
    """Return the key of the conversion that made an artifact; ``None`` where the catalog does not know it."""
    import db
    from flows.settings import load_settings
    from onnx_config.errors import TransientError
    from onnx_config.export.artifact import content_address, list_files
    from tasks.register import catalog_errors

    try:
        with catalog_errors():
            engine = db.make_engine(load_settings().catalog_url)
            try:
                if not db.is_current(engine):
                    return None
                with db.session_scope(engine, read_only=True) as session:
                    found = db.find_conversion(session, content_address(list_files(folder)))
            finally:
                engine.dispose()
    # A folder is published without a catalog, too.
    except TransientError:
        return None
    return None if found is None else found.key
