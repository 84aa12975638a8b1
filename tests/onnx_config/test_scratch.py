"""A folder lives exactly as long as the process that made it needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onnx_config.export.scratch import remove_orphans, scratch_folder

ROOT = Path(__file__).parents[2]

_HOLD = """
import sys
from pathlib import Path
from onnx_config.export.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "held") as folder:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""

_RACE = """
import sys
from pathlib import Path
from onnx_config.export.scratch import remove_orphans, scratch_folder
for number in range(int(sys.argv[2])):
    with scratch_folder(Path(sys.argv[1]), f"race {number}") as folder:
        (folder / "file").write_text("x")
        remove_orphans(Path(sys.argv[1]))
        assert (folder / "file").read_text() == "x"
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "tmp").iterdir())


@pytest.mark.parametrize("name", ["export of org/model", "../../up", "", "é" * 300])
def test_a_folder_is_made_and_removed(tmp_path, name):
    with scratch_folder(tmp_path / "home", name) as folder:
        assert folder.parent == tmp_path / "home" / "tmp"
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("x")
    assert contents(tmp_path / "home") == []


def test_a_folder_is_removed_after_an_exception(tmp_path):
    def fail() -> None:
        with scratch_folder(tmp_path, "fails") as folder:
            (folder / "file").write_text("x")
            raise KeyError("the step's own error")

    with pytest.raises(KeyError, match="the step's own error"):
        fail()
    assert contents(tmp_path) == []


def test_a_folder_without_write_permission_is_removed(tmp_path):
    with scratch_folder(tmp_path, "closed") as folder:
        (folder / "inner" / "deep").mkdir(parents=True)
        (folder / "inner" / "deep" / "file").write_text("x")
        (folder / "inner" / "deep").chmod(0)
        (folder / "inner").chmod(0o500)
    assert contents(tmp_path) == []


def test_what_a_link_points_to_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    with scratch_folder(tmp_path, "links") as folder:
        (folder / "link").symlink_to(outside)
    assert (outside / "file").read_text() == "x"


def test_a_folder_that_removed_itself_is_no_error(tmp_path):
    with scratch_folder(tmp_path, "gone") as folder:
        folder.rmdir()
    assert contents(tmp_path) == []


def test_folders_of_the_living_stay_and_of_the_killed_go(tmp_path):
    with start(_HOLD, tmp_path) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        with scratch_folder(tmp_path, "other") as other:
            assert held.is_dir()
            assert remove_orphans(tmp_path) == []
            assert other.is_dir()
        holder.kill()
        holder.wait()
    assert held.is_dir()
    with scratch_folder(tmp_path, "next"):
        assert not held.exists()
    assert contents(tmp_path) == []


def test_orphans_of_a_home_that_is_not_there_are_none(tmp_path):
    assert remove_orphans(tmp_path / "missing") == []


def test_many_processes_share_a_home(tmp_path):
    racers = [start(_RACE, tmp_path, 60) for _ in range(3)]
    try:
        with ThreadPoolExecutor(3) as pool:
            errors = [result[1] for result in pool.map(lambda racer: racer.communicate(timeout=30), racers)]
        assert errors == [""] * 3
    finally:
        for racer in racers:
            racer.kill()
    assert contents(tmp_path) == []
