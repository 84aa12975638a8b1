"""The command line: what users type, checked before anything starts, and what they read.

Nothing heavy is imported here: ``ferry --help`` answers at once, and each command imports what it runs.
Exit codes: 0 all verified, 1 something was not, 2 the call or the manifest is wrong and nothing was started.
"""

from __future__ import annotations

import json as jsonlib
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from flows.catalog_commands import catalog_app
from flows.dashboard_command import dashboard
from flows.deploy_command import deploy
from flows.manifest import read_manifest, read_model, select_options
from flows.manifest_keys import OLDEST_OPSET, Dtype, Weights
from flows.plan_command import plan
from flows.progress import clean, duration, progress_for, summary
from flows.publish_command import publish
from flows.report_file import ReportingListener, write_report
from flows.settings import Settings, load_settings, why_not_writable
from flows.terminal import (
    complain,
    cores,
    only_a_document,
    plain_console,
    size_text,
    workers_and_threads,
    write_document,
)
from flows.verify_command import verify
from onnx_config.errors import ErrorKind, FerryError, InputError
from onnx_config.variants import Variant
from tasks.report import Engine, ModelEntry, Report, Status, TensorEntry, VariantEntry
from tasks.request import Device, Refresh

if TYPE_CHECKING:
    from flows.batch import Runner
    from onnx_config.spec import ModelSpec, TensorSpec

__all__ = ["app", "batch", "convert", "detect", "doctor"]

_ALL_KINDS = "all"


class _Group(TyperGroup):
    """Ends a command that raised one of our errors with a paragraph instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FerryError as error:
            complain(error)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from error


class _BatchCommand(TyperCommand):
    """Lets ``--retry-failed`` stand without a kind, also right before the manifest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_kinds(args))


def _with_kinds(args: Sequence[str]) -> list[str]:
    """Return the arguments with ``--retry-failed=all`` where no kind follows.

    >>> _with_kinds(["--retry-failed", "models.yaml"])
    ['--retry-failed=all', 'models.yaml']
    >>> _with_kinds(["models.yaml", "--retry-failed", "network"])
    ['models.yaml', '--retry-failed=network']
    """
    done: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*done, word, *rest]
        if word == "--retry-failed":
            # A misspelt kind is still taken as one, so that the message can name the nearest.
            if rest and re.fullmatch(r"[A-Za-z_-]*[A-Za-z_]", rest[0]) and not _is_manifest(rest):
                word = f"{word}={rest.pop(0)}"
            else:
                word = f"{word}={_ALL_KINDS}"
        done.append(word)
    return done


def _is_manifest(rest: Sequence[str]) -> bool:
    """Return whether the next word is an option or a file rather than a kind."""
    return rest[0].startswith("-") or (rest[0] not in list(ErrorKind) and Path(rest[0]).is_file())


app = typer.Typer(
    name="ferry",
    cls=_Group,
    help="Carries Hugging Face models across to ONNX, and proves that they answer the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(catalog_app, name="catalog", help="The registry of what was converted.")

_ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id (org/name, org/name@revision) or a local folder.")
]
_TaskOption = Annotated[
    str | None, typer.Option("--task", metavar="T", help="Task by name; without it, what the config declares.")
]
_TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let code that the model brings run: of a folder, or of a repository at a commit."
    ),
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
_OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Also place the files here, one folder per model.")
]
_HomeOption = Annotated[
    str | None, typer.Option("--home", metavar="DIR", help="Folder of the embedded defaults. [FERRY_HOME]")
]
_CatalogOption = Annotated[
    str | None, typer.Option("--catalog-url", metavar="URL", help="SQLAlchemy URL. [FERRY_CATALOG_URL]")
]
_StoreOption = Annotated[
    str | None, typer.Option("--store-url", metavar="URL", help="Artifact store. [FERRY_STORE_URL]")
]
_MemoryOption = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="SIZE", help="All conversions together, e.g. 12GiB. [FERRY_MEMORY_LIMIT]"),
]
_RefreshOption = Annotated[
    Refresh | None,
    typer.Option("--refresh", help="versions: also convert again what other versions of the libraries have converted."),
]
_TimeoutOption = Annotated[
    str | None, typer.Option("--timeout", metavar="TIME", help="One step of one model, e.g. 1h. [FERRY_TIMEOUT]")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("onnx-ferry")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"onnx-ferry {number}")
        raise typer.Exit


@app.callback()
def _ferry(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Carries Hugging Face models across to ONNX, and proves that they answer the same."""


@app.command()
def detect(
    model: _ModelArgument,
    *,
    task: _TaskOption = None,
    json: _JsonOption = False,
    trust_remote_code: _TrustOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
    store_url: _StoreOption = None,
    memory_limit: _MemoryOption = None,
    timeout: _TimeoutOption = None,
) -> None:
    """Tell what a model takes and gives, from its config alone: no weights are downloaded."""
    settings = load_settings(
        home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit, timeout=timeout
    )
    request = read_model(model, options=select_options(task=task, trust_remote_code=trust_remote_code))
    workspace = settings.workspace(threads=cores())
    from tasks.detect import detect_model

    try:
        with only_a_document(json):
            spec = detect_model(request, workspace)
    except FerryError as error:
        # The call was right, the model is not: 1, also where the error is about the model's id.
        complain(error)
        raise typer.Exit(1) from error
    if json:
        write_document(jsonlib.dumps(spec.to_json(), indent=2))
    else:
        _print_spec(plain_console(), model, spec)


app.command()(plan)
app.command()(verify)
app.command()(deploy)
app.command()(publish)
app.command()(dashboard)


@app.command()
def convert(
    model: _ModelArgument,
    *,
    task: _TaskOption = None,
    output: _OutputOption = None,
    device: Annotated[Device, typer.Option("--device", help="Where parity runs; auto is CUDA where it is.")] = (
        Device.AUTO
    ),
    json: _JsonOption = False,
    opset: Annotated[
        int | None,
        typer.Option("--opset", min=OLDEST_OPSET, help="ONNX opset; without it, the newest that ONNX Runtime runs."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Element type of the weights.")] = Dtype.FLOAT32,
    no_simplify: Annotated[bool, typer.Option("--no-simplify", help="Keep the graph as exported.")] = False,
    weights: Annotated[
        Weights, typer.Option("--weights", help="link: the graph points into the checkpoint's files, hard-linked.")
    ] = Weights.COPY,
    variant: Annotated[
        list[Variant] | None,
        typer.Option("--variant", help="Also in fewer bits, beside the float32 graph; may be given several times."),
    ] = None,
    trust_remote_code: _TrustOption = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
    ] = None,
    refresh: _RefreshOption = None,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
    store_url: _StoreOption = None,
    memory_limit: _MemoryOption = None,
    timeout: _TimeoutOption = None,
) -> None:
    """Convert one model and check it against PyTorch."""
    settings = load_settings(
        home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit, timeout=timeout
    )
    options = select_options(
        task=task,
        device=device,
        opset=opset,
        dtype=dtype.value,
        simplify=not no_simplify,
        weights=weights.value,
        trust_remote_code=trust_remote_code,
        variants=tuple(kind for kind in Variant if kind in (variant or ())),
    )
    request = read_model(model, revision=revision, options=options)
    workspace = settings.workspace(threads=cores())
    _check_places(settings, output=output, report=None)
    from tasks.pipeline import convert_model

    started_at, start = datetime.now(UTC), time.monotonic()
    console = plain_console()
    with only_a_document(json), progress_for(console, 1, json=json, verbose=True) as listener:
        entry = convert_model(request, workspace, output=output, listener=listener, refresh=refresh)
    report = Report.of([entry], started_at=started_at, seconds=time.monotonic() - start)
    if json:
        write_document(report.to_json())
    else:
        _print_entry(console, entry)
    if entry.error:
        typer.echo(f"Error: {clean(entry.error.message)}", err=True)
    raise typer.Exit(0 if report.all_verified else 1)


def _read_retry_failed(value: str | None) -> str | None:
    if value is None or value == _ALL_KINDS or value in list(ErrorKind):
        return value
    close = get_close_matches(value.lower(), [kind.value for kind in ErrorKind], n=1, cutoff=0.5)
    nearest = f"did you mean {close[0]!r}?" if close else f"the kinds are {', '.join(ErrorKind)}"
    raise typer.BadParameter(f"{value!r} is no kind of error; {nearest}")


def _kinds(retry_failed: str | None) -> frozenset[ErrorKind] | None:
    """Return which failures are tried again; ``None``: those that no batch remembers."""
    match retry_failed:
        case None:
            return None
        case _ if retry_failed == _ALL_KINDS:
            return frozenset(ErrorKind)
        case kind:
            return frozenset({ErrorKind(kind)})


@app.command(cls=_BatchCommand)
def batch(
    manifest: Annotated[
        Path | None,
        typer.Argument(metavar="MANIFEST", help="YAML, JSON, or text with one id per line.", show_default=False),
    ] = None,
    *,
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch",
            metavar="ID|latest",
            help="Follow a batch that runs elsewhere, by its number, until it ends; in place of a manifest.",
        ),
    ] = None,
    output: _OutputOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Models at a time; without it, one per core, 8 at most."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the report here, as JSON.")
    ] = None,
    retry_failed: Annotated[
        str | None,
        typer.Option(
            "--retry-failed",
            metavar="[KIND]",
            callback=_read_retry_failed,
            help="Try again what an earlier batch could not convert; with KIND only those failures.",
        ),
    ] = None,
    refresh: _RefreshOption = None,
    shards: Annotated[
        int | None,
        typer.Option("--shards", min=1, metavar="N", help="Split into N parts, each run by a worker of --pool."),
    ] = None,
    pool: Annotated[
        str, typer.Option("--pool", metavar="NAME", help="Prefect work pool whose workers run the parts.")
    ] = "ferry",
    engine: Annotated[Engine, typer.Option("--engine", help="Who runs the steps.")] = Engine.PREFECT,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
    store_url: _StoreOption = None,
    memory_limit: _MemoryOption = None,
    timeout: _TimeoutOption = None,
) -> None:
    """Convert every model of a manifest; one failure never stops the rest."""
    settings = load_settings(
        home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit, timeout=timeout
    )
    if watch is not None:
        given = (manifest, output, workers, retry_failed, refresh, shards)
        if any(one is not None for one in given):
            raise InputError(
                "--watch follows a batch that somebody else started: leave out the manifest, and what says how to "
                "convert it. --report, --home and --catalog-url go with it."
            )
        from flows.watch import follow

        console = plain_console()
        _end(console, follow(watch, settings.workspace(), console), report)
    if manifest is None:
        raise InputError(
            "Missing argument 'MANIFEST': name a list such as models.yaml, or a batch to follow, --watch latest."
        )
    requests = read_manifest(manifest)
    asked_workers = workers
    workers, threads = workers_and_threads(workers)
    workspace = settings.workspace(threads=threads)
    _check_places(settings, output=output, report=report)
    from flows.batch import run_batch
    from flows.batch_event import announce

    runner: Runner | None = None
    if shards is not None:
        if engine is Engine.LOCAL:
            raise InputError("--shards needs Prefect to run the parts; leave out --engine local, or --shards.")
        from flows.shard_runs import shard_runner

        runner = shard_runner(settings, shards=shards, pool=pool, workers=asked_workers)
    console = plain_console()
    with progress_for(console, len(requests)) as listener:
        done = run_batch(
            requests,
            workspace,
            output=output,
            workers=workers,
            engine=engine,
            retry_failed=_kinds(retry_failed),
            refresh=refresh,
            runner=runner,
            listener=listener if report is None else ReportingListener(listener, report),
            ended=partial(announce, threshold=settings.failure_threshold),
        )
    summary(console, done, manifest=str(manifest))
    _end(console, done, report)


def _end(console: Console, done: Report, report: Path | None) -> NoReturn:
    """Write the report and exit as the report says."""
    if report is not None:
        try:
            write_report(report, done)
        except InputError as error:
            # The work is done, so this is not the 2 that says that nothing was started.
            complain(error)
            raise typer.Exit(1) from error
        console.print(Text(f"report: {clean(report)}"), soft_wrap=True)
    raise typer.Exit(0 if done.all_verified else 1)


@app.command()
def doctor(
    *,
    json: _JsonOption = False,
    home: _HomeOption = None,
    catalog_url: _CatalogOption = None,
    store_url: _StoreOption = None,
    memory_limit: _MemoryOption = None,
    timeout: _TimeoutOption = None,
) -> None:
    """Tell what this installation can do, and what to fix."""
    from flows.doctor import examine, print_findings

    settings = load_settings(
        home=home, catalog_url=catalog_url, store_url=store_url, memory_limit=memory_limit, timeout=timeout
    )
    with only_a_document(json):
        findings = examine(settings)
    if json:
        write_document(jsonlib.dumps(findings.to_json(), indent=2))
    else:
        print_findings(plain_console(), findings)
    raise typer.Exit(0 if findings.healthy else 1)


def _check_places(settings: Settings, *, output: Path | None, report: Path | None) -> None:
    """Raise `InputError` if a place that is written to at the end could not be; nothing is made."""
    places: list[tuple[str, Path]] = [("--home", settings.home)]
    if output is not None:
        places.append(("--output", output))
    if report is not None:
        if report.is_dir():
            raise InputError(
                f"--report {str(report)!r} is a folder. Name a file in it, such as {report / 'report.json'}."
            )
        places.append(("--report", report.parent))
    for flag, folder in places:
        if reason := why_not_writable(folder):
            raise InputError(f"{flag}: nothing can be written to {str(folder)!r}: {reason}. Choose another folder.")


def _print_spec(console: Console, model: str, spec: ModelSpec) -> None:
    facts = Table.grid(padding=(0, 2))
    size = (
        "not counted" if spec.size_bytes is None else f"{spec.parameters:,} ({size_text(spec.size_bytes)} as float32)"
    )
    family = "" if spec.task_family == spec.task else f" (family {clean(spec.task_family)})"
    for name, value in (
        ("model", model),
        ("task", f"{spec.task}{family}"),
        ("type", spec.model_type),
        ("class", spec.architecture),
        ("preprocessor", spec.preprocessor or "none declared"),
        ("parameters", size),
    ):
        facts.add_row(Text(name, "bold"), Text(clean(value)))
    console.print(facts)
    for title, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs), ("cache", spec.cache)):
        if not tensors and title == "cache":
            continue
        console.print()
        console.print(_tensor_table(title, tensors))
    if spec.axis_ranges:
        table = Table("axis", "smallest", "largest", box=None, pad_edge=False, header_style="bold")
        for axis, (smallest, largest) in spec.axis_ranges.items():
            table.add_row(Text(clean(axis)), str(smallest), "no limit known" if largest is None else str(largest))
        console.print()
        console.print(table)
    for kind, phrases in (("declared", spec.declared), ("proven", spec.proven), ("assumed", spec.assumed)):
        for phrase in phrases:
            console.print(Text(f"{kind}: {clean(phrase)}"), soft_wrap=True)


def _tensor_table(title: str, tensors: Sequence[TensorSpec] | Sequence[TensorEntry]) -> Table:
    table = Table(title, "dtype", "shape", box=None, pad_edge=False, header_style="bold")
    for tensor in tensors:
        shape = ", ".join(clean(size) for size in tensor.shape)
        table.add_row(Text(clean(tensor.name)), Text(clean(tensor.dtype)), Text(f"({shape})"))
    return table


def _variant_text(made: VariantEntry) -> str:
    """Return a variant's verdict in a few words."""
    parity = made.parity
    if parity is None:
        return "not made"
    said = [parity.verdict.value]
    if made.size_bytes:
        said.append(size_text(made.size_bytes))
    if parity.relative_error is not None and parity.tolerance is not None:
        said.append(f"off by {parity.relative_error:.2%} of {parity.tolerance:.2%} allowed")
    if parity.agreement is not None:
        said.append(f"{parity.agreement.rate:.1%} of {parity.agreement.choices} choices alike")
    return ", ".join(said)


def _print_entry(console: Console, entry: ModelEntry) -> None:
    facts = Table.grid(padding=(0, 2))
    parity = entry.parity
    rows: list[tuple[str, str | None]] = [
        ("model", f"{entry.id}" + (f" at {entry.revision}" if entry.revision else "")),
        ("status", entry.status.value),
        ("task", entry.task),
        ("class", entry.architecture),
        ("quarantine" if entry.status is Status.MISMATCH else "artifact", entry.artifact),
    ]
    rows += [
        (f"graph {graph.role}", f"{graph.nodes} nodes (exported {graph.nodes_before_simplify}), opset {graph.opset}")
        for graph in entry.graphs
    ]
    if parity:
        difference = "" if parity.max_abs_diff is None else f", max difference {parity.max_abs_diff:.1e}"
        tolerance = "" if parity.tolerance is None else f" of {parity.tolerance:.1e} allowed"
        rows.append(
            ("parity", f"{parity.verdict.value} on {parity.device}, {parity.shapes} shapes{difference}{tolerance}")
        )
        rows.append(("axes proven", ", ".join(parity.axes_proven) or None))
        rows.append(("differs", parity.detail))
    rows += [(f"variant {made.variant}", _variant_text(made)) for made in entry.variants]
    rows.append(("seconds", ", ".join(f"{step.value} {duration(spent)}" for step, spent in entry.seconds.items())))
    rows += [("note", note) for note in entry.notes]
    if entry.error:
        rows.append(("failed at", f"{entry.error.step.value}, {entry.error.kind.value}"))
        rows.append(("see it again", entry.error.reproduce))
    for name, value in rows:
        if value:
            facts.add_row(Text(name, "bold"), Text(clean(value)))
    console.print(facts)
