"""A Prefect server of its own for the modules that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.loopback import prefect_server


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Prefect's own server, as a user would, and yield the URL of its API."""
    home = tmp_path_factory.mktemp("prefect-server")
    with prefect_server(home, os.environ) as url:
        yield url
