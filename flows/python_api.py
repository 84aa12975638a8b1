"""The batch for Python programs, and for Prefect deployments: one flow with typed parameters.

``from flows import convert_models`` and call it: alone, in a flow of your own, or through a deployment
(``ferry deploy``). It uses the Prefect that the program has; ``convert_models.fn(...)`` does the same without any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from prefect import flow
from prefect.context import FlowRunContext

from flows.batch import BatchEnd, Runner, run_batch
from flows.batch_event import announce
from flows.manifest import read_manifest, read_models
from flows.manifest_keys import ManifestModel, ModelOptions
from flows.settings import Settings, load_settings
from flows.terminal import workers_and_threads
from onnx_config.errors import ErrorKind, FerryError, InputError
from tasks.memory import MemoryGate
from tasks.report import Engine, ModelEntry, Report, Status, Step
from tasks.request import ConversionRequest, Refresh

__all__ = ["NothingVerifiedError", "convert_models", "convert_requests"]

_logger = logging.getLogger("prefect.onnx_ferry")


class NothingVerifiedError(FerryError):
    """Not one model of a batch was verified; the flow run fails with this."""

    def __init__(self, report: Report) -> None:
        first = next((entry.error for entry in report.models if entry.error is not None), None)
        said = "" if first is None else f" The first says: {first.kind}: {first.message}"
        super().__init__(
            f"0 of {len(report.models)} models were verified.{said}",
            kind=ErrorKind.INTERNAL if first is None else first.kind,
        )
        self.report = report
        """What became of each model."""


# The annotations below are what Prefect checks a deployment's parameters by, and what its pages show.
@flow(name="convert_models", persist_result=False, log_prints=False)
def convert_models(
    models: list[str | ManifestModel] | None = None,
    *,
    manifest: Path | None = None,
    options: ModelOptions | None = None,
    output: Path | None = None,
    workers: int | None = None,
    retry_failed: list[ErrorKind] | None = None,
    refresh: Refresh | None = None,
    shards: int | None = None,
    pool: str | None = None,
    memory_slots: str | None = None,
    home: Path | None = None,
    memory_limit: str | None = None,
    timeout: str | None = None,
) -> Report:
    """Convert models and prove that the results answer as PyTorch does; return the report over all.

    A model that fails is an entry of the report and never stops the others. What is converted already is found
    again and costs a look-up. Places and secrets come from the settings (``FERRY_...``, ``ferry.toml``): Prefect
    keeps the parameters of a run where others can read them.

    Args:
        models: Hub ids or folders, or `ManifestModel` for one with options of its own.
        manifest: The list as a file instead; its relative folders are looked up from the current folder.
        options: Options of those in ``models`` that set none.
        output: Folder that gets one folder per model, beside the store; ``None``: the store alone.
        workers: Models at a time; ``None``: one per core, 8 at most.
        retry_failed: Kinds of remembered failures to try again; ``None``: none.
        refresh: ``versions`` also converts again what other versions have converted; ``None``: a commit that is
            converted stays converted.
        shards: Parts to split the batch into, each a run of its own in ``pool``; ``None``: this run converts all.
        pool: Work pool of the parts.
        memory_slots: Concurrency limit on the Prefect server that has a slot for each GiB which all machines together
            may use; ``None``: this machine's own limit is all.
        home: ``FERRY_HOME``.
        memory_limit: ``FERRY_MEMORY_LIMIT``.
        timeout: ``FERRY_TIMEOUT``.

    Raises:
        InputError: If the call or the manifest is wrong; nothing was started.
        NothingVerifiedError: If not one model was verified; it has the report.
    """
    settings = load_settings(home=home, memory_limit=memory_limit, timeout=timeout)
    requests = _requests(models, manifest, options)
    if (shards is None) != (pool is None):
        raise InputError("convert_models was given one of shards and pool. Give both, or neither.")
    report = convert_requests(
        requests,
        settings,
        output=output,
        workers=workers,
        retry_failed=retry_failed,
        refresh=refresh,
        memory_slots=memory_slots,
        shards=shards,
        pool=pool,
    )
    good = report.totals.converted + report.totals.reused
    _logger.info("%s of %s verified", good, len(report.models))
    if not good:
        raise NothingVerifiedError(report)
    return report


def convert_requests(
    requests: tuple[ConversionRequest, ...],
    settings: Settings,
    *,
    output: Path | None,
    workers: int | None,
    retry_failed: list[ErrorKind] | None,
    refresh: Refresh | None,
    memory_slots: str | None = None,
    batch_id: int | None = None,
    shards: int | None = None,
    pool: str | None = None,
) -> Report:
    """Convert models as task runs of the flow run that this is called in; without one, on plain threads.

    With ``shards``, as runs in ``pool``. With ``batch_id``, as a part of that batch.
    """
    number, threads = workers_and_threads(workers)
    runner: Runner | None = None
    gate: MemoryGate | None = None
    if shards is not None and pool is not None:
        from flows.shard_runs import shard_runner

        runner = shard_runner(settings, shards=shards, pool=pool, workers=workers, memory_slots=memory_slots)
    elif FlowRunContext.get() is not None:
        from flows.prefect_engine import run_in_flow

        runner = partial(run_in_flow, workers=number)
    if memory_slots is not None and shards is None:
        from flows.memory_slots import SlotGate

        gate = SlotGate(int(settings.memory_limit), memory_slots)

    def ended(end: BatchEnd) -> None:
        # A run on a schedule is heard of though there was nothing to do: its server has it anyway.
        announce(replace(end, worked=True), threshold=settings.failure_threshold)

    return run_batch(
        requests,
        settings.workspace(threads=threads),
        output=output,
        workers=number,
        engine=Engine.LOCAL if runner is None else Engine.PREFECT,
        retry_failed=None if retry_failed is None else frozenset(retry_failed),
        refresh=refresh,
        listener=_LoggingListener(_logger.info),
        gate=gate,
        runner=runner,
        batch_id=batch_id,
        ended=None if FlowRunContext.get() is None else ended,
    )


def _requests(
    models: list[str | ManifestModel] | None, manifest: Path | None, options: ModelOptions | None
) -> tuple[ConversionRequest, ...]:
    if manifest is not None:
        if models is not None or options is not None:
            raise InputError(
                "convert_models was given a manifest and models or options as well. Give the manifest alone; "
                "options stand in it under 'defaults'."
            )
        return read_manifest(manifest)
    if not models:
        raise InputError("convert_models was given no models. Give a list of ids as models, or a file as manifest.")
    return read_models(models, defaults=options)


class _LoggingListener:
    """Says of each model how it ended."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say

    def model_started(self, model_id: str) -> None: ...

    def step_started(self, model_id: str, step: Step) -> None: ...

    def model_finished(self, entry: ModelEntry) -> None:
        if entry.status is not Status.REUSED:
            self._say("%s: %s", entry.id, entry.status.value)
