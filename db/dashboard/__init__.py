"""The ops pages over the catalog, which they read and never write.

`create_app` returns the web application; `serve` runs it until it is interrupted.
"""

from __future__ import annotations

from db.dashboard.app import create_app, is_loopback, serve

__all__ = ["create_app", "is_loopback", "serve"]
