"""What this installation can do, and what to fix.

Looks and tells: nothing is created, changed or converted. Torch, transformers and Prefect are not imported, so that
the answer comes quickly and also where one of them is broken.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.progress import clean
from flows.settings import Settings, machine_memory_bytes, masked_url, why_not_writable
from onnx_config.cuda import CUDA_PROVIDER
from onnx_config.errors import FerryError

__all__ = [
    "Check",
    "Findings",
    "Health",
    "check_catalog",
    "check_disk",
    "check_environment",
    "check_home",
    "check_hub",
    "check_memory",
    "check_prefect",
    "check_providers",
    "check_store",
    "check_versions",
    "examine",
    "installed_versions",
    "print_findings",
]

_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxsim",
    "prefect",
    "sqlalchemy",
    "fastapi",
)
_ONNXRUNTIME_BUILDS = ("onnxruntime", "onnxruntime-gpu")
_GIB = 1024**3
_LITTLE_DISK_BYTES = 10 * _GIB
_LITTLE_MEMORY_BYTES = 2 * _GIB
_REACH_TIMEOUT_SECONDS = 2.0


class Health(StrEnum):
    """What a check says."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What was looked at, e.g. ``"store"``."""

    health: Health
    """Whether it works, may bite, or stops conversions."""

    found: str
    """What is there; never a secret."""

    fix: str | None = None
    """What to do about it; ``None`` where there is nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Versions and checks of one look."""

    versions: dict[str, str | None]
    """Installed version by package; ``None``: not installed."""

    checks: tuple[Check, ...]
    """All checks, in the order in which a reader wants them."""

    @property
    def healthy(self) -> bool:
        """Whether no check is a problem."""
        return all(check.health is not Health.PROBLEM for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the findings as JSON types."""
        return {"healthy": self.healthy, "versions": self.versions, "checks": [asdict(check) for check in self.checks]}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Versions that are known to work: from ``low`` on, below ``high`` where there is one."""

    low: str
    high: str | None
    outside: Health
    why: str


_RANGES = {
    "torch": _Range(low="2.11", high="2.14", outside=Health.WARNING, why="the exporter was tested with torch 2.13"),
    "transformers": _Range(low="5.23", high="6", outside=Health.PROBLEM, why="its ONNX exporter is what is built upon"),
    "onnx": _Range(low="1.19", high=None, outside=Health.PROBLEM, why="older ones lack what the graphs need"),
    "onnxscript": _Range(low="0.7", high=None, outside=Health.PROBLEM, why="older ones cannot optimise the graphs"),
    "onnxruntime": _Range(low="1.23", high=None, outside=Health.PROBLEM, why="older ones refuse the newest opset"),
    "onnxsim": _Range(low="0.8", high=None, outside=Health.PROBLEM, why="older ones refuse the newest opset"),
    "prefect": _Range(low="3.8", high="3.9", outside=Health.PROBLEM, why="other versions were not tested"),
    "sqlalchemy": _Range(
        low="2.0", high="2.1", outside=Health.PROBLEM, why="under 2.1 Prefect's server never schedules a run"
    ),
    "fastapi": _Range(
        low="0.100",
        high="0.151",
        outside=Health.PROBLEM,
        why="newer ones break Prefect's embedded server",
    ),
}


def examine(settings: Settings) -> Findings:
    """Return what was found; a check that cannot be made is a problem of its own, never an exception.

    Reaches out to ``PREFECT_API_URL``, to a catalog on a server and to a store elsewhere, no further.
    """
    versions = installed_versions()
    checks = [*check_versions(versions)]
    rest: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("onnxruntime providers", check_providers),
        ("home", lambda: check_home(settings)),
        ("disk", lambda: check_disk(settings)),
        ("store", lambda: check_store(settings)),
        ("catalog", lambda: check_catalog(settings)),
        ("memory limit", lambda: check_memory(settings)),
        ("settings", check_environment),
        ("prefect server", check_prefect),
        ("hugging face", check_hub),
    )
    for name, check in rest:
        try:
            checks.append(check())
        except Exception as error:  # noqa: BLE001 - a broken library must not hide what the other checks found
            checks.append(
                Check(
                    name=name,
                    health=Health.PROBLEM,
                    found=f"could not be looked at: {type(error).__name__}: {_without_secrets(str(error), settings)}",
                    fix="reinstall onnx-ferry with its dependencies; if it stays, report it with this line",
                )
            )
    return Findings(versions={"python": platform.python_version(), **versions}, checks=tuple(checks))


def print_findings(console: Console, findings: Findings) -> None:
    """Print the findings as tables."""
    styles = {Health.OK: "green", Health.WARNING: "yellow", Health.PROBLEM: "bold red"}
    packages = Table.grid(padding=(0, 2))
    for name, number in findings.versions.items():
        packages.add_row(Text(name, "bold"), Text(number or "not installed"))
    console.print(packages)
    console.print()
    table = Table("check", "health", "found", "to do", box=None, pad_edge=False, header_style="bold")
    for check in findings.checks:
        table.add_row(
            Text(check.name),
            Text(check.health.value, styles[check.health]),
            Text(clean(check.found)),
            Text(clean(check.fix or "")),
        )
    console.print(table)


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package that conversions stand on, without importing it."""
    return {package: _version_of(package) for package in _PACKAGES}


def check_versions(versions: dict[str, str | None]) -> list[Check]:
    """Return a check per package: installed, and within the versions known to work."""
    return [_check_version(package, number, _RANGES[package]) for package, number in versions.items()]


def check_providers() -> Check:
    """Return which execution providers ONNX Runtime has, and whether they fit the devices of this machine."""
    import onnxruntime

    providers: Sequence[str] = onnxruntime.get_available_providers()
    name, found = "onnxruntime providers", ", ".join(providers)
    devices = _cuda_devices()
    if not devices:
        return Check(name=name, health=Health.OK, found=f"{found}; no CUDA device, so parity runs on the CPU")
    found = f"{found}; {devices} CUDA device{'s' if devices > 1 else ''}"
    if CUDA_PROVIDER in providers:
        return Check(name=name, health=Health.OK, found=found)
    return Check(
        name=name,
        health=Health.WARNING,
        found=found,
        fix="the device cannot be used: pip uninstall onnxruntime, then pip install onnxruntime-gpu",
    )


def check_home(settings: Settings) -> Check:
    """Return whether the home folder can be written."""
    return _check_folder("home", settings.home, "set FERRY_HOME to a folder that can be written")


def check_store(settings: Settings) -> Check:
    """Return whether the artifact store can be written."""
    from tasks.store import store_of

    try:
        workspace = settings.workspace()
        store = workspace.store
        if isinstance(store, str):
            store_of(workspace).check()
            size = f"{workspace.store_cache_bytes / _GIB:.0f} GiB of copies at most are kept here"
            return Check(name="store", health=Health.OK, found=f"{store}: answers; {size}")
    except FerryError as error:
        return Check(name="store", health=Health.PROBLEM, found=error.message, fix="set FERRY_STORE_URL")
    return _check_folder("store", store, "set FERRY_STORE_URL to a folder that can be written")


def check_disk(settings: Settings) -> Check:
    """Return how much room there is for artifacts and temporary files."""
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free at {folder}"
    if free >= _LITTLE_DISK_BYTES:
        return Check(name="disk", health=Health.OK, found=found)
    return Check(
        name="disk",
        health=Health.WARNING,
        found=found,
        fix="a model needs about three times its size; free some, or set FERRY_HOME to a larger disk",
    )


def check_catalog(settings: Settings) -> Check:
    """Return whether the catalog answers, and which schema it has."""
    from db.engine import make_engine
    from db.errors import CatalogError
    from db.migrate import HEAD, schema_version

    where = masked_url(settings.catalog_url)
    try:
        engine = make_engine(settings.catalog_url)
        try:
            schema = schema_version(engine)
        finally:
            engine.dispose()
    except CatalogError as error:
        return Check(
            name="catalog",
            health=Health.PROBLEM,
            found=_without_secrets(error.message, settings),
            fix="start the database, or set FERRY_CATALOG_URL to one that answers",
        )
    if schema is None:
        return Check(name="catalog", health=Health.OK, found=f"{where}: not there yet, the first conversion creates it")
    if schema == HEAD:
        return Check(name="catalog", health=Health.OK, found=f"{where}: schema {schema}, current")
    if schema < HEAD:
        found = f"{where}: schema {schema}, the next conversion brings it to {HEAD}"
        return Check(name="catalog", health=Health.OK, found=found)
    return Check(
        name="catalog",
        health=Health.PROBLEM,
        found=f"{where}: schema {schema}, which this version does not know (it knows up to {HEAD})",
        fix="upgrade onnx-ferry, or set FERRY_CATALOG_URL to another catalog",
    )


def check_memory(settings: Settings) -> Check:
    """Return whether the memory limit fits the machine."""
    limit, machine = int(settings.memory_limit), machine_memory_bytes()
    found = f"{limit / _GIB:.1f} GiB of {machine / _GIB:.1f} GiB"
    if limit > machine:
        fix = "lower FERRY_MEMORY_LIMIT below what the machine has, else the system kills conversions"
        return Check(name="memory limit", health=Health.WARNING, found=found, fix=fix)
    if limit < _LITTLE_MEMORY_BYTES:
        fix = "raise FERRY_MEMORY_LIMIT: torch alone takes about half a GiB per conversion"
        return Check(name="memory limit", health=Health.WARNING, found=found, fix=fix)
    return Check(name="memory limit", health=Health.OK, found=found)


def check_environment() -> Check:
    """Return whether a ``FERRY_`` variable has a name that nothing reads."""
    names = [f"FERRY_{field.upper()}" for field in Settings.model_fields]
    unknown = sorted(name for name in os.environ if name.upper().startswith("FERRY_") and name.upper() not in names)
    if not unknown:
        given = [name for name in names if os.environ.get(name)]
        return Check(name="settings", health=Health.OK, found=", ".join(given) or "no FERRY_ variable is set")
    hints = [f"{n} is {c[0]}?" for n in unknown if (c := get_close_matches(n.upper(), names, n=1, cutoff=0.6))]
    return Check(
        name="settings",
        health=Health.WARNING,
        found=f"nothing reads {', '.join(unknown)}",
        fix=f"did you mean: {' '.join(hints)}" if hints else f"the variables are {', '.join(names)}",
    )


def check_prefect() -> Check:
    """Return which Prefect server batches run on, and whether it answers within two seconds."""
    import httpx

    name, url = "prefect server", os.environ.get("PREFECT_API_URL", "").strip()
    if not url:
        found = "PREFECT_API_URL is not set: a batch starts Prefect's embedded server"
        return Check(name=name, health=Health.OK, found=found)
    where = masked_url(url)
    key = os.environ.get("PREFECT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", headers=headers, timeout=_REACH_TIMEOUT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return Check(
            name=name,
            health=Health.PROBLEM,
            found=f"{where} does not answer ({type(error).__name__})",
            fix="start that server, mend PREFECT_API_URL (it ends with /api), or unset it; --engine local needs none",
        )
    if answer.is_success:
        return Check(name=name, health=Health.OK, found=f"{where} answers")
    if answer.status_code in (401, 403):
        fix = "set PREFECT_API_KEY to a key of that server"
        return Check(name=name, health=Health.PROBLEM, found=f"{where} answers {answer.status_code}", fix=fix)
    fix = "look whether PREFECT_API_URL ends with /api"
    return Check(name=name, health=Health.WARNING, found=f"{where} answers {answer.status_code}", fix=fix)


def check_hub() -> Check:
    """Return whether the Hub is used with a token, and whether it may be used at all; the token is not shown."""
    from huggingface_hub.constants import HF_TOKEN_PATH

    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    login = Path(HF_TOKEN_PATH).is_file()
    found = "a token is set" if token else "logged in" if login else "no token: public models only"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check(
            name="hugging face",
            health=Health.WARNING,
            found=f"HF_HUB_OFFLINE is set; {found}",
            fix="only models that are cached or local can be converted; unset HF_HUB_OFFLINE to download others",
        )
    return Check(name="hugging face", health=Health.OK, found=found)


def _check_version(package: str, number: str | None, known: _Range) -> Check:
    wanted = f"{package}>={known.low}" + (f",<{known.high}" if known.high else "")
    fix = f"pip install '{wanted}': {known.why}"
    if number is None:
        return Check(name=package, health=Health.PROBLEM, found="not installed", fix=fix)
    try:
        release = Version(number)
    except InvalidVersion:
        return Check(name=package, health=Health.WARNING, found=f"{number}, which is not a version number", fix=fix)
    inside = release >= Version(known.low) and (known.high is None or release < Version(known.high))
    return Check(
        name=package,
        health=Health.OK if inside else known.outside,
        found=number if inside else f"{number} is outside {wanted}",
        fix=None if inside else fix,
    )


def _version_of(package: str) -> str | None:
    for name in _ONNXRUNTIME_BUILDS if package == "onnxruntime" else (package,):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cuda_devices() -> int:
    """Return the number of CUDA devices that the driver shows; the count needs neither torch nor nvidia-smi."""
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        # In a container the driver's folder may be hidden while the devices are there.
        return len([device for device in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", device.name)])


def _check_folder(name: str, folder: Path, fix: str) -> Check:
    if reason := why_not_writable(folder):
        return Check(name=name, health=Health.PROBLEM, found=f"{folder}: {reason}", fix=fix)
    found = f"{folder}: can be written" if folder.is_dir() else f"{folder}: not there yet, can be created"
    return Check(name=name, health=Health.OK, found=found)


def _without_secrets(text: str, settings: Settings) -> str:
    """Return ``text`` with the catalog's URL masked, should a driver quote it."""
    return text.replace(settings.catalog_url, masked_url(settings.catalog_url))
