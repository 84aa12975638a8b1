"""``ferry publish``: hands a verified artifact on."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.progress import clean
from flows.terminal import only_a_document, write_document
from onnx_config.errors import InputError

__all__ = ["publish"]

_HUB = "hub:"


def publish(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact, or a model's id in the catalog.")
    ],
    *,
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="hub:org/name, or a folder.")],
    private: Annotated[
        bool, typer.Option("--private", help="Where the repository is new, only its owner sees it.")
    ] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Branch of the repository; without it, main.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Copy a verified artifact to a folder, or into a repository of the Hub with its graphs under onnx/."""
    from flows.places import find_in_catalog
    from tasks.publish import publish_to_folder, publish_to_hub

    kind, separator, rest = to.partition(":")
    if separator and f"{kind}:" != _HUB:
        raise InputError(f"--to {to!r}: there is no place of the kind {kind!r}. Write hub:org/name, or a folder.")
    with only_a_document(json):
        folder = Path(artifact) if Path(artifact).is_dir() else find_in_catalog(artifact)
        if folder is None:
            raise InputError(
                f"{artifact!r} is no folder, and the catalog has no artifact of it. `ferry catalog list` shows what "
                "is there."
            )
        if separator:
            done = publish_to_hub(folder, rest, private=private, branch=branch)
        elif private or branch:
            raise InputError("--private and --branch are of the Hub; a folder has neither.")
        else:
            done = publish_to_folder(folder, Path(to).expanduser().absolute())
    if json:
        write_document(jsonlib.dumps(asdict(done), indent=2))
    else:
        typer.echo(f"{len(done.files)} files of artifact {done.artifact[:12]} are in {clean(done.where)}")
