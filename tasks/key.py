"""Keys by content: under which a conversion's result, or a detection, is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tasks.request import ConversionOptions
from tasks.versions import CODE_EPOCH, package_versions

__all__ = ["action_key", "content_sha256"]


def content_sha256(content: Mapping[str, Any]) -> str:
    """Return the full SHA-256 over JSON values; neither the order of keys nor spaces count.

    >>> content_sha256({"a": 1, "b": [None]}) == content_sha256({"b": [None], "a": 1})
    True
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def action_key(model: str, revision: str, options: ConversionOptions, *, versions: dict[str, str] | None = None) -> str:
    """Return the full SHA-256 over all that decides what a conversion makes.

    Args:
        model: Hub id; ``""`` for a folder, whose content alone counts.
        revision: Commit, or content hash of the folder.
        options: How it is converted.
        versions: Versions of the packages; ``None``: those installed.

    No path, time or host name goes in.
    """
    return content_sha256(
        {
            "schema": 1,
            "epoch": CODE_EPOCH,
            "model": model,
            "revision": revision,
            "options": options.to_json(),
            "versions": package_versions() if versions is None else versions,
        }
    )
