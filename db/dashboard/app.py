"""The web application: its parts put together, and what holds for every answer.

No answer lets a browser run or load anything but the files of this package: the policy in the header says so. On
loopback only requests that name this machine are answered, so that no page elsewhere can read the catalog by
pointing its own name here.
"""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy import Engine
from starlette.exceptions import HTTPException

from db.dashboard.api import api_router
from db.dashboard.metrics import metrics_router
from db.dashboard.pages import pages_router, show_problem
from db.dashboard.reading import CatalogReader, NotReadyError
from db.errors import CatalogError

__all__ = ["create_app", "is_loopback", "serve"]

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_NAMES_OF_LOOPBACK = {"127.0.0.1", "localhost", "::1"}

_log = logging.getLogger(__name__)


def create_app(engine: Engine, *, only_loopback: bool = True) -> FastAPI:
    """Return the application over a catalog, which need not be there yet.

    Args:
        engine: The catalog; opened for reading only.
        only_loopback: Answer only requests whose ``Host`` is a name of loopback.
    """
    app = FastAPI(
        title="onnx-ferry catalog",
        description="What was converted, how it went, and where the result is. Reading only.",
        version="1",
        docs_url=None,
        redoc_url=None,
    )
    app.state.reader = CatalogReader(engine)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if only_loopback and _host(request) not in _NAMES_OF_LOOPBACK:
            return PlainTextResponse(
                "This dashboard answers on loopback only. Start it with --host to show it elsewhere.\n", 421
            )
        response = await call_next(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if not request.url.path.startswith("/static/"):
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.exception_handler(CatalogError)
    async def catalog_failed(request: Request, error: CatalogError) -> Response:
        status = 503
        if not isinstance(error, NotReadyError):
            _log.warning("%s", error.message)
        return _problem(request, status, "The catalog cannot be shown", error.message)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        title = {404: "Not here", 409: "In quarantine"}.get(error.status_code, "Not possible")
        return _problem(request, error.status_code, title, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def misspelt(request: Request, error: RequestValidationError) -> Response:
        if request.url.path.startswith("/api/"):
            return await request_validation_exception_handler(request, error)
        wrong = (f"{' '.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors())
        words = f"The address cannot be read: {'; '.join(wrong)}. The links below lead to what is there."
        return _problem(request, 422, "Not possible", words)

    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    app.include_router(metrics_router)
    app.include_router(api_router)
    app.include_router(pages_router)
    return app


def serve(engine: Engine, listener: socket.socket, *, host: str) -> None:
    """Answer requests on a bound socket until interrupted; ``host`` is the address that it was bound by."""
    app = create_app(engine, only_loopback=is_loopback(host))
    # To look for garbage among all that was imported stops every page for some 50 ms, again and again.
    gc.collect()
    gc.freeze()
    # A page that follows a batch would hold the end up, hence the second.
    config = uvicorn.Config(app, log_level="warning", server_header=False, ws="none", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Return whether an address to bind is one that only this machine reaches.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    return host in _NAMES_OF_LOOPBACK or host.startswith("127.")


def _host(request: Request) -> str:
    return (request.url.hostname or "").strip("[]").lower()


def _problem(request: Request, status: int, title: str, message: str) -> Response:
    path = request.url.path
    if path.startswith("/api/") or path in ("/openapi.json", "/metrics", "/healthz"):
        return JSONResponse({"detail": message}, status)
    return show_problem(request, status, title, message)
