"""What a batch costs beside the conversions themselves: steps that only write small files stand in for the real ones.

    python tests/benchmarks/bench_orchestration.py [--counts 10 100]

Prints, for each number of models, milliseconds per model: on plain threads, as a Prefect flow with its embedded server
up and running, and of the same models again, which are looked up and reused.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flows import batch
from flows.prefect_environment import missing_settings
from flows.prefect_server import EmbeddedServer
from tasks.report import Engine, Status
from tasks.request import ConversionRequest, SilentListener, Workspace

WORKERS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100], metavar="N", help="default: 10 100")
    options = parser.parse_args(arguments)
    # Imported late: the tests' own module.
    from tests.faults.harness import workspace
    from tests.tasks.test_pipeline import Files

    fake = Files().steps
    batch.convert_one.__kwdefaults__ = {"steps": fake}
    print(f"{'models':>6} {'how':24}{'wall':>10}{'per model':>14}{'CPU per model':>16}")
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        home = folder / "prefect-home"
        home.mkdir()
        os.environ.pop("PREFECT_API_URL", None)
        os.environ.update(missing_settings(os.environ, home))
        server = EmbeddedServer(home)
        server.wait_until_ready()
        # Named, so that each batch takes it instead of starting its own.
        os.environ["PREFECT_API_URL"] = server.url
        _as_tasks(fake)
        for count in options.counts:
            for engine in Engine:
                places = workspace(folder / f"{engine}-{count}")
                requests = _models(folder / f"{engine}-{count}-models", count)
                _timed(f"{engine.value}, first run", requests, places, engine, Status.CONVERTED)
                _timed(f"{engine.value}, again", requests, places, engine, Status.REUSED)
    return 0


def _as_tasks(fake: object) -> None:
    """Put the stand-ins behind Prefect's step tasks, with all of the policy that these have."""
    from tasks import prefect_tasks

    for step in ("detect", "export", "simplify", "parity", "register"):
        getattr(prefect_tasks, f"{step}_task").fn = getattr(fake, step)


def _models(root: Path, count: int) -> list[ConversionRequest]:
    requests = []
    for number in range(count):
        model = root / f"m{number:04}"
        model.mkdir(parents=True)
        (model / "config.json").write_text(f'{{"model_type": "bert", "number": {number}}}', encoding="utf-8")
        (model / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        requests.append(ConversionRequest(model_id=str(model)))
    return requests


def _timed(how: str, requests: list[ConversionRequest], places: Workspace, engine: Engine, expected: Status) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    report = batch.run_batch(
        requests,
        places,
        output=None,
        workers=WORKERS,
        engine=engine,
        retry_failed=None,
        listener=SilentListener(),
    )
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    assert {entry.status for entry in report.models} == {expected}, report.models[0].error
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    each, work = (1000 * seconds / len(requests) for seconds in (wall, cpu))
    print(f"{len(requests):6} {how:24}{wall:8.1f} s{each:11.1f} ms{work:13.1f} ms", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
