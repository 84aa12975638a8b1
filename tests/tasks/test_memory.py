"""The memory gate: never over its limit, nobody waits for ever, the big ones run alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tasks.crew import Crew
from tasks.memory import MemoryGate, estimate_bytes

GIB = 1024**3


class Watched:
    """A gate that notes who is inside."""

    def __init__(self, limit: int) -> None:
        self.gate = MemoryGate(limit)
        self.lock = threading.Lock()
        self.inside: list[int] = []
        self.seen: list[tuple[int, ...]] = []

    def enter(self, wanted: int, seconds: float = 0.001) -> int:
        with self.gate.admit(wanted) as share:
            with self.lock:
                self.inside.append(share)
                self.seen.append(tuple(self.inside))
            time.sleep(seconds)
            with self.lock:
                self.inside.remove(share)
        return share


def enter_all(watched: Watched, wanted: list[int]) -> list[int]:
    """Enter on eight threads; fail where they wait for ever."""
    shares: list[int] = []
    # The crew's own threads keep nothing alive, so that a gate that never opens fails a test and does not hang it.
    crew = Crew(watched.enter, wanted, workers=8)
    reader = threading.Thread(target=lambda: shares.extend(share for _, share in crew.results()), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive(), f"after 10 s only {len(shares)} of {len(wanted)} were let in"
    return shares


# Unshrunk, since each try of a gate that never opens takes its ten seconds.
@settings(deadline=None, max_examples=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.integers(1, 50), st.lists(st.integers(0, 80), min_size=1, max_size=24))
def test_eight_threads_never_exceed_the_limit_and_all_get_in(limit, wanted):
    watched = Watched(limit)
    assert sorted(enter_all(watched, wanted)) == sorted(min(size, limit) for size in wanted)
    assert max(sum(inside) for inside in watched.seen) <= limit


def test_what_fits_runs_at_once():
    gate = MemoryGate(10)
    with gate.admit(4), gate.admit(6):
        pass


@pytest.mark.parametrize(
    ("workers", "wanted", "granted"),
    [(None, 1, 1), (1, 1, 10), (2, 1, 5), (2, 6, 6), (2, 99, 10), (3, 0, 3), (20, 1, 1)],
)
def test_who_is_one_of_so_many_gets_an_equal_part_at_least(workers, wanted, granted):
    with MemoryGate(10, workers=workers).admit(wanted) as share:
        assert share == granted


def test_as_many_as_were_told_are_let_in_at_once():
    gate = MemoryGate(10, workers=3)
    with gate.admit(1), gate.admit(2), gate.admit(1):
        pass


def test_a_model_that_needs_more_than_there_is_runs_alone():
    watched = Watched(10)
    enter_all(watched, [3, 3, 99, 3, 10, 3, 3])
    assert [inside for inside in watched.seen if 10 in inside and len(inside) > 1] == []


def test_alone_waits_for_the_others_and_keeps_them_out():
    gate = MemoryGate(10)
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def small() -> None:
        with gate.admit(1):
            inside.set()
            leave.wait(10)
            order.append("small")

    def alone() -> None:
        with gate.alone() as share:
            order.append(f"alone with {share}")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(small)
        assert inside.wait(10)
        second = pool.submit(alone)
        time.sleep(0.05)
        assert order == []
        leave.set()
        first.result(10)
        second.result(10)
    assert order == ["small", "alone with 10"]


def test_a_failure_inside_gives_the_share_back():
    gate = MemoryGate(10)
    for _ in range(3):
        with pytest.raises(RuntimeError), gate.admit(10):
            raise RuntimeError
    with gate.alone() as share:
        assert share == 10


def test_an_interruption_ends_the_wait():
    gate, stopping = MemoryGate(10), threading.Event()

    def wait() -> None:
        with gate.admit(1, stopping=stopping):
            pytest.fail("let in although nothing was free")

    with gate.alone(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        time.sleep(0.05)
        assert not waiting.done()
        stopping.set()
        with pytest.raises(KeyboardInterrupt):
            waiting.result(5)


@pytest.mark.parametrize(
    ("weights", "at_least", "at_most"),
    [
        pytest.param(0, GIB, 2 * GIB, id="torch-alone-takes-some"),
        pytest.param(GIB, 4 * GIB, 9 * GIB, id="four-copies-at-least"),
    ],
)
def test_the_estimate_covers_what_a_conversion_holds(weights, at_least, at_most):
    assert at_least <= estimate_bytes(weights) <= at_most


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_larger_model_is_never_estimated_smaller(one, other):
    assert (estimate_bytes(one) <= estimate_bytes(other)) == (one <= other)
