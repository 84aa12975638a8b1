"""A crew of threads: every item once, failures where they are read, and nobody waits for what nobody needs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.crew import Crew


def test_every_item_is_done_once():
    crew = Crew(lambda item: item * 2, range(100), workers=8)
    assert dict(crew.results()) == {item: item * 2 for item in range(100)}


def test_nothing_to_do_is_done_at_once():
    assert list(Crew(str, [], workers=8).results()) == []


def test_no_more_workers_than_asked_for():
    lock, inside, most = threading.Lock(), 0, 0

    def work(_item: int) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1

    list(Crew(work, range(12), workers=3).results())
    assert most == 3


def test_results_come_as_they_end():
    first = threading.Event()

    def work(item: str) -> None:
        if item == "slow":
            first.wait(10)

    results = Crew(work, ["slow", "quick"], workers=2).results()
    assert next(results)[0] == "quick"
    first.set()
    assert next(results)[0] == "slow"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_what_a_call_raises_is_raised_where_results_are_read(error):
    def work(item: int) -> int:
        if item == 1:
            raise error
        return item

    crew = Crew(work, [0, 1, 2], workers=1)
    results = crew.results()
    assert next(results) == (0, 0)
    with pytest.raises(type(error)):
        next(results)


def test_a_dismissed_crew_begins_nothing_more():
    begun: list[int] = []
    go_on, inside = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        inside.set()
        go_on.wait(10)

    crew = Crew(work, range(5), workers=1)
    assert inside.wait(10)
    assert not crew.dismiss(seconds=0.1)
    assert crew.dismiss(seconds=5, meanwhile=go_on.set)
    assert begun == [0]


def test_a_call_that_never_ends_does_not_keep_python_alive():
    code = (
        "import time; from tasks.crew import Crew\n"
        "crew = Crew(time.sleep, [600], workers=1)\n"
        "assert not crew.dismiss(seconds=0.1)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=20)
