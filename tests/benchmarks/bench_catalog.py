"""Ask a large catalog all that the dashboard and ``ferry catalog`` ask, and print what each question takes.

    python tests/benchmarks/bench_catalog.py [--conversions 1000000] [--models 300000] [--only REGEX]
                                             [--databases sqlite postgresql] [--samples 40] [--pages] [--workdir DIR]

A catalog of that size is made by rule and migrated from the schema before there were triggers, once for each database;
with ``--workdir`` it is kept and found again. Prints the median and the 95th percentile of every question in
milliseconds, each asked in a transaction of its own as a request does, and the processor time that it took here and in
the server, which says more on a machine that has other work. Marks what takes more than 100, and names every plan that
reads a large table from end to end. With ``--pages`` it starts ``ferry dashboard`` and asks for every page:
the first byte in milliseconds (limit 200), and the page's kB with all that it loads, without the charts' library
(limit 300). Exit code 1: something was over its limit. Making a million takes some ten minutes, asking five.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import psutil
from sqlalchemy import Engine, text

sys.path.insert(0, str(Path(__file__).parents[2]))

from db import make_engine, schema_version, session_scope
from db.migrate import HEAD
from db.models import Base
from tests.db.bulk import RARE_WORD, BulkCatalog, fill_in_bulk, model_id
from tests.db.catalog_queries import QUERIES, Query
from tests.db.plans import plan_of, statements_of
from tests.postgres import PostgresServer

_LIMIT_MS = 100.0
_FIRST_BYTE_MS = 200.0
_PAGE_KB = 300.0
# A table with fewer rows is read whole as fast as by an index.
_LARGE = 5000
# What a server of that size would be given; the defaults are those of a test.
_POSTGRES = ("shared_buffers=1GB", "maintenance_work_mem=512MB", "max_wal_size=8GB", "work_mem=16MB")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversions", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=300_000)
    parser.add_argument("--only", default="", help="regular expression over the names of questions")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--pages", action="store_true", help="measure the dashboard's pages instead")
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args(arguments)
    work = options.workdir or Path(tempfile.mkdtemp(prefix="onnx-ferry-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    # PostgreSQL's user has to get in.
    work.chmod(0o755)
    over = 0
    for kind in options.databases:
        with database(kind, work) as engine:
            catalog = made(engine, work / f"{kind}.json", options.conversions, options.models)
            print(f"\n{kind}: {catalog.conversions:,} conversions of {catalog.models:,} models")
            if options.pages:
                over += measure_pages(engine, catalog, samples=options.samples, only=options.only)
            else:
                over += measure(engine, catalog, samples=options.samples, only=options.only)
    print(f"\n{over} over their limit")
    return 1 if over else 0


@contextmanager
def database(kind: str, work: Path) -> Iterator[Engine]:
    if kind == "sqlite":
        engine = make_engine(f"sqlite:///{work}/sqlite/catalog.db")
        yield engine
        engine.dispose()
        return
    server = PostgresServer(*_POSTGRES, folder=work / "postgresql")
    try:
        server.start()
        engine = make_engine(server.url())
        yield engine
        engine.dispose()
    finally:
        server.stop()


def made(engine: Engine, note: Path, conversions: int, models: int) -> BulkCatalog:
    """Return the catalog, made where it is not there yet."""
    if not note.exists():
        start = time.monotonic()
        catalog = fill_in_bulk(engine, conversions=conversions, models=models)
        print(f"made in {time.monotonic() - start:.0f} s", flush=True)
        note.write_text(json.dumps(asdict(catalog), default=str), encoding="utf-8")
    elif schema_version(engine) != HEAD:
        from db import upgrade

        start = time.monotonic()
        upgrade(engine)
        print(f"migrated in {time.monotonic() - start:.0f} s", flush=True)
    if engine.dialect.name == "postgresql":
        # As the server does by itself, some minutes after many rows were written.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    values = json.loads(note.read_text(encoding="utf-8"))
    moments = {name: datetime.fromisoformat(values[name]) for name in ("began_at", "ended_at")}
    return BulkCatalog(**(values | moments))


def measure(engine: Engine, catalog: BulkCatalog, *, samples: int, only: str) -> int:
    large = large_tables(engine)
    over = 0
    # As the dashboard does before it serves: what is imported is not looked through again.
    gc.collect()
    gc.freeze()
    print(f"{'question':55}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms':>9}")
    for name, query in QUERIES.items():
        if not re.search(only, name):
            continue
        # The first one fills caches, SQLAlchemy's of compiled statements too.
        ask_catalog(engine, query, catalog, 0)
        before = processor_seconds(engine)
        taken = sorted(ask_catalog(engine, query, catalog, number) for number in range(1, samples + 1))
        processor = 1000 * (processor_seconds(engine) - before) / samples
        p50, p95 = statistics.median(taken), taken[min(len(taken) - 1, int(0.95 * len(taken)))]
        scans = whole_reads(engine, catalog, name, large)
        over += p95 > _LIMIT_MS
        marks = ["over"] * (p95 > _LIMIT_MS) + [f"reads {table} whole" for table in scans]
        print(f"{name:55}{p50:9.1f}{p95:9.1f}{processor:9.1f}  {', '.join(marks)}", flush=True)
    return over


def ask_catalog(engine: Engine, query: Query, catalog: BulkCatalog, number: int) -> float:
    """Return the milliseconds that a question took."""
    start = time.perf_counter()
    with session_scope(engine, read_only=True) as session:
        query(session, catalog, number)
    return 1000 * (time.perf_counter() - start)


def processor_seconds(engine: Engine) -> float:
    """Return the processor time of this process and of the server's that answers it, without its helpers."""
    own = time.process_time()
    if engine.dialect.name == "sqlite":
        return own
    with engine.connect() as connection:
        times = psutil.Process(connection.execute(text("SELECT pg_backend_pid()")).scalar_one()).cpu_times()
    return own + times.user + times.system


def large_tables(engine: Engine) -> set[str]:
    found = set()
    with session_scope(engine, read_only=True) as session:
        for table in Base.metadata.sorted_tables:
            inner = f"SELECT 1 FROM {table.name} LIMIT {_LARGE}"
            if session.execute(text(f"SELECT count(*) FROM ({inner}) AS rows")).scalar_one() == _LARGE:
                found.add(table.name)
    return found


def whole_reads(engine: Engine, catalog: BulkCatalog, name: str, large: set[str]) -> list[str]:
    """Return the large tables that a question's plans read from end to end."""
    with session_scope(engine, read_only=True) as session:
        statements = statements_of(session, lambda session: QUERIES[name](session, catalog, 1))
        steps = [step for statement in statements for step in plan_of(session.connection(), statement)]
    return sorted({step.removeprefix("scan ") for step in steps if step.startswith("scan ")} & large)


def measure_pages(engine: Engine, catalog: BulkCatalog, *, samples: int, only: str) -> int:
    """Ask a dashboard in a process of its own for its pages, each several times."""
    over = 0
    print(f"{'page':55}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms':>9}{'kB':>9}{'with assets':>12}")
    with dashboard(engine) as (port, process):
        assets = sum(len(body) for name, (_, body) in own_assets(port).items() if "uplot" not in name) / 1000
        for path in pages(catalog):
            if not re.search(only, path):
                continue
            first, body = ask(port, path.replace("{n}", "1"))
            rest, before = [], seconds_of(process, engine)
            for number in range(1, samples + 1):
                first_byte, body = ask(port, path.replace("{n}", str(1 + number * 7919 % catalog.conversions)))
                rest.append(first_byte)
            processor = 1000 * (seconds_of(process, engine) - before) / samples
            rest.sort()
            p50, p95 = statistics.median(rest), rest[min(len(rest) - 1, int(0.95 * len(rest)))]
            size = len(body) / 1000
            marks = ["slow"] * (p95 > _FIRST_BYTE_MS) + ["large"] * (size + assets > _PAGE_KB)
            over += len(marks)
            print(
                f"{path:55}{p50:9.1f}{p95:9.1f}{processor:9.1f}{size:9.1f}{size + assets:12.1f}  {', '.join(marks)}"
                f"{f' (first time {first:.0f} ms)' if first > _FIRST_BYTE_MS else ''}",
                flush=True,
            )
    return over


def pages(catalog: BulkCatalog) -> list[str]:
    some_id = quote(model_id(catalog.models // 2, catalog.models))
    found = ["/", *(f"/?period={period}" for period in ("24h", "7d", "90d", "all"))]
    found += [
        "/?period=all&task=fill-mask",
        "/?period=all&model_type=bert",
        "/?period=all&task=fill-mask&model_type=bert",
    ]
    found += ["/models", "/models?every=true", "/models?status=failed", "/models?error_kind=timeout&task=fill-mask"]
    found += [f"/models?q={word}" for word in ("bert", RARE_WORD, "oldorg%2F", "absent-one", "t5", "zq", some_id)]
    middle = catalog.began_at + (catalog.ended_at - catalog.began_at) / 2
    found.append(f"/models?after={middle:%Y%m%dT%H%M%S.%f}-{catalog.conversions // 2}")
    found += ["/models/{n}", f"/compare?a={catalog.conversions}&b={catalog.conversions // 2}", "/runs"]
    found += [f"/runs?offset={catalog.batches - 1}", f"/runs/{catalog.batches}", f"/runs/{catalog.batches // 2}"]
    found += [
        "/api/v1/overview",
        "/api/v1/models",
        "/api/v1/models?q=bert",
        "/api/v1/models/{n}",
        "/api/v1/runs",
        "/metrics",
    ]
    return [*found, "/healthz", "/openapi.json"]


def seconds_of(process: psutil.Process, engine: Engine) -> float:
    """Return the processor time of the dashboard, and of all of the server's processes."""
    found = [process]
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            backend = psutil.Process(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        found += backend.parent().children()
    times = [one.cpu_times() for one in found]
    return sum(one.user + one.system for one in times)


@contextmanager
def dashboard(engine: Engine) -> Iterator[tuple[int, psutil.Process]]:
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "flows.entry", "dashboard", "--port", "0", "--catalog-url", url]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":(\d+)/", line)
        if found is None:
            raise SystemExit(line + process.stderr.read())
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    ask(int(found[1]), "/healthz")
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield int(found[1]), psutil.Process(process.pid)
        finally:
            process.terminate()


def ask(port: int, path: str) -> tuple[float, bytes]:
    """Return the milliseconds to the first byte of an answer, and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        start = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        first = answer.read(1)
        taken = 1000 * (time.perf_counter() - start)
        body = first + answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status}: {body[:500]!r}")
    return taken, body


def own_assets(port: int) -> dict[str, tuple[float, bytes]]:
    """Return the files that every page loads."""
    _, page = ask(port, "/runs")
    names = re.findall(rb'(?:src|href)="(/static/[^"]+)"', page)
    return {name.decode(): ask(port, name.decode()) for name in set(names)}


if __name__ == "__main__":
    raise SystemExit(main())
