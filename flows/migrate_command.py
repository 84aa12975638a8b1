"""``ferry catalog migrate``: a catalog's content into another database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.progress import clean

if TYPE_CHECKING:
    from db import Copied

__all__ = ["migrate"]


def migrate(
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URL",
            envvar="FERRY_CATALOG_TO",
            show_envvar=False,
            help="SQLAlchemy URL of an empty database, such as postgresql://user@host/ferry.",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
    home: Annotated[
        str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
    ] = None,
    catalog_url: Annotated[
        str | None, typer.Option("--catalog-url", metavar="URL", help="The catalog to copy. [FERRY_CATALOG_URL]")
    ] = None,
) -> None:
    """Copy the catalog into another database, such as one on a PostgreSQL server.

    Every row is compared afterwards. A copy that was cut is completed by the same command. A password is best kept
    in libpq's own places (PGPASSWORD, ~/.pgpass), where nobody sees it in a list of processes.
    """
    from db import CatalogError, copy_catalog, make_engine, schema_version
    from flows.settings import load_settings, masked_url
    from flows.terminal import write_document
    from onnx_config.errors import ErrorKind, InputError, TransientError

    settings = load_settings(home=home, catalog_url=catalog_url)

    def tell(done: Copied) -> None:
        if not json:
            typer.echo(f"{done.table:16} {done.rows:>10} rows, {done.written} written")

    try:
        source, target = make_engine(settings.catalog_url), make_engine(to)
        try:
            if schema_version(source) is None:
                raise InputError(
                    f"There is no catalog at {masked_url(settings.catalog_url)} to copy. Name it with --catalog-url."
                )
            tables = copy_catalog(source, target, listener=tell)
        finally:
            source.dispose()
            target.dispose()
    except CatalogError as error:
        raise TransientError(error.message, kind=ErrorKind.CATALOG) from error
    where = masked_url(to)
    if json:
        import json as jsonlib

        listed = [{"table": t.table, "rows": t.rows, "written": t.written} for t in tables]
        write_document(jsonlib.dumps({"to": where, "tables": listed}, indent=2))
        return
    typer.echo(f"The catalog is in {clean(where)}. From now on set FERRY_CATALOG_URL to it.")
