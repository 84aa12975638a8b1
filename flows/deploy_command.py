"""``ferry deploy``: registers the scheduled deployments with a Prefect server."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import only_a_document, plain_console, write_document

__all__ = ["DEPLOYMENT_FILE", "deploy"]

DEPLOYMENT_FILE = Path("deploy/prefect.yaml")
"""Read where no other file is named."""


def deploy(
    file: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="The deployment file.", show_default=True)
    ] = DEPLOYMENT_FILE,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be created or updated, and change nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Register work pools, limits and scheduled batches with the Prefect server at PREFECT_API_URL.

    Again: what has changed in the file is updated, nothing is there twice.
    """
    from flows.deployment_file import read_deployment_file
    from flows.prefect_connection import connected
    from flows.prefect_environment import quiet_prefect

    quiet_prefect()
    with only_a_document(json):
        found, notes = read_deployment_file(file)
        from flows.deploy import apply
        from flows.registered import Action

        with connected("ferry deploy") as client:
            url = str(client.api_url)
            done = apply(found, client, dry_run=dry_run)
    if json:
        items = [asdict(item) for item in done]
        write_document(jsonlib.dumps({"api_url": url, "dry_run": dry_run, "items": items, "notes": notes}, indent=2))
        return
    words = {Action.CREATE: "create", Action.UPDATE: "update", Action.UNCHANGED: "unchanged"}
    if not dry_run:
        words |= {Action.CREATE: "created", Action.UPDATE: "updated"}
    for item in done:
        changed = f" ({', '.join(item.changed)})" if item.changed else ""
        typer.echo(f"{words[item.action]:10} {item.what.replace('_', ' '):18} {item.name}{changed}")
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    pools = dict.fromkeys(deployment.work_pool for deployment in found.deployments)
    commands = "; ".join(f"prefect worker start --pool {pool!r}" for pool in pools)
    if dry_run:
        typer.echo("Dry run: nothing was changed.")
    plain_console().print(f"A worker runs them: {commands}", soft_wrap=True)
