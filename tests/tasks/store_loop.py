"""A process that publishes and places artifacts without end, for `test_store` to kill."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from onnx_config.export.artifact import FERRY_FILE, content_address, list_files, write_ferry_file
from tasks.local_store import LocalStore
from tasks.place import place

FILES = {"model.onnx": "graph", "config.json": "{}", "1_Pooling/config.json": "[]"}


def artifact(folder: Path, content: str = "", **files: str) -> str:
    """Write an artifact of three files and more; return its content address."""
    for name, text in {**FILES, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + content)
    listed = list_files(folder)
    write_ferry_file(folder, {"id": content}, listed)
    return content_address(listed)


def publish_for_ever(work: Path, what: str) -> None:
    """Publish the ``same`` content, ``different`` ones, or different ones and ``place`` each in a folder."""
    store = LocalStore(work / "artifacts")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    number = 0
    while True:
        number += 1
        new = work / "tmp" / f"new-{number % 7}"
        shutil.rmtree(new, ignore_errors=True)
        if what == "same":
            address = artifact(new, "always")
            # Damage, so that there is always something to heal.
            (Path(store.path_of(address)) / "config.json").unlink(missing_ok=True)
        else:
            address = artifact(new, str(number), **({"vocab.txt": "words"} if number % 2 else {}))
        there = Path(store.publish(new, address))
        if what == "place":
            names = [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]
            place(there, work / "out" / "abc"[number % 3], [name for name in names if name != FERRY_FILE])
            if number % 20 == 0 and (work / "out" / "a").exists():
                (work / "trash").mkdir(exist_ok=True)
                (work / "out" / "a").rename(work / "trash" / str(time.monotonic_ns()))


if __name__ == "__main__":
    publish_for_ever(Path(sys.argv[1]), sys.argv[2])
