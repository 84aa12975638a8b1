"""What is kept of a failure, so that it can be seen again with one command: a folder each, the newest few hundred."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnx_config.export.failure_case import CASE_FILE, SCRIPT_FILE
from onnx_config.export.scratch import scratch_folder
from tasks.key import content_sha256
from tasks.report import ErrorEntry
from tasks.request import ConversionRequest
from tasks.versions import package_versions

__all__ = ["FailureFolders"]

_MOST_FOLDERS = 300
_KEY_DIGITS = 16


class FailureFolders:
    """The folders under ``<home>/failures``, each named by what was asked for.

    A later failure of the same request takes the place of an earlier one, and a success removes it. They are there to
    be looked at: whatever goes wrong with them is nobody's failure, and is passed over.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self.root = home / "failures"
        """Where they are; made when something fails."""

    def of(self, request: ConversionRequest) -> Path:
        """Return where a request's folder is, or would be."""
        return self.root / content_sha256({"model": request.model_id, **_asked(request)})[:_KEY_DIGITS]

    def keep(
        self, request: ConversionRequest, error: ErrorEntry, *, revision: str | None, cases: Path | None = None
    ) -> Path | None:
        """Write a failure's folder; return where it is, or ``None`` where it could not be written.

        Args:
            request: What was asked for.
            error: What came of it.
            revision: Commit or content hash; ``None`` where it was not known.
            cases: Folder with a folder for each graph that differs from PyTorch.
        """
        # The second is what a name raises that no text can hold.
        with suppress(OSError, ValueError), scratch_folder(self._home, "failure") as scratch:
            folder = scratch / "folder"
            folder.mkdir()
            asked = {"model": request.model_id, "revision": request.revision, "found": revision, **_asked(request)}
            _write(folder / "request.json", asked)
            _write(folder / "versions.json", package_versions())
            _write(folder / "error.json", error.model_dump(mode="json"))
            names = []
            if cases is not None and cases.is_dir():
                shutil.copytree(cases, folder, dirs_exist_ok=True)
                names = sorted(path.parent.name for path in folder.glob(f"*/{CASE_FILE}"))
            script = folder / "reproduce.sh"
            # A folder's name need not be UTF-8; the shell wants its bytes.
            script.write_text(_script(error.reproduce, names), encoding="utf-8", errors="surrogateescape")
            script.chmod(0o755)
            target = self.of(request)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            folder.replace(target)
            self._limit()
            return target
        return None

    def point_to(self, folder: Path, graphs: Iterable[tuple[str, str]]) -> None:
        """Say in the cases of ``folder`` where the graphs, each by its role, are now."""
        with suppress(OSError, ValueError):
            for role, graph in graphs:
                path = folder / role / CASE_FILE
                if path.is_file():
                    _write(path, {**json.loads(path.read_text(encoding="utf-8")), "graph": graph})

    def forget(self, request: ConversionRequest) -> None:
        """Remove what is kept of a request that went well."""
        shutil.rmtree(self.of(request), ignore_errors=True)

    def _limit(self) -> None:
        folders = sorted(self.root.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in folders[:-_MOST_FOLDERS]:
            shutil.rmtree(folder, ignore_errors=True)


def _asked(request: ConversionRequest) -> dict[str, Any]:
    return {"revision": request.revision, "options": request.options.to_json()}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _script(command: str, cases: list[str]) -> str:
    lines = ["#!/bin/sh", "# Shows the failure again.", 'cd "$(dirname "$0")" || exit 2']
    # The graph as it is, on the inputs at which it differs: needs no converter, and no model.
    lines += [f'"${{PYTHON:-python3}}" {name}/{SCRIPT_FILE}' for name in cases]
    return "\n".join([*lines, *([f"# The whole conversion: {command}"] if cases else [command])]) + "\n"
