"""``ferry catalog``: what was converted, as people and programs read it.

Reading, and clearing up. What a model says of itself is shown as plain text, without markup and control characters.
"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.catalog_access import fail, open_catalog, to_json
from flows.export_command import export
from flows.migrate_command import migrate
from flows.progress import clean, duration

if TYPE_CHECKING:
    from db import ArtifactRecord, ConversionRecord, GraphRecord, ParityCellRecord, ParityRecord

__all__ = ["catalog_app"]

catalog_app = typer.Typer(no_args_is_help=True)

_PLAIN_WIDTH = 160
_MOST_COUNTED = 500
_STYLES = {"converted": "green", "reused": "cyan", "mismatch": "yellow", "failed": "red"}


class _StatusFilter(StrEnum):
    CONVERTED = "converted"
    REUSED = "reused"
    MISMATCH = "mismatch"
    FAILED = "failed"


_HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
]
_CatalogOption = Annotated[
    str | None, typer.Option("--catalog-url", metavar="URL", help="SQLAlchemy URL. [FERRY_CATALOG_URL]")
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
_LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Show at most so many.")]
_AllOption = Annotated[
    bool, typer.Option("--all", help="Show every attempt, also those that a later one of the same request replaced.")
]


@catalog_app.command("list")
def list_command(
    *,
    status: Annotated[_StatusFilter | None, typer.Option("--status", help="Only conversions that ended so.")] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="Only conversions for this task.")] = None,
    limit: _LimitOption = 50,
    every: _AllOption = False,
    json: _JsonOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
) -> None:
    """List conversions, those that finished last first."""
    filters = {"status": None if status is None else status.value, "task": task, "latest_only": not every}
    _print_page(filters, limit=limit, json=json, home=home, catalog_url=catalog_url)


@catalog_app.command()
def search(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="A part of model id, task, model type, class or error message.")
    ],
    *,
    limit: _LimitOption = 50,
    every: _AllOption = False,
    json: _JsonOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
) -> None:
    """List the conversions that have TEXT in them, whatever its case."""
    _print_page({"text": text, "latest_only": not every}, limit=limit, json=json, home=home, catalog_url=catalog_url)


@catalog_app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID|MODEL",
            help="A number from the list; a model's id or folder (its newest conversion); "
            "or the first 7 digits of an artifact's SHA-256.",
        ),
    ],
    *,
    json: _JsonOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
) -> None:
    """Show everything about one conversion."""
    from db import find_conversion

    record = None
    with open_catalog(home=home, catalog_url=catalog_url) as session:
        if session is not None:
            record = find_conversion(session, name)
            if record is None and Path(name).is_dir():
                # Folders are recorded by their absolute path.
                record = find_conversion(session, str(Path(name).resolve()))
    if record is None:
        what = "it is empty" if session is None else "it has no conversion with this number, model or artifact"
        fail(f"{name!r} is not in the catalog: {what}. `ferry catalog list` shows what is there.")
    if json:
        _write_document(to_json(record))
    else:
        _print_conversion(_console(), record)


@catalog_app.command()
def templates(*, json: _JsonOption = False, home: _HomeOption = None, catalog_url: _CatalogOption = None) -> None:
    """List the structures that were traced, with how many models were bound to each, those used last first."""
    from db import list_templates

    records = []
    with open_catalog(home=home, catalog_url=catalog_url) as session:
        if session is not None:
            records = list_templates(session)
    if json:
        _write_document({"templates": [to_json(record) for record in records]})
        return
    if not records:
        _console().print("No structure was traced yet.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("class", "hits", "size", "first used", "last used", "key"):
        table.add_column(column, justify="right" if column in ("hits", "size") else "left", overflow="fold")
    for record in records:
        times = (_time(record.created_at), _time(record.last_used_at))
        cells = (record.architecture or "", str(record.hits), _size(record.size_bytes), *times, record.key[:12])
        table.add_row(*map(_text, cells))
    _console().print(table)


@catalog_app.command()
def gc(
    *,
    unused_days: Annotated[
        float, typer.Option("--unused-days", min=0, metavar="N", help="What was not used for so many days.")
    ] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json: _JsonOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
) -> None:
    """Remove templates, detections and copies that nothing has used for a while, and what killed processes have left.

    All of it can be made again; artifacts and what the catalog knows of conversions stay.
    """
    from flows.settings import load_settings
    from onnx_config.errors import FerryError
    from tasks.collect import collect

    workspace = load_settings(home=home, catalog_url=catalog_url).workspace()
    try:
        found = collect(workspace, unused_days=unused_days, dry_run=dry_run)
    except FerryError as error:
        fail(error.message)
    total = sum(item.size_bytes for item in found)
    if json:
        listed = [{"what": item.what, "path": str(item.path), "size_bytes": item.size_bytes} for item in found]
        _write_document({"dry_run": dry_run, "size_bytes": total, "removed": listed})
        return
    for item in found:
        typer.echo(f"{item.what:10} {_size(item.size_bytes):>10}  {clean(item.path)}")
    typer.echo(f"{len(found)} {'would be removed' if dry_run else 'removed'}, {_size(total)}")


catalog_app.command()(export)
catalog_app.command()(migrate)


def _print_page(filters: dict[str, Any], *, limit: int, json: bool, home: str | None, catalog_url: str | None) -> None:
    from db import count_conversions, list_conversions

    total, records, exact = 0, [], True
    with open_catalog(home=home, catalog_url=catalog_url) as session:
        if session is not None:
            # What has a text in it is counted by finding it, so not all of what a million have.
            most = max(limit, _MOST_COUNTED) if "text" in filters else None
            total = count_conversions(session, most=None if most is None else most + 1, **filters)
            if most is not None and total > most:
                total, exact = most, False
            records = list_conversions(session, limit=limit, **filters)
    if json:
        listed = [to_json(record) for record in records]
        _write_document({"total": total, "total_is_exact": exact, "conversions": listed})
        return
    console = _console()
    if session is None:
        console.print("The catalog is empty: nothing was converted yet.")
    elif not records:
        console.print("No conversion fits.")
    else:
        console.print(_page_table(records))
        if total > len(records) or not exact:
            more = "" if exact else " or more"
            console.print(f"{len(records)} of {total}{more} conversions; see more with --limit.")


def _page_table(records: Iterable[ConversionRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("task", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("parity", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("finished", no_wrap=True)
    for record in records:
        status = record.status if record.error is None else f"{record.status} ({record.error.kind})"
        table.add_row(
            str(record.id),
            _text(_near(record.model_id)),
            _text(record.task or "-"),
            Text(status, _STYLES[record.status]),
            _text(_difference(record.parity[-1]) if record.parity else "-"),
            "-" if record.artifact is None else _size(record.artifact.size_bytes),
            _time(record.finished_at),
        )
    return table


def _near(model_id: str) -> str:
    """Return a folder below the current one as a user types it; any other id as it is."""
    try:
        return f"./{Path(model_id).relative_to(Path.cwd()).as_posix()}"
    except ValueError:
        return model_id


def _print_conversion(console: Console, record: ConversionRecord) -> None:
    facts = _facts()
    rows: list[tuple[str, object]] = [
        ("conversion", f"{record.id}" + ("" if record.batch_id is None else f" of batch {record.batch_id}")),
        ("model", record.model_id),
        ("revision", record.revision),
        ("asked for", record.requested_revision),
        ("status", record.status),
        ("task", record.task),
        ("task family", None if record.task_family == record.task else record.task_family),
        ("type", record.model_type),
        ("class", record.architecture),
        ("template", record.template),
        ("simplified", "yes" if record.simplified else "no"),
        ("options", ", ".join(f"{key}={value}" for key, value in record.options.items())),
        ("started", _time(record.started_at)),
        ("finished", _time(record.finished_at)),
        ("worker", record.worker),
        ("attempts", record.attempts),
        ("peak memory", None if record.peak_rss_bytes is None else _size(record.peak_rss_bytes)),
        ("key", record.key),
    ]
    if record.artifact is not None:
        folder = "quarantine" if record.artifact.quarantined else "artifact"
        rows += [(folder, record.artifact.path), ("sha256", record.artifact.sha256)]
    rows += [("note", note) for note in record.notes]
    if record.error is not None:
        rows += [
            ("failed at", f"{record.error.step}, {record.error.kind}"),
            ("message", record.error.message),
            ("see it again", record.error.reproduce),
        ]
    _add(facts, rows)
    console.print(facts)
    if record.artifact is not None:
        for graph in record.artifact.graphs:
            _print_graph(console, graph)
        _print_files(console, record.artifact)
    for check in record.parity:
        _print_parity(console, check)
    if record.timings:
        table = _table("step", "time")
        for timing in record.timings:
            table.add_row(timing.step, duration(timing.seconds))
        table.add_row("all", duration(record.seconds))
        _print_section(console, "timings", table)
    if record.environment:
        versions = _facts()
        _add(versions, sorted(record.environment.items()))
        _print_section(console, "environment", versions)


def _print_graph(console: Console, graph: GraphRecord) -> None:
    table = _table("", "name", "dtype", "shape")
    for side, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for tensor in tensors:
            shape = ", ".join(str(size) for size in tensor.shape)
            table.add_row(side, _text(tensor.name), _text(tensor.dtype), _text(f"({shape})"))
    counts = f"{graph.nodes} nodes (exported {graph.nodes_before_simplify}), opset {graph.opset}"
    _print_section(console, f"graph {graph.role}: {graph.path}, {counts}", table)


def _print_files(console: Console, artifact: ArtifactRecord) -> None:
    table = _table("file", "size", "sha256")
    for file in artifact.files:
        table.add_row(_text(file.path), _size(file.size_bytes), file.sha256)
    _print_section(console, f"files: {_size(artifact.size_bytes)}", table)


def _print_parity(console: Console, check: ParityRecord) -> None:
    facts = _facts()
    _add(
        facts,
        [
            ("checked", f"{_time(check.checked_at)} on {check.device}, {check.provider}"),
            ("shapes", check.shapes),
            ("difference", _difference(check)),
            ("axes proven", ", ".join(check.axes_proven)),
            ("differs", check.detail),
            ("session", ", ".join(f"{key}={value}" for key, value in (check.session or {}).items())),
            ("device memory", None if check.device_memory_bytes is None else _size(check.device_memory_bytes)),
            ("versions", ", ".join(f"{k} {v}" for k, v in sorted((check.environment or {}).items()))),
        ],
    )
    _print_section(console, f"parity: {check.verdict}", facts)
    if check.cells:
        console.print(_matrix(check))
    if check.outputs:
        table = _table("output", "largest difference", "allowed", "PyTorch's own")
        for output in check.outputs:
            spread = "-" if output.spread is None else f"{output.spread:.2e}"
            table.add_row(_text(output.name), f"{output.max_abs_diff:.2e}", f"{output.tolerance:.2e}", spread)
        console.print(table)


def _matrix(check: ParityRecord) -> Table:
    """Return the cells of a check: a row for each way to run each graph, and one for each shape that does not hold."""
    ways: dict[tuple[str, ...], list[ParityCellRecord]] = {}
    for cell in check.cells:
        ways.setdefault((cell.graph, cell.provider, cell.optimization, cell.dtype), []).append(cell)
    table = _table("graph", "provider", "optimisation", "dtype", "shapes", "verdict", "closest to its tolerance")
    for way, cells in ways.items():
        bad = [cell for cell in cells if cell.verdict != "verified"]
        closest = max(cells, key=_closeness)
        table.add_row(*map(_text, way), str(len(cells)), (bad or cells)[0].verdict, _text(_of_tolerance(closest)))
        for cell in bad:
            sizes = ", ".join(f"{axis}={size}" for axis, size in cell.sizes.items())
            table.add_row("", "", "", "", _text(f"{cell.shape} ({sizes})"), cell.verdict, _text(cell.detail or ""))
    return table


def _closeness(cell: ParityCellRecord) -> float:
    if cell.max_abs_diff is None or not cell.tolerance:
        return -1.0 if not cell.max_abs_diff else float("inf")
    return cell.max_abs_diff / cell.tolerance


def _of_tolerance(cell: ParityCellRecord) -> str:
    if cell.max_abs_diff is None or cell.tolerance is None:
        return "-"
    return f"{cell.max_abs_diff:.1e} of {cell.tolerance:.1e}, {cell.output}, {cell.shape}"


def _print_section(console: Console, title: str, content: Table) -> None:
    console.print()
    console.print(Text(clean(title), "bold"), soft_wrap=True)
    console.print(content)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts() -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    return facts


def _add(facts: Table, rows: Iterable[tuple[str, object]]) -> None:
    """Add the rows that have a value."""
    for name, value in rows:
        if value is not None and value != "":
            facts.add_row(Text(clean(name), "bold"), _text(value))


def _text(value: object) -> Text:
    """Return what a model said as text that is neither markup nor terminal commands."""
    return Text(clean(value))


def _difference(check: ParityRecord) -> str:
    if check.max_abs_diff is None:
        return check.verdict
    allowed = "" if check.tolerance is None else f" of {check.tolerance:.1e}"
    return f"{check.verdict}, {check.max_abs_diff:.1e}{allowed}"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _console() -> Console:
    """Return the console for standard output; a pipe has no width, so that nothing is cut there."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, emoji=False, width=_PLAIN_WIDTH)
    return console


def _write_document(value: Any) -> None:
    """Write one JSON document; ASCII, so that nothing in it reaches a terminal as a command."""
    typer.echo(jsonlib.dumps(to_json(value), indent=2, allow_nan=False))
