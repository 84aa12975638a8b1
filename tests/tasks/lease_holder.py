"""A process that takes a lease and says so; run by the tests of leases, which kill and suspend it.

Arguments: home, URL of the catalog, key, seconds that a lease lasts.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tasks import lease
from tasks.request import Workspace

if __name__ == "__main__":
    home, url, key, seconds = sys.argv[1:]
    lease.LEASE_SECONDS = float(seconds)
    lease.BEAT_SECONDS = float(seconds) / 5
    places = Workspace(
        home=Path(home), catalog_url=url, store=Path(home) / "artifacts", memory_limit_bytes=1, timeout_seconds=1.0
    )
    with lease.held_lease(places, key, stopping=threading.Event()) as held:
        sys.stdout.write("held\n")
        sys.stdout.flush()
        sys.stdin.readline()
        try:
            held.confirm()
            sys.stdout.write("still held\n")
        except lease.LeaseLostError:
            sys.stdout.write("lost\n")
