"""A site in small: a scheduled batch over three workers, and all that can go wrong meanwhile; see `production`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.production import Story, open_site, tell

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control"),
    pytest.mark.long,
    pytest.mark.timeout(900),
]


def test_a_site_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    # One structure: what is told here is not how long a trace takes.
    story = Story(models=8, structures=1, shards=3, outage_seconds=6, restart_seconds=2)
    with open_site(tmp_path) as site:
        figures = tell(site, story)
    assert figures["models"] == 8
    # Three parts, and those that had a worker killed under them once more.
    assert 4 <= figures["runs_of_parts"] <= 5
