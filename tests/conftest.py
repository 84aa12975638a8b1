"""What every test stands on: no network, no telemetry, no file outside temporary folders, nothing skipped in silence.

The environment is set when this file is imported, which is before any test module imports Prefect, transformers or
our own settings: all three read it once. Sockets are shut except loopback by pytest-socket, see ``pyproject.toml``.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.chromium import find_chromium

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

_HOME = Path(tempfile.mkdtemp(prefix="onnx-ferry-tests-"))

# Settings of the person who runs the tests would make them pass or fail elsewhere.
for _name in [name for name in os.environ if name.startswith(("FERRY_", "PREFECT_"))]:
    del os.environ[_name]

os.environ.update(
    FERRY_HOME=str(_HOME / "ferry"),
    PREFECT_HOME=str(_HOME / "prefect"),
    # The embedded server reports home every ten minutes, the SDK on its first runs: both are off.
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=str(_HOME / "huggingface"),
    TOKENIZERS_PARALLELISM="false",
    NO_COLOR="1",
)

# A shell that starts the tests in the background has them ignore Ctrl-C, and every program that they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("onnx-ferry")
    group.addoption("--slow", action="store_true", help="run tests marked slow; CI=1 or SLOW=1 mean the same")
    group.addoption("--long", action="store_true", help="run tests marked long too, which CI has no time for")
    group.addoption("--gpu", action="store_true", help="run tests marked gpu; they fail where there is no CUDA device")
    group.addoption("--interop", action="store_true", help="run tests marked interop; `make interop` does")
    group.addoption("--screenshots", metavar="DIR", help="folder that the tests marked browser write pictures to")
    group.addoption("--interop-cache", metavar="DIR", help="folder of the environments of --interop; default: .interop")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow") or bool(os.environ.get("CI") or os.environ.get("SLOW"))
    chromium = find_chromium() if any("browser" in item.keywords for item in items) else None
    for item in items:
        if "gpu" in item.keywords and not config.getoption("--gpu"):
            item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device, run with --gpu"))
        elif "interop" in item.keywords and not config.getoption("--interop"):
            item.add_marker(pytest.mark.skip(reason="interop: needs foreign loaders, run `make interop`"))
        elif "browser" in item.keywords and chromium is None:
            item.add_marker(pytest.mark.skip(reason="browser: needs Chromium, `apt install chromium` or CHROMIUM=path"))
        elif "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: takes minutes, run with --long"))
        elif "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow, SLOW=1 or CI=1"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what did not run, so that a green line is never read as more than it is."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    gpu = sum("gpu: " in reason for reason in reasons)
    slow = sum("slow: " in reason or "long: " in reason for reason in reasons)
    interop = sum("interop: " in reason for reason in reasons)
    browser = sum("browser: " in reason for reason in reasons)
    other = len(reasons) - gpu - slow - interop - browser
    terminalreporter.write_line(
        f"not run: {gpu} gpu, {slow} slow, {interop} interop, {browser} browser, {other} for other reasons"
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests that ask for it; each has databases of its own there."""
    from tests.postgres import PostgresServer

    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)
