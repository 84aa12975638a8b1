"""What commands share when they talk: a console that cuts nothing in a pipe, one JSON document and nothing else."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import typer
from rich.console import Console

from flows.progress import clean
from onnx_config.errors import FerryError

__all__ = [
    "complain",
    "cores",
    "only_a_document",
    "plain_console",
    "size_text",
    "workers_and_threads",
    "write_document",
]

_PLAIN_WIDTH = 160
_MOST_WORKERS = 8


def complain(error: FerryError) -> None:
    """Write an error to standard error, as one paragraph without control characters."""
    typer.echo(f"Error: {clean(error.message)}", err=True)


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_and_threads(workers: int | None = None) -> tuple[int, int]:
    """Return how many models are in work at a time, and the threads of each; ``None``: as many as there are cores."""
    usable = cores()
    number = workers or min(usable, _MOST_WORKERS)
    return number, max(1, usable // number)


def plain_console() -> Console:
    """Return the console for standard output; a pipe has no width, so that nothing is cut there."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    return console


@contextmanager
def only_a_document(json: bool) -> Iterator[None]:
    """With ``json``, turn what the block and its children print on standard output to standard error."""
    if not json:
        yield
        return
    sys.stdout.flush()
    try:
        number, instead = sys.stdout.fileno(), sys.stderr.fileno()
        kept = os.dup(number)
    except (io.UnsupportedOperation, OSError):
        number = instead = kept = -1  # Standard output is no file, as under a test: nobody inherits it.
    try:
        if kept >= 0:
            os.dup2(instead, number)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept >= 0:
            os.dup2(kept, number)
            os.close(kept)


def write_document(text: str) -> None:
    """Write JSON to standard output as UTF-8, whatever the terminal's encoding is."""
    typer.echo((text + "\n").encode(), nl=False)


def size_text(size_bytes: int) -> str:
    """Return a number of bytes for people.

    >>> size_text(90), size_text(3 * 1024**2)
    ('90 bytes', '3.0 MiB')
    """
    size = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
