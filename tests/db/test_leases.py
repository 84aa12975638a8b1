"""Who has the lease on a key: one at a time, until it is given back or its time is over by the database's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session

from db import (
    LeaseRecord,
    find_leases,
    forget_lapsed_leases,
    keep_lease,
    release_lease,
    session_scope,
    take_lease,
)

KEY = "a" * 64
OURS = LeaseRecord(key=KEY, owner="ours", host="one", process_id=7, process="one 7")
THEIRS = LeaseRecord(key=KEY, owner="theirs", host="two", process_id=8, process="two 8")
OVER = -1.0


def test_a_free_lease_is_taken_and_said_whose_it_is(session):
    assert find_leases(session, [KEY]) == {}
    assert take_lease(session, OURS, seconds=60) is OURS
    assert find_leases(session, [KEY, "b" * 64]) == {KEY: OURS}


@pytest.mark.parametrize(
    ("seconds", "instead_of", "expected"),
    [
        pytest.param(60.0, None, OURS, id="held"),
        pytest.param(60.0, "ours", THEIRS, id="its-owner-is-known-to-be-gone"),
        pytest.param(60.0, "another", OURS, id="another-is-known-to-be-gone"),
        pytest.param(OVER, None, THEIRS, id="lapsed"),
    ],
)
def test_another_gets_it(session, seconds, instead_of, expected):
    take_lease(session, OURS, seconds=seconds)
    assert take_lease(session, THEIRS, seconds=60, instead_of=instead_of) == expected
    assert find_leases(session, [KEY]) == {KEY: expected}
    assert keep_lease(session, OURS, seconds=60) is (expected is OURS)


def test_leases_on_two_keys_have_nothing_to_do_with_each_other(session):
    other = replace(THEIRS, key="b" * 64)
    assert take_lease(session, OURS, seconds=60) is OURS
    assert take_lease(session, other, seconds=60) is other


def test_taking_it_again_is_the_same_lease(session):
    """As after a connection that broke when the database had taken it and not said so."""
    take_lease(session, OURS, seconds=OVER)
    assert take_lease(session, OURS, seconds=60) is OURS
    assert find_leases(session, [KEY]) == {KEY: OURS}


def test_one_that_is_kept_does_not_lapse(session):
    take_lease(session, OURS, seconds=OVER)
    assert find_leases(session, [KEY]) == {KEY: replace(OURS, lapsed=True)}
    # Nobody has taken it meanwhile, so it is had.
    assert keep_lease(session, OURS, seconds=60)
    assert take_lease(session, THEIRS, seconds=60) == OURS


@pytest.mark.parametrize("who", [pytest.param(OURS, id="by-its-owner"), pytest.param(THEIRS, id="by-another")])
def test_one_is_given_back_by_its_owner_alone(session, who):
    take_lease(session, OURS, seconds=60)
    assert release_lease(session, who) is (who is OURS)
    assert find_leases(session, [KEY]) == ({} if who is OURS else {KEY: OURS})


def test_what_killed_workers_left_is_removed_after_a_day(session):
    old, lately, held = (replace(OURS, key=letter * 64) for letter in "abc")
    take_lease(session, old, seconds=-90_000)
    take_lease(session, lately, seconds=-3600)
    take_lease(session, held, seconds=60)
    forget_lapsed_leases(session)
    assert find_leases(session, [old.key, lately.key, held.key]).keys() == {lately.key, held.key}


def test_a_key_is_64_digits():
    with pytest.raises(ValueError, match="key"):
        replace(OURS, key="short")


def test_no_time_of_the_worker_is_in_any_statement(engine):
    """Its clock may jump as it likes."""
    given: list[object] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, _sql, values, *_: given.extend(_flat(values)))
    with session_scope(engine) as session:
        take_lease(session, OURS, seconds=60)
        take_lease(session, THEIRS, seconds=60)
        keep_lease(session, OURS, seconds=60)
        find_leases(session, [KEY])
        forget_lapsed_leases(session)
        release_lease(session, OURS)
    assert given
    assert not [value for value in given if isinstance(value, datetime)]
    assert not [value for value in given if isinstance(value, str) and value.startswith("20")]


def _flat(values: object) -> list[object]:
    return list(values.values()) if isinstance(values, dict) else list(values)  # type: ignore[call-overload]


def test_a_lease_lapses_by_itself(engine):
    with session_scope(engine) as session:
        take_lease(session, OURS, seconds=0.3)
    started = time.monotonic()
    while True:
        with session_scope(engine) as session:
            if take_lease(session, THEIRS, seconds=60) is THEIRS:
                break
        time.sleep(0.02)
    assert 0.2 < time.monotonic() - started < 3


def test_of_many_that_want_it_at_once_one_has_it(engine):
    wanted = [replace(OURS, owner=f"worker {number}") for number in range(8)]
    together = threading.Barrier(len(wanted))
    found: list[LeaseRecord] = []

    def want(record: LeaseRecord) -> None:
        together.wait()
        with session_scope(engine) as session:
            found.append(take_lease(session, record, seconds=60))

    threads = [threading.Thread(target=want, args=(record,)) for record in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == len(wanted)
    assert len({record.owner for record in found}) == 1


def test_of_many_that_wait_for_a_dead_one_one_gets_it(engine):
    with session_scope(engine) as session:
        take_lease(session, replace(OURS, owner="dead"), seconds=OVER)
    test_of_many_that_want_it_at_once_one_has_it(engine)


def test_nobody_takes_what_is_being_confirmed(engine):
    """What a worker records in the same transaction, it records as the owner."""
    with session_scope(engine) as session:
        take_lease(session, OURS, seconds=OVER)
    got: list[LeaseRecord] = []

    def want() -> None:
        with session_scope(engine) as session:
            got.append(take_lease(session, THEIRS, seconds=60))

    other = threading.Thread(target=want)
    with session_scope(engine) as session:
        assert keep_lease(session, OURS, seconds=60)
        other.start()
        other.join(0.3)
        assert other.is_alive(), "waits for the end of the transaction"
    other.join(30)
    assert got == [OURS]


def test_what_is_rolled_back_was_never_taken(engine: Engine) -> None:
    def fail(open_session: Callable[[Engine], AbstractContextManager[Session]]) -> None:
        with open_session(engine) as session:
            take_lease(session, OURS, seconds=60)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(session_scope)
    with session_scope(engine, read_only=True) as session:
        assert find_leases(session, [KEY]) == {}


def test_a_lease_is_read_as_a_moment_by_everybody(engine):
    """A text that SQLAlchemy would not have written would compare wrongly, or not be read."""
    with session_scope(engine) as session:
        take_lease(session, OURS, seconds=60)
        kinds = {type(row[0]) for row in session.execute(text("SELECT expires_at FROM leases"))}
        from db.models import Lease

        (row,) = session.query(Lease).all()
        assert 59 < (row.expires_at - row.acquired_at).total_seconds() < 61
    assert kinds == ({str} if engine.dialect.name == "sqlite" else {datetime})
