"""A real `ferry dashboard` over a filled catalog, and a browser that writes down all that a page does.

A page that says anything on its console, or asks another machine for anything, fails its test at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from db import make_engine, upgrade
from tests.browser.chromium import find_chromium, launched
from tests.browser.contents import Contents, fill
from tests.db.conftest import make_record

__all__ = ["Dashboard", "OpenPage", "make_record", "running_dashboard"]

ROOT = Path(__file__).parents[2]
OpenPage = Callable[..., Any]


class Dashboard:
    """A dashboard that runs, and the catalog that it shows."""

    def __init__(self, url: str, engine: Engine, contents: Contents) -> None:
        self.url = url
        self.engine = engine
        self.contents = contents


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory, make_record: Any) -> Iterator[Dashboard]:
    home = tmp_path_factory.mktemp("dashboard")
    files = home / "files"
    files.mkdir()
    engine = make_engine(f"sqlite:///{home}/catalog.db")
    upgrade(engine)
    contents = fill(engine, make_record, files)
    with running_dashboard(home) as url:
        yield Dashboard(url, engine, contents)
    engine.dispose()


@contextmanager
def running_dashboard(home: Path) -> Iterator[str]:
    """Run `ferry dashboard` over the catalog of a home; give its address, without a slash at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.entry", "dashboard", "--port", "0", "--home", home],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"Dashboard: (http://\S+?)/$", line):
                yield found[1]
                return
        raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = find_chromium()
    assert program is not None, "found when the tests were collected"
    with launched(program) as started:
        yield started


@pytest.fixture
def open_page(browser: Any, dashboard: Dashboard) -> Iterator[OpenPage]:
    """Return what opens a page of the dashboard: ``open_page("/models", scheme="dark", width=390)``.

    ``expect`` is the status of the answer; one that is no success is said on the console, and may be.
    """
    wrong: list[str] = []
    contexts: list[Any] = []

    def open_one(
        path: str,
        *,
        scheme: str = "light",
        width: int = 1280,
        script: bool = True,
        expect: int = 200,
        base: str | None = None,
    ) -> Any:
        root = dashboard.url if base is None else base
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, base_url=root
        )
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()

        def heard(message: Any) -> None:
            if message.type in ("error", "warning") and not (expect >= 400 and f"status of {expect}" in message.text):
                wrong.append(f"{path}: console: {message.text}")

        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(f"{path}: {error}"))
        page.on("request", lambda request: _look_at(request.url, root, path, wrong))
        answer = page.goto(path, wait_until="load")
        assert answer is not None
        assert answer.status == expect
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


def _look_at(url: str, root: str, path: str, wrong: list[str]) -> None:
    if not url.startswith((f"{root}/", "data:")):
        wrong.append(f"{path}: asks for {url}")


@pytest.fixture
def shoot(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Return what keeps a picture of a page where `--screenshots DIR` was given."""
    folder = request.config.getoption("--screenshots")

    def keep(page: Any, name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.wait_for_timeout(400)  # Charts are drawn anew a moment after the window has another size.
            page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)

    return keep
