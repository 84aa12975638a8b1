"""A whole site on one machine, and what goes wrong at one: the story that `test_production` tells in small.

PostgreSQL for the catalog, a bucket, a Prefect server, a worker that leads and three that convert,
each with a home of its own, as if on machines of their own. A scheduled deployment takes up a list; meanwhile workers
are killed with all that they have started, the database is killed and started again, and the store refuses everybody.

    python -m tests.faults.production --models 60 --outage 20

prints what came of it, and how much faster two workers are than one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from tests.bucket import artifacts_in, assert_bucket_whole
from tests.faults.harness import ROOT, tiny, write_manifest
from tests.loopback import prefect_server
from tests.postgres import PostgresServer
from tests.s3_server import S3Server

__all__ = ["Site", "Story", "measure", "open_site", "prepare", "tell"]

STRUCTURES = ("patchtst-model", "bert-model", "vit-model", "gpt2-model")
STORE = "s3://ferry/onnx"
LEADING, CONVERTING = "leading", "converting"
# Far more than it takes: what hangs shall end, and say where.
_LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What is told: how much, and how bad."""

    models: int = 60
    """Models in the list; of a handful of structures, in turn."""

    structures: int = len(STRUCTURES)
    """How many of them."""

    workers: int = 3
    """Workers that convert, each one model at a time."""

    shards: int = 6
    """Parts of the batch."""

    outage_seconds: float = 20.0
    """For how long the store refuses."""

    restart_seconds: float = 3.0
    """For how long the database is away."""


@dataclass(slots=True)
class Worker:
    """A worker, and its home."""

    name: str
    pool: str
    home: Path
    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def kill(self) -> None:
        """End it with all that it has started, as a machine that loses its power."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.process.pid).suspend()
        for member in [*self.family()]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.kill()
        self.process.wait()

    def steps(self) -> list[str]:
        """Return which steps the models in work have reached; an empty list where there is none."""
        return sorted(folder.name for folder in (self.home / "tmp").glob("*/*/"))


@dataclass(slots=True)
class Site:
    """Servers that run, and who works there."""

    folder: Path
    database: PostgresServer
    bucket: S3Server
    api: str
    catalog: str
    workers: dict[str, Worker] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    """What happened, and when."""
    started: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        self.events.append(f"{time.monotonic() - self.started:7.1f} s  {what}")
        sys.stderr.write(f"{self.events[-1]}\n")

    def environment(self, home: Path) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("PREFECT_", "FERRY_"))}
        own = {
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(ROOT),
            "FERRY_HOME": str(home),
            "FERRY_CATALOG_URL": self.catalog,
            "FERRY_STORE_URL": STORE,
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_HUB_OFFLINE": "1",
        }
        return kept | own | self.bucket.variables()

    def start_worker(self, name: str, pool: str, *, home: Path | None = None) -> None:
        home = home or self.folder / "machines" / name
        home.mkdir(parents=True, exist_ok=True)
        with (home / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"],
                cwd=home,
                env=self.environment(home),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers[name] = Worker(name, pool, home, process)

    def ferry(self, *words: str, home: str = "desk", timeout: float = _LONGEST_SECONDS) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.entry", *words],
            cwd=self.folder,
            env=self.environment(self.folder / "machines" / home),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self) -> None:
        """Register what `prefect.yaml` says, again where the server is too busy to answer: nothing is there twice."""
        for attempt in range(1, 6):
            try:
                self.ferry("deploy", "prefect.yaml")
                return
            except AssertionError as error:
                if attempt == 5 or "went away" not in str(error):
                    raise
                time.sleep(5)

    def ask(self, what: str, **query: Any) -> Any:
        return httpx.post(f"{self.api}/{what}", json=query, trust_env=False, timeout=30).raise_for_status().json()

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        return self.database.run(statement, self.catalog.rpartition("/")[2])

    def converted(self) -> int:
        try:
            return int(self.rows("SELECT count(*) FROM conversions WHERE status = 'converted'")[0][0])
        # Before there is a catalog.
        except psycopg.errors.UndefinedTable:
            return 0

    def new_catalog(self) -> None:
        self.catalog = self.database.create()


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Start the servers; nothing of theirs is left at the end."""
    with ExitStack() as opened:
        database = PostgresServer()
        opened.callback(database.remove)
        database.start()
        bucket = opened.enter_context(S3Server())
        bucket.make_bucket("ferry")
        # On SQLite: of PostgreSQL it wants an extension, pg_trgm, which that of the tests has not.
        api = opened.enter_context(_prefect_server(folder / "prefect-server"))
        site = Site(folder, database, bucket, api, database.create())
        opened.callback(lambda: [worker.kill() for worker in site.workers.values()])
        yield site


@contextmanager
def _prefect_server(home: Path) -> Iterator[str]:
    home.mkdir(parents=True)
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    with prefect_server(home, kept | {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": leases}) as url:
        yield url


def prepare(site: Site, story: Story) -> list[Path]:
    """Make the models and their list, ``models.json``, and register pools and deployment."""
    models = [
        tiny(site.folder / "models" / f"m{number:03}", STRUCTURES[number % story.structures], seed=number)
        for number in range(story.models)
    ]
    write_manifest(site.folder / "models.json", models)
    (site.folder / "prefect.yaml").write_text(_deployments(story), encoding="utf-8")
    site.deploy()
    return models


def _deployments(story: Story) -> str:
    """Return the deployment file: JSON is YAML."""
    deployment = {
        "name": "site",
        "manifest": "models.json",
        "work_pool": LEADING,
        "schedules": [{"interval": 10}],
        "parameters": {"shards": story.shards, "pool": CONVERTING, "workers": 1},
        "concurrency_limit": 1,
        "collision": "cancel_new",
    }
    return json.dumps({"work_pools": [{"name": LEADING}, {"name": CONVERTING}], "deployments": [deployment]})


def wait_for(condition: Callable[[], Any], *, seconds: float = 300.0, what: str) -> Any:
    """Wait until something is so; a server that is away for the moment says nothing."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx.HTTPError, psycopg.OperationalError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.2)


def tell(site: Site, story: Story) -> dict[str, Any]:
    """Tell the story; return its figures. Whatever is not as it should be at the end raises."""
    models = prepare(site, story)
    site.started = time.monotonic()
    site.start_worker("lead", LEADING)
    names = [f"w{number}" for number in range(1, story.workers + 1)]
    for name in names:
        site.start_worker(name, CONVERTING)
    run = wait_for(lambda: _scheduled(site, ("RUNNING",)), what="the scheduled run begins")[0]
    site.say(f"the server has scheduled {run['name']}, and a worker runs it")
    # No further one: what is still to come would only look.
    httpx.post(f"{site.api}/deployments/{run['deployment_id']}/pause_deployment", trust_env=False).raise_for_status()

    def after(share: float) -> None:
        wanted = max(1, round(share * story.models))
        wait_for(lambda: site.converted() >= wanted, seconds=_LONGEST_SECONDS, what=f"{wanted} models are converted")
        site.say(f"{site.converted()} models are converted")

    def kill() -> Worker:
        def working() -> Worker | None:
            return next((worker for worker in site.workers.values() if worker.steps()), None)

        worker: Worker = wait_for(working, what="a worker is in the middle of a model")
        steps = worker.steps()
        worker.kill()
        del site.workers[worker.name]
        site.say(f"{worker.name} is killed in the middle of a model ({', '.join(steps)})")
        time.sleep(2)
        return worker

    after(0.1)
    # As a supervisor does, on the same machine.
    killed = kill()
    site.start_worker(killed.name, CONVERTING, home=killed.home)
    after(0.25)
    site.database.stop(hard=True)
    site.say("the database is killed")
    time.sleep(story.restart_seconds)
    site.database.start()
    site.say("it is there again")
    after(0.4)
    # Its machine is gone for good; another takes its place, with nothing on it.
    killed = kill()
    site.start_worker(f"{killed.name}-next", CONVERTING)
    after(0.6)
    site.bucket.before = lambda _method, _path: "refuse"
    site.say("the store refuses")
    time.sleep(story.outage_seconds)
    site.bucket.before = lambda _method, _path: "pass"
    site.say("it takes and gives again")
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_for(lambda: _state(site, run["id"])["type"] in final, seconds=_LONGEST_SECONDS, what="the run ends")
    seconds = time.monotonic() - site.started
    state = _state(site, run["id"])
    site.say(f"the run has ended: {state['type']}")
    assert state["type"] == "COMPLETED", state
    figures = _checked(site, models) | {"seconds": round(seconds, 1), "runs_of_parts": _parts(site)}
    site.say("everything was looked at")
    # Once more from a machine that has seen nothing of all this: nothing is left to do.
    began = time.monotonic()
    site.ferry("batch", "models.json", "--engine", "local", "--report", "again.json")
    report = json.loads((site.folder / "again.json").read_text(encoding="utf-8"))
    assert report["totals"] == {"converted": 0, "reused": story.models, "failed": 0, "mismatch": 0}
    assert {model["parity"]["verdict"] for model in report["models"]} == {"verified"}
    return figures | {"seconds_to_look_again": round(time.monotonic() - began, 1)}


def _scheduled(site: Site, types: tuple[str, ...]) -> list[dict[str, Any]]:
    query = {"state": {"type": {"any_": list(types)}}, "deployment_id": {"is_null_": False}}
    found = site.ask("flow_runs/filter", flow_runs=query)
    return [run for run in found if run["auto_scheduled"]]


def _state(site: Site, run: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{site.api}/flow_runs/{run}", trust_env=False, timeout=30).json()["state"]
    return found


def _parts(site: Site) -> int:
    return len([run for run in site.ask("flow_runs/filter") if " part " in run["name"]])


def _checked(site: Site, models: list[Path]) -> dict[str, Any]:
    """Compare catalog, bucket and homes with each other; return what the catalog counts."""
    rows = site.rows(
        "SELECT m.model_id, c.status, c.key FROM conversions c JOIN source_models m ON m.id = source_model_id"
    )
    statuses = Counter(status for _, status, _ in rows)
    assert statuses == {"converted": len(models)}, rows
    assert sorted(model for model, _, _ in rows) == sorted(map(str, models)), "each once, and none is missing"
    verdicts = site.rows("SELECT verdict, count(*) FROM parity_checks GROUP BY verdict")
    assert verdicts == [("verified", len(models))]
    placed = {path for (path,) in site.rows("SELECT path FROM artifacts WHERE NOT quarantined")}
    with _variables(site.bucket.variables(AWS_EC2_METADATA_DISABLED="true")):
        assert artifacts_in(STORE) == placed, "what is in the bucket is what the catalog says, and nothing else"
        assert_bucket_whole(STORE)
    assert len(placed) == len(models)
    leased = {key for (key,) in site.rows("SELECT key FROM leases")}
    assert leased & {key for _, _, key in rows} == set(), "no model is anybody's any more"
    for worker in site.workers.values():
        if worker.process.poll() is None:
            wait_for(lambda worker=worker: not worker.family(), what=f"nothing of {worker.name} runs any more")
            assert list((worker.home / "tmp").glob("*/")) == []
    templates = dict(site.rows("SELECT template, count(*) FROM conversions GROUP BY template"))
    waited = site.rows("SELECT max(extract(epoch FROM finished_at - started_at)) FROM conversions")
    return {"models": len(models), "templates": templates, "longest_model_seconds": round(float(waited[0][0]), 1)}


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, text in before.items():
            if text is None:
                del os.environ[name]
            else:
                os.environ[name] = text


def measure(site: Site, story: Story, *, workers: int) -> dict[str, float]:
    """Convert the models anew, into an empty catalog, with so many workers; return how long it took.

    Once as a whole, and once from the beginning of the first conversion to the end of the last: what comes before is
    the same for however many workers and models.
    """
    for worker in site.workers.values():
        worker.kill()
    site.workers.clear()
    site.new_catalog()
    site.ferry("catalog", "list", "--json")
    names = [f"one-of-{workers}-{number}" for number in range(workers)]
    for name in names:
        site.start_worker(name, CONVERTING)
    wait_for(lambda: _online(site) >= workers, what="the workers are there")
    began = time.monotonic()
    site.ferry("batch", "models.json", "--shards", str(workers), "--pool", CONVERTING, "--workers", "1")
    seconds = time.monotonic() - began
    assert site.converted() == story.models
    (working,) = site.rows("SELECT extract(epoch FROM max(finished_at) - min(started_at)) FROM conversions")[0]
    return {"workers": workers, "seconds": round(seconds, 1), "seconds_of_conversions": round(float(working), 1)}


def _online(site: Site) -> int:
    found = site.ask(f"work_pools/{CONVERTING}/workers/filter", workers={"status": {"any_": ["ONLINE"]}})
    return len([worker for worker in found if worker["name"] in site.workers])


def main() -> None:
    """Tell the story, and print its figures; then the same models with one worker and with two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--outage", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--scaling-only", action="store_true", help="leave the story out")
    parser.add_argument("--scaling-models", type=int, metavar="N", help="of the second part; 0: leave it out")
    parser.add_argument("--folder", type=Path, help="where all is kept; default: a temporary folder that is removed")
    options = parser.parse_args()
    story = Story(models=options.models, workers=options.workers, shards=options.shards, outage_seconds=options.outage)
    with ExitStack() as opened:
        folder = options.folder or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="ferry-site-")))
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["HF_HOME"] = str(folder / "cache" / "huggingface")
        site = opened.enter_context(open_site(folder))
        if options.scaling_only:
            prepare(site, story)
        else:
            sys.stdout.write(json.dumps(tell(site, story), indent=2) + "\n")
        again = story.models if options.scaling_models is None else options.scaling_models
        if again:
            part = Story(models=again, workers=options.workers)
            write_manifest(folder / "models.json", sorted((folder / "models").iterdir())[:again])
            one, two = (measure(site, part, workers=number) for number in (1, 2))
            ratios = {name: round(one[name] / two[name], 2) for name in one if name != "workers"}
            sys.stdout.write(json.dumps({"one": one, "two": two, "times_as_fast": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
