"""Every page that there is, by a name for pictures and test ids."""

from __future__ import annotations

from tests.browser.contents import Contents

__all__ = ["PAGES", "address"]

PAGES = {
    "overview": "/",
    "overview-ever": "/?period=all",
    "overview-nothing": "/?task=nothing",
    "models": "/models",
    "models-nothing": "/models?q=nothing-like-that",
    "model": "/models/{whole}",
    "model-failed": "/models/{failed}",
    "model-quarantined": "/models/{quarantined}",
    "model-hostile": "/models/{hostile}",
    "runs": "/runs",
    "run": "/runs/{ended_run}",
    "run-live": "/runs/{running}",
    "run-coverage": "/runs/{ended_run}/coverage",
    "coverage": "/coverage?every=true",
    "coverage-hostile": "/coverage?status=mismatch",
    "compare-ask": "/compare",
    "compare": "/compare?a={older}&b={whole}",
    "compare-hostile": "/compare?a={hostile}&b={failed}",
}


def address(name: str, contents: Contents) -> str:
    """Return the path of a page."""
    return PAGES[name].format(**{field: getattr(contents, field) for field in Contents.__dataclass_fields__})
