"""What registering a thing with a Prefect server comes to: made, brought up to date, or left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Action", "Registered", "registered"]


class Action(StrEnum):
    """What registering does to a thing on the server."""

    CREATE = "create"
    UPDATE = "update"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """One thing of the file and what became of it."""

    what: str
    """``work_pool``, ``concurrency_limit``, ``tag_limit``, ``notification`` or ``deployment``."""

    name: str

    action: Action

    changed: tuple[str, ...] = ()
    """Which keys differ, of one that is updated."""


def registered(
    what: str, name: str, there: object, changed: Iterable[str], do: Callable[[Action], object], *, dry_run: bool
) -> Registered:
    """Call ``do`` where the thing is not there, or something of it has changed; return what was done, or would be."""
    fields = tuple(changed)
    action = Action.CREATE if there is None else Action.UPDATE if fields else Action.UNCHANGED
    if action is not Action.UNCHANGED and not dry_run:
        do(action)
    return Registered(what=what, name=name, action=action, changed=() if there is None else fields)
