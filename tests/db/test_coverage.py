"""What was verified where, and what batches found done."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from db import finish_batch, note_found_done, record_conversion, record_parity, start_batch
from db.coverage import Place, Seen, batch_members, coverage
from db.dashboard.axes import axes_picture
from db.found import list_found_done
from db.overview import OverviewFilter, Period, count_by, running_totals, totals_over_time
from db.records import BatchTotals, GraphRecord, TensorRecord

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CPU = {"device": "cpu", "provider": "CPUExecutionProvider"}
CUDA = {"device": "cuda", "provider": "CUDAExecutionProvider"}


def check(make_record, *cells, **changes):
    """Return a check whose cells are ``(level, verdict, difference)``."""
    (base,) = make_record(1).parity
    (cell,) = base.cells
    provider = changes.get("provider", cell.provider)
    made = tuple(
        replace(cell, optimization=level, verdict=verdict, max_abs_diff=difference, provider=provider)
        for level, verdict, difference in cells
    )
    return replace(base, cells=made, **changes)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        pytest.param([((("all", "verified", 1e-6),), CPU)], {("cpu", "all"): ("verified", 1, 1e-6)}, id="one"),
        pytest.param([((), CPU)], {("cpu", "-"): ("verified", 5, 1.2e-6)}, id="an-older-check-without-cells"),
        pytest.param(
            [((("all", "verified", 1e-6), ("all", "mismatch", 1e-3), ("all", "verified", None)), CPU)],
            {("cpu", "all"): ("mismatch", 3, 1e-3)},
            id="the-worst-counts",
        ),
        pytest.param(
            [((("all", "mismatch", 1e-3),), CPU), ((("all", "verified", 1e-6),), CPU)],
            {("cpu", "all"): ("verified", 1, 1e-6)},
            id="a-later-check-replaces",
        ),
        pytest.param(
            [((("all", "verified", 1e-6),), CPU), ((("basic", "unstable", 1e-4), ("all", "verified", 2e-6)), CUDA)],
            {("cpu", "all"): ("verified", 1, 1e-6), ("cuda", "basic"): ("unstable", 1, 1e-4),
             ("cuda", "all"): ("verified", 1, 2e-6)},
            id="each-place-for-itself",
        ),
    ],
)  # fmt: skip
def test_the_newest_word_on_each_place(session, make_record, checks, expected):
    number = record_conversion(session, make_record(1, parity=()))
    for cells, changes in checks:
        record_parity(session, number, check(make_record, *cells, **changes))
    covered = coverage(session, [number])
    found = covered.seen[number]
    assert {(p.device, p.optimization): (s.verdict, s.compared, s.max_abs_diff) for p, s in found.items()} == expected
    assert [(place.device, place.optimization) for place in covered.places] == list(expected)
    assert sum(covered.count(place, "verified") for place in covered.places) == sum(
        verdict == "verified" for verdict, *_ in expected.values()
    )


def test_what_was_never_compared_has_an_entry_and_no_word(session, make_record):
    failed = record_conversion(session, make_record(1, failure="timeout"))
    covered = coverage(session, [failed])
    assert (covered.places, covered.seen) == ((), {failed: {}})
    assert Seen(verdict="verified", compared=1, max_abs_diff=None) != Place(**CPU, optimization="all")


def test_what_a_batch_finds_done_is_counted_and_listed(session, make_record):
    earlier = [record_conversion(session, make_record(number)) for number in (1, 2, 3)]
    failure = record_conversion(session, make_record(4, failure="unsupported"))
    ever = OverviewFilter(period=Period.ALL, now=NOW)
    before = count_by(session, ever, "error_kind")
    batch = start_batch(session, engine="local", started_at=NOW)
    own = record_conversion(session, make_record(5), batch_id=batch)
    found = [*((number, "reused") for number in earlier), (failure, "failed"), (own, "reused")]
    later = NOW + timedelta(hours=2)
    note_found_done(session, batch, found, found_at=later)
    # A part of the batch that was started again finds the same.
    note_found_done(session, batch, found, found_at=later)
    assert running_totals(session, batch) == BatchTotals(converted=1, reused=3, failed=1)
    assert [(row.id, row.status) for row in list_found_done(session, batch, limit=3)] == [
        (failure, "failed"), (earlier[2], "reused"), (earlier[1], "reused"),
    ]  # fmt: skip
    assert batch_members(session, batch, limit=3) == [own, failure, earlier[2]]
    assert batch_members(session, batch, limit=9, before=earlier[2]) == [earlier[1], earlier[0]]
    assert count_by(session, ever, "status")["reused"] == 3
    # A failure that is only remembered is none more.
    assert count_by(session, ever, "error_kind") == before
    assert count_by(session, replace(ever, task="text-classification"), "status")["reused"] == 3
    points = {point.start: point.totals.reused for point in totals_over_time(session, replace(ever, now=NOW))}
    assert points == {NOW.replace(hour=0): 3}
    finish_batch(session, batch, BatchTotals(converted=1, reused=3, failed=1), finished_at=later)
    assert record_conversion(session, make_record(1)) not in batch_members(session, batch, limit=9)


def tensor(name, *shape):
    return TensorRecord(name=name, dtype="float32", shape=shape)


def graph(inputs, outputs):
    return GraphRecord(
        role="model", path="model.onnx", opset=20, nodes=1, nodes_before_simplify=1, inputs=inputs, outputs=outputs
    )


def test_axes_are_lines_that_stop_at_their_tensors():
    picture = axes_picture(
        graph(
            (tensor("input_ids", "batch", "seq"), *(tensor(f"past.{n}.key", "batch", 4, "past") for n in range(12))),
            (tensor("logits", "batch", "seq", 2), *(tensor(f"present.{n}", "batch", "past + seq") for n in range(12))),
        )
    )
    assert picture is not None
    assert [line.name for line in picture.lines] == ["batch", "seq", "past"]
    assert [(row.name, row.count, row.is_input, row.fixed) for row in picture.rows] == [
        ("input_ids", 1, True, ""), ("past.*.key", 12, True, "4"), ("logits", 1, False, "2"),
        ("present.*", 12, False, ""),
    ]  # fmt: skip
    batch, sequence, past = picture.lines
    assert (batch.top, batch.bottom) == (picture.rows[0].y, picture.rows[3].y)
    assert (past.top, past.bottom) == (picture.rows[1].y, picture.rows[3].y)
    assert [(stop.x, stop.position, stop.formula) for stop in picture.rows[3].stops] == [
        (batch.x, 0, None), (past.x, 1, "past + seq"), (sequence.x, 1, "past + seq"),
    ]  # fmt: skip


def test_a_graph_of_fixed_sizes_has_no_picture_and_a_large_one_is_cut():
    assert axes_picture(graph((tensor("x", 1, 2),), ())) is None
    letters = [tensor("abcdefghij"[n // 10] + "abcdefghij"[n % 10], "batch", n) for n in range(90)]
    picture = axes_picture(graph(tuple(letters), ()))
    assert picture is not None
    assert (len(picture.rows), picture.left_out) == (40, 50)
