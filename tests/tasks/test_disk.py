"""What is read of folders that others change meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

from tasks.disk import folder_bytes


def test_a_folder_has_the_bytes_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "a" / "two").write_bytes(b"12")
    (tmp_path / "a" / "b" / "three").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 6
    assert folder_bytes(tmp_path / "not there") == 0


def test_what_goes_away_while_it_is_counted_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"12345")
    ended = threading.Event()

    def come_and_go() -> None:
        inner = tmp_path / "outer" / "inner"
        while not ended.is_set():
            inner.mkdir(parents=True)
            inner.rmdir()
            inner.parent.rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert {folder_bytes(tmp_path) for _ in range(3000)} == {5}
    finally:
        ended.set()
        other.join()
