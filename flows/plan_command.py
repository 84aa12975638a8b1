"""``ferry plan``: what a batch would do with a manifest, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from flows.manifest import read_manifest
from flows.progress import clean, duration
from flows.settings import load_settings
from flows.terminal import cores, only_a_document, plain_console, size_text, write_document

if TYPE_CHECKING:
    from tasks.plan import Plan, PlannedModel

__all__ = ["plan"]

_MOST_WORKERS = 8
_INPUTS_SHOWN = 4
_ROWS = 200
_STYLES = {"works": "green", "fails": "red"}


def plan(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="YAML, JSON, or text with one id per line.", show_default=False)
    ],
    *,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Also convert a small twin of each model, with random weights."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Models at a time; without it, one per core, 8 at most."),
    ] = None,
    home: Annotated[
        str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit", metavar="SIZE", help="All conversions together, e.g. 12GiB. [FERRY_MEMORY_LIMIT]"
        ),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="TIME", help="One step of one model, e.g. 1h. [FERRY_TIMEOUT]")
    ] = None,
) -> None:
    """Tell what converting a manifest would need and which models will fail, from their configs alone."""
    settings = load_settings(home=home, memory_limit=memory_limit, timeout=timeout)
    requests = read_manifest(manifest)
    usable = cores()
    workers = workers or min(usable, _MOST_WORKERS)
    workspace = settings.workspace(threads=max(1, usable // workers))
    from tasks.plan import plan_models

    with only_a_document(json), _progress() as told:
        planned = plan_models(requests, workspace, workers=workers, rehearse=rehearse, told=told)
    if json:
        write_document(planned.to_json())
    else:
        _print_plan(plain_console(), planned, workers=workers)
    raise typer.Exit(0 if planned.all_work else 1)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show on a terminal how far a plan is; elsewhere nothing, since it takes seconds."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda *_: None
        return
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield told


def _print_plan(console: Console, planned: Plan, *, workers: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("outlook", "model", "task", "inputs"):
        table.add_column(title, overflow="fold")
    for title in ("parameters", "weights", "memory", "disk", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    if planned.rehearsed:
        table.add_column("twin")
    # Those that fail come first: they are what a reader has to do something about.
    ordered = sorted(planned.models, key=lambda model: model.error is None)
    for model in ordered[:_ROWS]:
        table.add_row(*_cells(model, rehearsed=planned.rehearsed))
    console.print(table)
    if len(ordered) > _ROWS:
        console.print(f"and {len(ordered) - _ROWS} more; --json has all of them")
    console.print()
    for model in ordered:
        if model.error is not None:
            text = Text(f"{clean(model.id)}: ", "bold")
            text.append(f"{model.error.kind.value} at {model.error.step.value}: {clean(model.error.message)}", "")
            console.print(text, soft_wrap=True)
        elif model.notes:
            console.print(Text(f"{clean(model.id)}: {'; '.join(map(clean, model.notes))}", "dim"), soft_wrap=True)
    totals = planned.totals
    longest = max((model.seconds or 0.0 for model in planned.models if model.error is None), default=0.0)
    console.print(
        Text(
            f"{totals.works} would work, {totals.fails} would fail. Estimated for those that work: "
            f"{totals.parameters:,} parameters, {size_text(totals.weight_bytes)} of weights, "
            f"{size_text(totals.disk_bytes)} of disk, {size_text(totals.peak_memory_bytes)} of memory for the largest, "
            f"{duration(max(longest, totals.seconds / workers))} with {workers} workers."
            + (f" To download: {size_text(totals.download_bytes)}." if totals.download_bytes else "")
        ),
        soft_wrap=True,
    )


def _cells(model: PlannedModel, *, rehearsed: bool) -> list[Text]:
    names = [tensor.name for tensor in model.inputs]
    shown = ", ".join(names[:_INPUTS_SHOWN]) + (", …" if len(names) > _INPUTS_SHOWN else "")
    cells = [
        Text(model.outlook.value, _STYLES[model.outlook.value]),
        Text(clean(model.id)),
        Text(clean(model.task or "")),
        Text(clean(shown)),
        Text("" if model.parameters is None else _count(model.parameters)),
        *(
            Text("" if size is None else size_text(size))
            for size in (model.weight_bytes, model.peak_memory_bytes, model.disk_bytes)
        ),
        Text("" if model.seconds is None else duration(model.seconds)),
    ]
    if rehearsed:
        cells.append(Text("" if model.rehearsal is None else model.rehearsal.status.value))
    return cells


def _count(number: int) -> str:
    """Return a count for people.

    >>> _count(950), _count(110_000_000), _count(7_200_000_000)
    ('950', '110.0M', '7.2B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
