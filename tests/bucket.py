"""What is in a bucket that artifacts were stored in, seen from outside; asks the server that the environment names."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import PurePosixPath

from fsspec.core import url_to_fs

from onnx_config.export.artifact import FERRY_FILE

__all__ = ["artifacts_in", "assert_bucket_whole"]


def artifacts_in(url: str) -> set[str]:
    """Return the URLs of all that is, or was begun to be, an artifact."""
    return {f"{url}/{place}" for place in _contents(url)}


def assert_bucket_whole(url: str) -> None:
    """Every artifact has the files that its ``ferry.json`` lists, as listed, and no other; nothing else is there."""
    files, _ = url_to_fs(url, skip_instance_cache=True)
    for place, names in _contents(url).items():
        assert FERRY_FILE in names, f"{place} was never finished"
        listed = json.loads(files.cat_file(names.pop(FERRY_FILE)))["files"]
        found = {name: sha256(files.cat_file(path)).hexdigest() for name, path in names.items()}
        assert found == {name: entry["sha256"] for name, entry in listed.items()}, place


def _contents(url: str) -> dict[str, dict[str, str]]:
    """Return the path of each file by its name, for each artifact's place."""
    files, root = url_to_fs(url, skip_instance_cache=True)
    contents: dict[str, dict[str, str]] = {}
    for path in files.find(root):
        parts = PurePosixPath(path).relative_to(root).parts
        contents.setdefault("/".join(parts[:2]), {})["/".join(parts[2:])] = path
    return contents
