"""Conventions that would rot as prose: who imports whom, what is exported, what lies where, what is declared."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "onnx_config", "db")

MAY_IMPORT = {
    "flows": {"flows", "tasks", "onnx_config", "db"},
    "tasks": {"tasks", "onnx_config", "db"},
    "onnx_config": {"onnx_config"},
    "db": {"db"},
}
MUST_NOT_KNOW = {
    "onnx_config": {"prefect", "sqlalchemy", "alembic", "typer", "rich"},
    "db": {"prefect", "torch", "transformers", "onnx", "onnxruntime", "typer", "rich"},
    "tasks": {"typer", "rich", "alembic"},
}
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "deploy",
    "docs",
    "tests",
    *PACKAGES,
}


def modules(*, migrations: bool = True) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if migrations or "migrations" not in path.parts:
                yield path


def cases(**chosen: bool) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in modules(**chosen)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the top-level package and the line of every import, those inside functions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0], node.lineno


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def repository_files() -> list[Path]:
    """Return the files that are tracked or would be: what git ignores is not the repository's text."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so there is no telling which files belong to the repository")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", cases())
def test_arrows_point_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[package_of(path)]
    wrong = [f"line {line}: {name}" for name, line in imported(path) if name in PACKAGES and name not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} may import {sorted(allowed)} only"


@pytest.mark.parametrize("path", cases())
def test_a_package_has_not_heard_of_foreign_worlds(path: Path) -> None:
    foreign = MUST_NOT_KNOW.get(package_of(path), set())
    assert not [f"line {line}: {name}" for name, line in imported(path) if name in foreign]


@pytest.mark.parametrize("path", cases())
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)) or not path.read_text(encoding="utf-8").strip()


def declared_all(path: Path) -> list[str] | None:
    for node in tree(path).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value)
            ):
                names: list[str] = ast.literal_eval(value)
                return names
    return None


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Return whether Typer calls this function: a command is registered where it stands and imported by nobody."""
    called = (decorator.func for decorator in node.decorator_list if isinstance(decorator, ast.Call))
    return any(isinstance(func, ast.Attribute) and func.attr in ("command", "callback") for func in called)


def public_names(path: Path) -> tuple[set[str], set[str]]:
    """Return the public names that have to be exported, and the constants and aliases that may be.

    A package's ``__init__`` has to export what it takes from its own modules.
    """
    must: set[str] = set()
    may: set[str] = set()
    for node in tree(path).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                (may if is_command(node) else must).add(name)
            case ast.Assign(targets=targets):
                may |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                may.add(name)
    if path.name == "__init__.py":
        for inner in ast.walk(tree(path)):
            if isinstance(inner, ast.ImportFrom) and (inner.module or "").partition(".")[0] == package_of(path):
                must |= {alias.asname or alias.name for alias in inner.names}
    return {name for name in must if not name.startswith("_")}, {name for name in may if not name.startswith("_")}


@pytest.mark.parametrize("path", cases(migrations=False))
def test_all_is_reality(path: Path) -> None:
    exported = set(declared_all(path) or [])
    must, may = public_names(path)
    assert must - exported == set(), "public, but not in __all__"
    assert exported - must - may == set(), "in __all__, but not defined here"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_can_be_had(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in getattr(module, "__all__", []) if not hasattr(module, name)] == []


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def requirements(*, extras: bool) -> list[Requirement]:
    lines = list(project()["dependencies"])  # type: ignore[call-overload]  # tomllib's values are untyped
    if extras:
        lines += [line for group in project()["optional-dependencies"].values() for line in group]  # type: ignore[attr-defined]  # the same
    return [Requirement(line) for line in lines]


# Imported where they are needed, by what says which extra to install where they are not there.
OPTIONAL = {"mlflow-skinny", "pyarrow"}


def test_every_import_is_a_declared_dependency() -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements(extras=False)} | OPTIONAL
    assert {canonicalize_name(requirement.name) for requirement in requirements(extras=True)} >= OPTIONAL
    homes = packages_distributions()
    missing = {
        f"{name} in {path.relative_to(ROOT)}"
        for path in modules()
        for name, _ in imported(path)
        if name not in sys.stdlib_module_names
        and name not in PACKAGES
        and not names & {canonicalize_name(home) for home in homes.get(name, [name])}
    }
    assert not missing


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }
    wrong = [
        str(requirement)
        for requirement in requirements(extras=True)
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "missing"))
    ]
    assert not wrong


def test_nothing_else_lies_at_the_top() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in repository_files()} <= TOP_LEVEL


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # Spelt with a class of one letter, or this file would be found.
    machine = re.compile(r"(?<![\w.:/-])/(?:[w]ork|[r]oot|tmp/[w]|opt/[w]heels|opt/[p]ypi)(?:/|\b(?=[\s'\"`)]))")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if machine.search(line)
    ]
    assert not found
