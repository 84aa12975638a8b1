"""The pages of documentation and the README: what they show is there, and what they say to type does what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.manifest import read_manifest
from flows.settings import Settings, load_settings
from onnx_config.errors import ErrorKind

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS / "pages").as_posix(): path for path in sorted((DOCS / "pages").rglob("*.md"))}
TEXTS = {**PAGES, "README.md": ROOT / "README.md"}

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[\w-]+)(?:: (?P<said>\S+))? -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the fenced blocks of a page: kind, text, and the comment that marks it for these tests."""
    for found in BLOCK.finditer(path.read_text(encoding="utf-8")):
        yield found.groupdict()


def load_reference() -> ModuleType:
    found = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


REFERENCE = load_reference()
KNOWN = dict(REFERENCE.commands())


def lines() -> list[Any]:
    """Return each ``ferry`` command that a page shows."""
    found = []
    for name, path in TEXTS.items():
        for block in blocks(path):
            for line in re.findall(r"^(?:\$ |.*&& )(ferry [^#\n&]*)", block["text"], re.M):
                found.append(pytest.param(line.strip(), id=f"{name}: {line.strip()}"))
    return found


@pytest.mark.parametrize("line", lines())
def test_a_command_that_is_shown_is_one(line: str) -> None:
    words = shlex.split(line)
    command = next((KNOWN[" ".join(words[:n])] for n in (3, 2) if " ".join(words[:n]) in KNOWN), None)
    assert command is not None, f"there is no {words[:3]}"
    options = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in options] == []


def manifests() -> list[Any]:
    found = []
    for name, path in TEXTS.items():
        for number, block in enumerate(blocks(path)):
            if block["kind"] == "yaml":
                found.append(pytest.param(block["text"], id=f"{name}-{number}"))
    return found


@pytest.mark.parametrize("text", manifests())
def test_a_manifest_that_is_shown_is_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    # Some show the defaults alone.
    keys = YAML(typ="safe", pure=True).load(text).keys()
    path.write_text(text if keys & {"models", "query"} else f"{text}\nmodels: [org/name]\n", encoding="utf-8")
    read_manifest(path, ask=False)


def test_the_settings_that_are_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FERRY_HOME")
    (shown,) = [block["text"] for block in blocks(PAGES["reference/settings.md"]) if block["kind"] == "toml"]
    Path("ferry.toml").write_text(shown, encoding="utf-8")
    assert load_settings().timeout == 90 * 60


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_kind_of_failure_has_a_section(kind: ErrorKind) -> None:
    text = PAGES["troubleshooting.md"].read_text(encoding="utf-8")
    section = re.search(rf"^## {kind}\n(.*?)(?=^## )", text, re.M | re.S)
    assert section is not None
    assert "**Means:** " in section[1]
    assert "**Do:** " in section[1]


def test_no_other_kind_has_one() -> None:
    text = PAGES["troubleshooting.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"^## ([a-z_]+)$", text, re.M)) == {kind.value for kind in ErrorKind}


def test_the_reference_has_all_that_the_code_has() -> None:
    commands = REFERENCE.filled("<!-- generated: commands -->")
    for words, command in KNOWN.items():
        assert f"## {words} " in commands
        for parameter in command.params:
            assert all(option in commands for option in parameter.opts if option.startswith("--"))
    settings = REFERENCE.filled("<!-- generated: settings -->")
    assert set(re.findall(r"`FERRY_(\w+)`", settings)) == {name.upper() for name in Settings.model_fields}
    for name in REFERENCE.PARTS:
        table = REFERENCE.filled(f"<!-- generated: {name} -->")
        assert not re.search(r"^\| `[^|]*` \|\s*\|", table, re.M), f"something in {name} has no words"


def test_the_pages_are_built_without_a_warning_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the pages need the extra docs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert built.returncode == 0, built.stderr
    for name in PAGES:
        page = (tmp_path / name).with_suffix(".html").read_text(encoding="utf-8")
        assert "<!-- generated" not in page
        assert not re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//", page)


# What is marked as running does.


class Place:
    """A folder that pages are followed in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "programs"
        programs.mkdir()
        for name, command in (("python", ""), ("ferry", " -m flows.entry")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n', encoding="utf-8")
            program.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FERRY_", "PREFECT_"))}
        self._environment = {
            **kept,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
        }

    def follow(self, page: Path) -> int:
        """Write the files that a page says to, type what it says to, and return how much that was."""
        typed = 0
        for block in blocks(page):
            match block["mark"]:
                case "file":
                    (self.folder / block["said"]).write_text(block["text"], encoding="utf-8")
                case "runs":
                    for line in re.findall(r"^\$ (.*)$", block["text"], re.M):
                        self._type(line, expected=int(block["said"] or 0))
                        typed += 1
        return typed

    def _type(self, line: str, *, expected: int) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, f"$ {line}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder in which the tutorial was followed."""
    made = Place(tmp_path_factory.mktemp("place"))
    assert made.follow(PAGES["tutorial.md"]) == 9
    return made


RUNNABLE = [name for name, path in TEXTS.items() if "\n<!-- runs" in path.read_text(encoding="utf-8")]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "tutorial.md"])
def test_a_page_can_be_followed(place: Place, name: str) -> None:
    assert place.follow(TEXTS[name]) >= 1
