"""``ferry dashboard``: the ops pages over the catalog, on loopback unless told otherwise."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from flows.progress import clean
from flows.settings import load_settings, masked_url

__all__ = ["dashboard"]


def dashboard(
    *,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to answer.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any that is free.")] = 4300,
    home: Annotated[
        str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
    ] = None,
    catalog_url: Annotated[
        str | None, typer.Option("--catalog-url", metavar="URL", help="SQLAlchemy URL. [FERRY_CATALOG_URL]")
    ] = None,
) -> None:
    """Show the catalog as web pages, reading only, until interrupted."""
    settings = load_settings(home=home, catalog_url=catalog_url)
    from db import CatalogError, make_engine
    from db.dashboard import is_loopback, serve

    try:
        engine = make_engine(settings.catalog_url)
    except CatalogError as error:
        typer.echo(f"Error: {clean(error.message)}", err=True)
        raise typer.Exit(1) from error
    try:
        listener = _listen(host, port)
    except OSError as error:
        engine.dispose()
        typer.echo(
            f"Error: the dashboard cannot answer at {clean(host)} port {port}: {error.strerror or error}. "
            "Choose another with --port (0: any that is free) or --host.",
            err=True,
        )
        raise typer.Exit(1) from error
    with listener:
        bound = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"Dashboard: http://{clean(shown)}:{bound}/", err=True)
        typer.echo(f"Catalog:   {clean(masked_url(settings.catalog_url))}", err=True)
        if not is_loopback(host):
            typer.echo("It has no log-in: whoever reaches this address can read the catalog and its files.", err=True)
        typer.echo("Ctrl-C ends it.", err=True)
        try:
            serve(engine, listener, host=host)
        finally:
            engine.dispose()


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Whoever calls as soon as the address is told waits a moment instead of being refused.
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
