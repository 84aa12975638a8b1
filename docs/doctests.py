"""Has the examples of docstrings shown as code: mkdocstrings reads them as quotations where they stand among words."""

from __future__ import annotations

from typing import Any

import griffe

__all__ = ["Doctests"]


class Doctests(griffe.Extension):
    """Puts a fence around each example."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of what was found."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its examples, each of which ends at an empty line, as blocks of code."""
    done: list[str] = []
    inside = False
    for line in [*text.split("\n"), ""]:
        if line.startswith(">>>") and not inside:
            done.append("```pycon")
            inside = True
        elif inside and not line.strip():
            done.append("```")
            inside = False
        done.append(line)
    return "\n".join(done[:-1])
