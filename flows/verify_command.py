"""``ferry verify``: compare what is registered once more, after an upgrade or on another device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from flows.progress import clean, duration
from flows.report_file import write_report
from flows.settings import load_settings, why_not_writable
from flows.terminal import cores, only_a_document, plain_console, write_document
from onnx_config.errors import InputError
from tasks.request import Device

if TYPE_CHECKING:
    from tasks.parity import Effort
    from tasks.request import Workspace
    from tasks.verify_report import VariantVerifyEntry, VerifyEntry, VerifyReport
    from tasks.verify_targets import Target

__all__ = ["verify"]

_ALL = "all"
_MATRIX = ("all", "extended", "basic", "disable")
_ROWS = 200
_END_SECONDS = 8.0
_STYLES = {"verified": "green", "mismatch": "red", "unstable": "yellow", "not_run": "red"}


def verify(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT|all",
            help="Folders of artifacts, models or hashes that the catalog knows, or `all`.",
            show_default=False,
        ),
    ],
    *,
    device: Annotated[Device, typer.Option("--device", help="Where both sides run; auto is CUDA where it is.")] = (
        Device.AUTO
    ),
    matrix: Annotated[
        bool, typer.Option("--matrix", help="At every optimisation level of ONNX Runtime, and on a GPU by the CPU too.")
    ] = False,
    shapes: Annotated[
        int,
        typer.Option("--shapes", min=0, metavar="N", help="Compare at so many shapes at least.", show_default=False),
    ] = 0,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Where something differs, look for the first node that goes wrong.")
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option("--sample", min=1, metavar="N", help="So many of them only, from as many classes as there are."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Which ones a sample takes.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Artifacts at a time.")] = 1,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write what was found as JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    home: Annotated[
        str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
    ] = None,
    catalog_url: Annotated[
        str | None, typer.Option("--catalog-url", metavar="URL", help="SQLAlchemy URL. [FERRY_CATALOG_URL]")
    ] = None,
    store_url: Annotated[
        str | None, typer.Option("--store-url", metavar="URL", help="Artifact store. [FERRY_STORE_URL]")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", metavar="SIZE", help="All together, e.g. 12GiB. [FERRY_MEMORY_LIMIT]"),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="TIME", help="One comparison, e.g. 1h. [FERRY_TIMEOUT]")
    ] = None,
) -> None:
    """Compare artifacts with their PyTorch models once more; what no longer holds is not served any more."""
    if _ALL in artifacts and len(artifacts) > 1:
        raise InputError("`all` takes every artifact of the catalog; give it alone, or name the artifacts.")
    if report is not None:
        _check_report(report)
    settings = load_settings(
        home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit, timeout=timeout
    )
    from tasks.parity import Effort
    from tasks.verify_report import VerifyReport
    from tasks.verify_targets import find_targets, sample_of

    workspace = settings.workspace(threads=max(1, cores() // workers))
    targets = find_targets(artifacts, workspace)
    if sample is not None:
        targets = sample_of(targets, sample, seed=seed)
    effort = Effort(levels=_MATRIX if matrix else _MATRIX[:1], shapes=shapes, bisect=bisect)
    started_at, start = datetime.now(UTC), time.monotonic()
    console = plain_console()
    with only_a_document(json), _progress(json, len(targets)) as told:
        entries = _run(targets, workspace, device=device, effort=effort, workers=workers, told=told)
    found = VerifyReport.of(entries, started_at=started_at, seconds=time.monotonic() - start)
    if report is not None:
        write_report(report, found)
    if json:
        write_document(found.to_json())
    else:
        _print(console, found)
    raise typer.Exit(0 if found.all_verified else 1)


def _run(
    targets: Sequence[Target],
    workspace: Workspace,
    *,
    device: Device,
    effort: Effort,
    workers: int,
    told: Callable[[VerifyEntry], None],
) -> list[VerifyEntry]:
    """Compare all, ``workers`` at a time; an interruption kills the children in work and is raised again."""
    from onnx_config.export import isolate
    from onnx_config.export.scratch import remove_orphans
    from tasks.crew import Crew
    from tasks.memory import MemoryGate
    from tasks.verify import verify_target

    remove_orphans(workspace.home)
    gate, stopping = MemoryGate(workspace.memory_limit_bytes, workers=workers), threading.Event()
    done: dict[int, VerifyEntry] = {}

    def one(number: int) -> VerifyEntry:
        return verify_target(targets[number], workspace, device=device, effort=effort, gate=gate, stopping=stopping)

    crew: Crew[int, VerifyEntry] = Crew(one, range(len(targets)), workers=workers)
    try:
        for number, entry in crew.results():
            done[number] = entry
            told(entry)
    except BaseException:
        stopping.set()
        crew.dismiss(seconds=_END_SECONDS, meanwhile=isolate.kill_all)
        raise
    return [done[number] for number in range(len(targets))]


@contextmanager
def _progress(json: bool, total: int) -> Iterator[Callable[[VerifyEntry], None]]:
    """Show how a run advances, on a terminal; yields what is to be told of each artifact."""
    console = Console(stderr=True)
    if json or not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("compared", total=total)
        yield lambda _: shown.advance(task)


def _check_report(path: Path) -> None:
    """Raise `InputError` if the report could not be written at the end, before hours go into it."""
    if path.is_dir():
        raise InputError(f"--report {str(path)!r} is a folder. Name a file in it, such as {path / 'verify.json'}.")
    if reason := why_not_writable(path.parent):
        raise InputError(f"--report: nothing can be written to {str(path.parent)!r}: {reason}. Choose another file.")


def _print(console: Console, found: VerifyReport) -> None:
    if not found.models:
        console.print("The catalog holds no artifact yet; `ferry convert` and `ferry batch` fill it.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("model", "verdict", "since", "on", "shapes", "largest difference", "time"):
        table.add_column(column, overflow="fold")
    # What needs a look comes first.
    ordered = sorted(found.models, key=lambda entry: (entry.error is None, entry.change == "same"))
    for entry in ordered[:_ROWS]:
        table.add_row(*_cells(entry))
        for variant in entry.variants:
            table.add_row(*_cells_of_variant(variant))
    console.print(table)
    if len(ordered) > _ROWS:
        console.print(f"and {len(ordered) - _ROWS} more; --json or --report tell of all")
    for entry in ordered[:_ROWS]:
        if entry.error is not None:
            console.print(Text(f"{clean(entry.id)}: {clean(entry.error.message)}", "red"), soft_wrap=True)
            for note in entry.notes:
                console.print(Text(f"  {clean(note)}"), soft_wrap=True)
    verdicts = ", ".join(f"{count} {verdict.value}" for verdict, count in found.totals.items() if count)
    changes = [f"{count} {change.value.replace('_', ' ')}" for change, count in found.changes.items() if count]
    shown = [text for text in changes if not text.endswith((" same", " first", " none"))]
    console.print(f"{verdicts}{'; ' + ', '.join(shown) if shown else ''}; {duration(found.seconds)}")


def _cells_of_variant(found: VariantVerifyEntry) -> list[Text]:
    parity = found.parity
    off = "-" if parity.relative_error is None else f"{parity.relative_error:.1%}"
    off += "" if parity.tolerance is None else f" of {parity.tolerance:.1%}"
    return [
        Text(f"  {clean(found.variant)}"),
        Text(found.verdict.value.replace("_", " "), _STYLES[found.verdict.value]),
        Text(found.change.value.replace("_", " ")),
        Text(parity.device),
        Text(str(parity.shapes)),
        Text(off),
        Text(""),
    ]


def _cells(entry: VerifyEntry) -> list[Text]:
    parity = entry.parity
    difference = "-"
    if parity is not None and parity.max_abs_diff is not None:
        difference = f"{parity.max_abs_diff:.1e}"
        difference += "" if parity.tolerance is None else f" of {parity.tolerance:.1e}"
    ways = {(cell.provider, cell.optimization) for cell in parity.cells} if parity is not None else set()
    return [
        Text(clean(entry.id)),
        Text(entry.verdict.value.replace("_", " "), _STYLES[entry.verdict.value]),
        Text(entry.change.value.replace("_", " ")),
        Text("-" if parity is None else parity.device if len(ways) < 2 else f"{parity.device}, {len(ways)} ways"),
        Text("-" if parity is None else str(parity.shapes)),
        Text(difference),
        Text(duration(entry.seconds)),
    ]
