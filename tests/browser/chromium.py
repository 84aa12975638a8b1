"""A browser for the tests: a Chromium that is installed already, without a picture on a screen and without a network.

Playwright's own browsers are not taken: a checkout would have to download them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["find_chromium", "launched"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    # In a container there is rarely what Chromium's sandbox needs, nor a /dev/shm that is big enough.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    # Chromium itself would like to ask for updates and more; no name but this machine's leads anywhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
)


def find_chromium() -> str | None:
    """Return the program: ``CHROMIUM`` where it is set, else what is installed; ``None`` where there is none."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def launched(program: str) -> Iterator[Any]:
    """Run a browser.

    Playwright keeps an event loop in this thread as long as it runs, in which nothing else of asyncio can. So nobody
    may keep it for longer than the tests of one module.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
