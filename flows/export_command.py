"""``ferry catalog export``: the catalog as files, for programs, for spreadsheets, for people without this one."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.catalog_access import fail, open_catalog
from flows.progress import clean
from onnx_config.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session

    from db import ConversionRecord

__all__ = ["ExportFormat", "export"]


class ExportFormat(StrEnum):
    """What ``export`` writes as text."""

    JSON = "json"
    CSV = "csv"


def export(
    *,
    export_format: Annotated[ExportFormat | None, typer.Option("--format", help="What to write: JSON, or CSV.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Where to; without it, standard output.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write the overview and the newest models as one page, to hand on."
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option("--parquet", metavar="FILE", help="Write the columns of the CSV as Parquet; needs pyarrow."),
    ] = None,
    models: Annotated[
        int, typer.Option("--models", min=0, metavar="N", help="With --html: models on the page, the newest first.")
    ] = 2000,
    home: Annotated[
        str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
    ] = None,
    catalog_url: Annotated[
        str | None, typer.Option("--catalog-url", metavar="URL", help="SQLAlchemy URL. [FERRY_CATALOG_URL]")
    ] = None,
) -> None:
    """Write every attempt, in the order recorded: JSON with everything, or CSV or Parquet with one row for each.

    --html writes a page instead, --parquet a file of its own; both may be given, also beside --format.
    """
    from flows.export_formats import write_csv, write_json, write_parquet

    with open_catalog(home=home, catalog_url=catalog_url) as session:
        if html is not None:
            if session is None:
                fail(
                    "There is no catalog yet, so there is nothing to show. Convert something: `ferry convert org/name`."
                )
            told = _write_file(html, lambda path: _write_page(session, path, most=models))
            typer.echo(f"{told} written to {clean(html)}", err=True)
        if parquet is not None:
            count = _write_file(parquet, lambda path: write_parquet(path, _records(session)))
            typer.echo(f"{count} conversions written to {clean(parquet)}", err=True)
        if export_format is None and output is None and (html or parquet):
            return
        write = write_csv if export_format is ExportFormat.CSV else write_json
        if output is None:
            stream = io.TextIOWrapper(_binary_stdout(), encoding="utf-8", newline="")
            try:
                write(stream, _records(session))
                stream.flush()
            finally:
                # Closing the wrapper would close standard output with it.
                stream.detach()
            return

        def write_text(path: Path) -> int:
            with path.open("w", encoding="utf-8", newline="") as file:
                return write(file, _records(session))

        count = _write_file(output, write_text)
        typer.echo(f"{count} conversions written to {clean(output)}", err=True)


def _records(session: Session | None) -> Iterator[ConversionRecord]:
    from db import iter_conversions

    return iter(()) if session is None else iter_conversions(session)


def _write_page(session: Session, path: Path, *, most: int) -> str:
    from db.dashboard.report import render_report

    page = render_report(session, now=datetime.now(UTC), most_models=most)
    path.write_text(page.text, encoding="utf-8")
    return f"A page with {page.models} of {page.all_models} models"


def _write_file(path: Path, write: Callable[[Path], Any]) -> Any:
    """Write a file whole, or leave what was there; return what ``write`` says of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            told = write(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except InputError as error:
        fail(error.message, code=2)
    except OSError as error:
        fail(f"The export cannot be written to {str(path)!r} ({error.strerror or error}). Choose another file.")
    return told


def _binary_stdout() -> Any:
    sys.stdout.flush()
    return sys.stdout.buffer
