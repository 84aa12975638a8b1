"""A batch killed again and again at moments that nobody chose; ``TEST_KILLS`` says how often (default: 5)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import (
    alive,
    assert_nothing_half_done,
    catalog_rows,
    ferry,
    hashes,
    killed_at_the_end,
    read_report,
    start,
    tiny,
    wait_until,
    write_manifest,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
KILLS = int(os.environ.get("TEST_KILLS", "5"))
STRUCTURES = ("patchtst-model", "bert-model", "vit-model", "gpt2-model")
EACH = 5
WORDS = ("batch", "models.json", "--engine", "local", "--workers", "2", "--output", "out", "--report", "report.json")


def test_a_batch_killed_at_random_moments_converts_everything_once(tmp_path: Path) -> None:
    for structure in STRUCTURES:
        for seed in range(EACH):
            tiny(tmp_path / f"{structure}-{seed}", structure, seed=seed)
    names = [f"{structure}-{seed}" for seed in range(EACH) for structure in STRUCTURES]
    write_manifest(tmp_path / "models.json", [f"./{name}" for name in names])
    home = tmp_path / "home"
    moments = random.Random(KILLS)
    done: list[int] = []
    for _ in range(KILLS):
        with killed_at_the_end(start(*WORDS, home=home, cwd=tmp_path)) as process:
            time.sleep(moments.uniform(1, 14))
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGKILL)
            process.wait()
            wait_until(lambda family=family: not alive(family), 20)
        done.append(len(converted(home)))
    assert done == sorted(done)
    last = ferry(*WORDS, home=home, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    report = read_report(tmp_path / "report.json")
    assert report.keys() == set(names)
    assert {model["parity"]["verdict"] for model in report.values()} == {"verified"}
    # Once each, however often it was begun.
    assert sorted(converted(home)) == sorted(names)
    assert_nothing_half_done(home, tmp_path / "out")
    assert templates(home) == templates_of_an_undisturbed_batch(tmp_path)


def converted(home: Path) -> list[str]:
    if not (home / "catalog.db").exists():
        return []
    return [Path(row.model_id).name for row in catalog_rows(home) if row.status == "converted"]


def templates(home: Path) -> dict[str, dict[str, str]]:
    """Return the files of each template by its key, but for what dates and notes them."""
    found = {folder.name: hashes(folder) for folder in (home / "templates").glob("??/*")}
    return {key: {name: sha for name, sha in files.items() if name.endswith(".onnx")} for key, files in found.items()}


def templates_of_an_undisturbed_batch(folder: Path) -> dict[str, dict[str, str]]:
    models = [f"./{structure}-0" for structure in STRUCTURES]
    write_manifest(folder / "one-each.json", models)
    run = ferry("batch", "one-each.json", "--engine", "local", home=folder / "undisturbed", cwd=folder)
    assert run.returncode == 0, run.stderr
    return templates(folder / "undisturbed")
