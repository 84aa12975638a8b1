"""What a person sees of conversions: the models in work while they run, and a summary afterwards.

Names and messages come from models, so nothing of them is read as markup and no control character
reaches the terminal.
"""

from __future__ import annotations

import math
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from onnx_config.errors import ErrorKind
from tasks.report import ModelEntry, Report, Status, Step
from tasks.request import Listener, SilentListener

__all__ = ["clean", "duration", "progress_for", "summary"]

_ROWS = 50
_EXAMPLES = 3
_WORKING_LINES = 12
_STYLES = {Status.CONVERTED: "green", Status.REUSED: "cyan", Status.MISMATCH: "yellow", Status.FAILED: "red"}
_ORDER = (Status.FAILED, Status.MISMATCH, Status.CONVERTED, Status.REUSED)


def clean(text: object) -> str:
    r"""Return ``text`` as one line without control, formatting and surrogate characters.

    >>> clean("a\x1b[2Jb\nc")
    'a[2Jb c'
    """
    words = " ".join(str(text).split())
    return "".join(c for c in words if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def duration(seconds: float) -> str:
    """Return a duration for people.

    >>> duration(7.25), duration(75), duration(7325)
    ('7.2 s', '1:15', '2:02:05')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_for(
    console: Console, total: int | None, *, json: bool = False, quiet: bool = False, verbose: bool = False
) -> Iterator[Listener]:
    """Show how ``total`` conversions advance while the block runs; yields the listener to tell. ``None``: nobody knows.

    On a terminal a live area shows the models in work and a bar over all of them, and each failure stays
    as one line above it. Elsewhere every finished model is a line; with ``verbose`` every step as well.
    With ``json`` all of it goes to standard error; ``quiet`` shows nothing. The listener may be called
    from several threads.
    """
    if json:
        console = Console(stderr=True)
    if quiet:
        yield SilentListener()
    elif console.is_terminal and not console.is_dumb_terminal:
        listener = _LiveListener(console, total)
        with Live(
            console=console,
            get_renderable=listener.render,
            refresh_per_second=4,
            redirect_stdout=not json,
            redirect_stderr=not json,
        ):
            yield listener
    else:
        yield _LineListener(console, total, verbose=verbose)


@dataclass(slots=True)
class _Work:
    """A model in work; ``count`` of them where the list has it with several options."""

    since: float
    step: Step | None = None
    count: int = 1


@dataclass(slots=True)
class _Counts:
    """How many models ended, by status. The lock also guards what its owner keeps beside it."""

    total: int | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: Counter[Status] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return sum(self.ended.values())

    def place(self) -> str:
        """Return how far it is: ``3/20``, or ``3`` where nobody knows of how many."""
        return f"{self.done}" if self.total is None else f"{self.done}/{self.total}"

    def line(self) -> Text:
        text = Text()
        for status in (Status.CONVERTED, Status.REUSED, Status.MISMATCH, Status.FAILED):
            count = self.ended[status]
            text.append(f"  {count} {status.value}", style=_STYLES[status] if count else "dim")
        return text


class _LineListener:
    """One line per finished model."""

    def __init__(self, console: Console, total: int | None, *, verbose: bool) -> None:
        self._console = console
        self._verbose = verbose
        self._counts = _Counts(total)

    def model_started(self, model_id: str) -> None:
        if self._verbose:
            self._say(Text(f"{clean(model_id)}: started"))

    def step_started(self, model_id: str, step: Step) -> None:
        if self._verbose:
            self._say(Text(f"{clean(model_id)}: {step.value}"))

    def model_finished(self, entry: ModelEntry) -> None:
        with self._counts.lock:
            self._counts.ended[entry.status] += 1
            self._say(Text(f"[{self._counts.place()}] ").append_text(_ending(entry)))

    def _say(self, text: Text) -> None:
        _print(self._console, text, soft_wrap=True)


class _LiveListener:
    """The models in work and a bar over all, drawn by Rich's own thread."""

    def __init__(self, console: Console, total: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._counts = _Counts(total)
        self._working: dict[str, _Work] = {}
        self._since = clock()

    def model_started(self, model_id: str) -> None:
        with self._counts.lock:
            if work := self._working.get(model_id):
                work.count += 1
            else:
                self._working[model_id] = _Work(since=self._clock())

    def step_started(self, model_id: str, step: Step) -> None:
        with self._counts.lock:
            self._working.setdefault(model_id, _Work(since=self._clock())).step = step

    def model_finished(self, entry: ModelEntry) -> None:
        with self._counts.lock:
            self._counts.ended[entry.status] += 1
            if work := self._working.get(entry.id):
                work.count -= 1
                if not work.count:
                    del self._working[entry.id]
        # Outside the lock: printing takes the console's lock, which the drawing thread holds while it waits for ours.
        if entry.status in (Status.FAILED, Status.MISMATCH):
            _print(self._console, _ending(entry), no_wrap=True, overflow="ellipsis", crop=True)

    def render(self) -> RenderableType:
        """Return the live area: never more lines than the terminal has."""
        room = max(1, min(_WORKING_LINES, self._console.height - 4))
        now = self._clock()
        with self._counts.lock:
            working = [(model, work.step, now - work.since) for model, work in self._working.items()]
            done, total, place = self._counts.done, self._counts.total, self._counts.place()
            counts = self._counts.line()
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(20, self._console.width - 30))
        table.add_column(no_wrap=True, min_width=8)
        table.add_column(justify="right", no_wrap=True)
        for model, step, elapsed in working[:room]:
            table.add_row(Text(clean(model)), Text(step.value if step else "waiting", "bold"), duration(elapsed))
        if (more := len(working) - room) > 0:
            table.add_row(Text(f"and {more} more", "dim"), "", "")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(
                total=None if total is None else max(total, 1),
                completed=done,
                width=max(8, min(30, self._console.width // 4)),
            ),
            Text(place),
            Text(duration(now - self._since), "dim"),
        )
        return Group(table, bar, counts)


def summary(console: Console, report: Report, *, manifest: str = "MANIFEST") -> None:
    """Print a report: a row per model (50 at most, failures first), the errors by kind, the totals.

    ``manifest`` is the list's name for the commands to type next. An empty report prints its totals.
    """
    if report.models:
        console.print(_table(report))
        if (more := len(report.models) - _ROWS) > 0:
            console.print(Text(f"and {more} more models; --report FILE has them all", "dim"))
    groups: dict[ErrorKind, list[ModelEntry]] = {}
    for entry in report.models:
        if kind := _kind_of(entry):
            groups.setdefault(kind, []).append(entry)
    for kind, entries in sorted(groups.items(), key=lambda group: -len(group[1])):
        console.print(Text(f"\n{kind.value}: {len(entries)} model{'s' if len(entries) > 1 else ''}", "bold red"))
        for entry in entries[:_EXAMPLES]:
            console.print(Text(f"  {clean(entry.id)}: {_why(entry)}"), soft_wrap=True)
            if entry.error:
                console.print(Text(f"    see it again: {clean(entry.error.reproduce)}", "dim"), soft_wrap=True)
        if (more := len(entries) - _EXAMPLES) > 0:
            console.print(Text(f"  and {more} more", "dim"))
        command = f"ferry batch {quote(clean(manifest))} --retry-failed {kind.value}"
        console.print(Text("  try again: ").append(command, "bold"), soft_wrap=True)
    totals = report.totals
    number = totals.converted + totals.reused + totals.mismatch + totals.failed
    line = Text(f"\n{number} model{'' if number == 1 else 's'} in {duration(report.seconds)}:")
    for status in (Status.CONVERTED, Status.REUSED, Status.MISMATCH, Status.FAILED):
        count: int = getattr(totals, status.value)
        line.append(f"  {count} {status.value}", style=_STYLES[status] if count else "dim")
    console.print(line, soft_wrap=True)


def _print(console: Console, text: Text, **options: Any) -> None:
    """Print; a reader who left, as ``head`` does, must not fail the conversion that reports to him."""
    with suppress(OSError, ValueError, SystemExit):  # Rich exits on a broken pipe.
        console.print(text, **options)


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("status", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("task", no_wrap=True, overflow="ellipsis")
    table.add_column("nodes", justify="right", no_wrap=True)
    table.add_column("max diff", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    # Sorting is stable, so that models of one status keep the manifest's order.
    for entry in sorted(report.models, key=lambda entry: _ORDER.index(entry.status))[:_ROWS]:
        difference = entry.parity.max_abs_diff if entry.parity else None
        table.add_row(
            Text(entry.status.value, _STYLES[entry.status]),
            Text(clean(entry.id)),
            Text(clean(entry.task or "-")),
            str(sum(graph.nodes for graph in entry.graphs)) if entry.graphs else "-",
            "-" if difference is None or math.isnan(difference) else f"{difference:.1e}",
            duration(sum(entry.seconds.values())) if entry.seconds else "-",
        )
    return table


def _ending(entry: ModelEntry) -> Text:
    text = Text(f"{entry.status.value:<9}", _STYLES[entry.status]).append(f" {clean(entry.id)}", "default")
    if kind := _kind_of(entry):
        text.append(f"  {kind.value}: {_why(entry)}", "default")
    elif entry.seconds:
        text.append(f"  {duration(sum(entry.seconds.values()))}", "dim")
    return text


def _kind_of(entry: ModelEntry) -> ErrorKind | None:
    if entry.error:
        return entry.error.kind
    match entry.status:
        case Status.MISMATCH:
            return ErrorKind.MISMATCH
        case Status.FAILED:
            return ErrorKind.INTERNAL
        case Status.CONVERTED | Status.REUSED:
            return None


def _why(entry: ModelEntry) -> str:
    if entry.error:
        return clean(entry.error.message)
    if entry.parity and entry.parity.detail:
        return clean(entry.parity.detail)
    return "no reason was recorded"
