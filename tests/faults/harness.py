"""What the tests of whole conversions share: tiny models, the command as a process, and a look at what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

import db
from onnx_config.export.artifact import FERRY_FILE
from tasks.request import ConversionOptions, ConversionRequest, Workspace
from tests import tiny_models

ROOT = Path(__file__).parents[2]
GIB = 1024**3
LEFTOVERS = (".part", ".old", ".tmp", ".draft", ".healing", ".replacing")

# The command itself, with waits before a retry that a test can afford.
_IMPATIENT = "import tasks.retry as r; r.RETRY_WAIT_SECONDS = 0.05; from flows.entry import main; main()"


@cache
def _built(name: str, seed: int) -> Path:
    # Below the folder that the tests' conftest removes at the end.
    folder = Path(os.environ["HF_HOME"]).parent / "models" / f"{name}-{seed}"
    return tiny_models.build(name, folder, seed=seed)


def tiny(folder: Path, name: str = "patchtst-model", *, seed: int = 0) -> Path:
    """Make ``folder`` a tiny model's; the same name and seed are the same bytes."""
    return shutil.copytree(_built(name, seed), folder)


def request(model: Path | str, **options: Any) -> ConversionRequest:
    return ConversionRequest(model_id=str(model), options=ConversionOptions(**options))


def workspace(home: Path, **changes: Any) -> Workspace:
    places: dict[str, Any] = {
        "home": home,
        "catalog_url": f"sqlite:///{home / 'catalog.db'}",
        "store": home / "artifacts",
        "memory_limit_bytes": 8 * GIB,
        "timeout_seconds": 240.0,
    }
    return Workspace(**{**places, **changes})


def share_traces(home: Path) -> Path:
    """Make ``home`` one whose conversions take over what earlier tests detected and traced; return it.

    For tests that are about neither, and follow one that is: tracing is most of what a conversion costs. Only structure
    is shared; weights are bound, compared and stored anew.
    """
    home.mkdir(parents=True, exist_ok=True)
    for name in ("templates", "detections"):
        shared = Path(os.environ["HF_HOME"]).parent / "shared" / name
        shared.mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(shared, target_is_directory=True)
    return home


def environment(home: Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "COVERAGE_PROCESS_START")
    }
    # An empty cache of its own: nothing that this machine has fetched before may answer for the Hub.
    own = {"FERRY_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HOME": str(home.parent / "huggingface")}
    return {**kept, **own, **(variables or {})}


def start(
    *words: str | Path, home: Path, cwd: Path, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start ``ferry`` with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", _IMPATIENT, *map(str, words)],
        cwd=cwd,
        env=environment(home, variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a shell does it: a signal for the terminal's job reaches the command and not the tests.
        start_new_session=True,
    )


def ferry(
    *words: str | Path, home: Path, cwd: Path, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``ferry`` to its end."""
    process = start(*words, home=home, cwd=cwd, variables=variables)
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def write_manifest(path: Path, models: Sequence[Mapping[str, Any] | str | Path]) -> Path:
    entries = [dict(model) if isinstance(model, Mapping) else {"id": str(model)} for model in models]
    path.write_text(json.dumps({"models": entries}), encoding="utf-8")
    return path


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Return a report's models by the name of their folder, or by their Hub id."""
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["schema"] == 1
    found = {model["id"].removeprefix("./"): model for model in report["models"]}
    assert len(found) == len(report["models"])
    counted = {status: sum(m["status"] == status for m in report["models"]) for status in report["totals"]}
    assert counted == report["totals"]
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def artifact_folders(store: Path) -> set[Path]:
    verified = (path for path in store.glob("??/*") if path.is_dir())
    return {*verified, *(store / "quarantine").glob("*")}


def assert_whole(folder: Path) -> None:
    """Every file that an artifact's ``ferry.json`` lists is there as listed, and no other."""
    listed = json.loads((folder / FERRY_FILE).read_text(encoding="utf-8"))["files"]
    found = hashes(folder)
    del found[FERRY_FILE]
    assert found == {name: entry["sha256"] for name, entry in listed.items()}


def assert_nothing_half_done(home: Path, *outputs: Path, store: Path | None = None) -> None:
    """No temporary file or folder is left, every artifact is whole, and the catalog says the same as the store."""
    store = store or home / "artifacts"
    everything = [path for root in (home, store, *outputs) for path in root.rglob("*")]
    assert [str(path) for path in everything if path.name.endswith(LEFTOVERS)] == []
    for root in (home, store):
        assert list((root / "tmp").glob("*")) == []
    folders = artifact_folders(store)
    for folder in folders:
        assert_whole(folder)
    for output in outputs:
        for folder in output.glob("*/"):
            assert_whole(folder)
    if (home / "catalog.db").exists():
        rows = catalog_rows(home)
        assert {row.artifact.path for row in rows if row.artifact} <= {str(folder) for folder in folders}
        for row in rows:
            if row.artifact is not None:
                assert {file.path: file.sha256 for file in row.artifact.files}.items() <= hashes(
                    Path(row.artifact.path)
                ).items()
                assert row.artifact.quarantined == (row.status != "converted")


def catalog_rows(home: Path) -> list[db.ConversionRecord]:
    engine = db.make_engine(f"sqlite:///{home / 'catalog.db'}")
    try:
        with db.session_scope(engine, read_only=True) as session:
            return list(db.iter_conversions(session))
    finally:
        engine.dispose()


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return found


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Leave no process behind, whatever a test finds wrong."""
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small file system of its own at ``folder``; skip the test where that is not permitted."""
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("a full disk needs mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
