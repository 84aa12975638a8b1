"""The page of faults: every line names a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "deploy" / "FAULTS.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|"))
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| **", "| what goes wrong"))
]


def test_the_page_has_what_people_ask_about() -> None:
    assert len(ROWS) >= 30
    assert all(len(row) == 3 and all(row) for row in ROWS)
    headings = re.findall(r"^\| \*\*(.+?)\*\*", PAGE, re.MULTILINE)
    assert {"A child process", "A worker", "The database", "A disk", "The store", "The Hub", "A clock"} <= set(headings)


@pytest.mark.parametrize("row", ROWS, ids=[f"{number}" for number, _ in enumerate(ROWS, start=1)])
def test_the_test_that_a_line_names_is_there(row: tuple[str, str, str]) -> None:
    found = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)`", row[2])
    assert found, row
    path, name = found.groups()
    functions = {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
                 if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert name in functions, row


def test_no_line_stands_twice() -> None:
    assert len({row[2] for row in ROWS}) == len(ROWS)
