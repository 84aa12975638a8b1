"""A batch on plain threads: the engine without Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from onnx_config.export import isolate
from tasks.report import ModelEntry
from tasks.request import ConversionRequest

__all__ = ["run_locally"]


def run_locally(
    requests: Iterable[ConversionRequest],
    convert: Callable[[ConversionRequest], ModelEntry],
    *,
    workers: int,
) -> dict[ConversionRequest, ModelEntry]:
    """Call ``convert`` for every request, ``workers`` at a time; return the entries.

    An interruption kills the children in work and is raised again.
    """
    done: dict[ConversionRequest, ModelEntry] = {}
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="ferry") as pool:
        futures = {pool.submit(convert, request): request for request in requests}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            isolate.kill_all()
            raise
    return done
