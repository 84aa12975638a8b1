"""Every question that the dashboard and ``ferry catalog`` ask, by name: to measure them and to read their plans.

Each is given the session, what is in the catalog, and a number that says which of many it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.orm import Session

from db.batches import get_batch, list_batches
from db.conversions import count_conversions, get_conversion, list_conversions
from db.leases import list_running
from db.listing import (
    ConversionFilter,
    PlaceInListing,
    count_up_to,
    list_page,
    model_history,
    timed_conversions,
)
from db.named import find_artifacts, find_conversion
from db.overview import (
    OverviewFilter,
    Period,
    artifact_sizes,
    count_by,
    current_totals,
    known_words,
    running_batches,
    running_totals,
    step_figures,
    totals_over_time,
)
from db.templates import list_templates
from tests.db.bulk import OLD_ORG, RARE_WORD, BulkCatalog, model_id

__all__ = ["QUERIES", "Query"]

Query = Callable[[Session, BulkCatalog, int], object]

# What is typed into a search: common, rare, of long ago, of no model, of one and two letters, with wildcards in it.
_TEXTS = {
    "common": "bert",
    "rare": RARE_WORD,
    "old organisation": f"{OLD_ORG}/",
    "one organisation": "org-77/",
    "absent": "no-such-model",
    "two letters": "t5",
    "two letters, absent": "zq",
    "wildcard": "100%_",
}
# Words of the other columns that `ferry catalog search` looks into.
_MORE_TEXTS = {
    "a task": "token-class",
    "a class": "ForCTC",
    "a rare type": "odd_17",
    "an error": "attention/add_97 was",
    "a common error": "leave the axis fixed",
    "a message of long ago": f"{OLD_ORG}/bert",
}


def _models() -> dict[str, Query]:
    found: dict[str, Query] = {}

    def add(name: str, wanted: Callable[[BulkCatalog, int], ConversionFilter], *, deep: bool = False) -> None:
        def page(session: Session, catalog: BulkCatalog, number: int) -> object:
            middle = catalog.began_at + (catalog.ended_at - catalog.began_at) / 2
            place = PlaceInListing(finished_at=middle, id=catalog.conversions // 2) if deep else None
            return list_page(session, wanted(catalog, number), after=place)

        found[f"models: {name}{', in the middle' if deep else ''}"] = page
        if not deep:
            found[f"models: how many, {name}"] = lambda session, catalog, number: count_up_to(
                session, wanted(catalog, number), most=10_000
            )

    for deep in (False, True):
        add("all", lambda *_: ConversionFilter(), deep=deep)
        add("every attempt", lambda *_: ConversionFilter(every=True), deep=deep)
        add("status", lambda *_: ConversionFilter(status="mismatch"), deep=deep)
        add("task", lambda *_: ConversionFilter(task="fill-mask"), deep=deep)
        add("type", lambda *_: ConversionFilter(model_type="odd_17"), deep=deep)
        add("error", lambda *_: ConversionFilter(error_kind="timeout"), deep=deep)
        add("worker", lambda *_: ConversionFilter(worker="machine-3"), deep=deep)
        add("status and task", lambda *_: ConversionFilter(status="failed", task="fill-mask"), deep=deep)
        add("task and error", lambda *_: ConversionFilter(task="fill-mask", error_kind="timeout"), deep=deep)
        add("common text and error", lambda *_: ConversionFilter(text="bert", error_kind="timeout"), deep=deep)
    add("a run", lambda catalog, number: ConversionFilter(batch_id=1 + number % catalog.batches))
    add("since", lambda catalog, _: ConversionFilter(since=catalog.ended_at - timedelta(days=7)))
    for name, text in _TEXTS.items():
        add(f"text, {name}", lambda *_, text=text: ConversionFilter(text=text))
    add("text, an id", lambda catalog, number: ConversionFilter(text=model_id(_model(catalog, number), catalog.models)))
    return found


def _overview() -> dict[str, Query]:
    found: dict[str, Query] = {}
    filters = {"": {}, ", task": {"task": "fill-mask"}, ", type": {"model_type": "bert"}}
    filters[", both"] = filters[", task"] | filters[", type"]
    filters[", worker"] = {"worker": "machine-3"}
    filters[", worker and task"] = filters[", worker"] | filters[", task"]
    for words, given in filters.items():
        for period in Period if not words else (Period.WEEK, Period.ALL):

            def wanted(catalog: BulkCatalog, given: dict[str, str] = given, period: Period = period) -> OverviewFilter:
                return OverviewFilter(period=period, now=catalog.ended_at, **given)

            name = f"{period.value}{words}"
            found[f"overview: over time, {name}"] = lambda s, c, _, w=wanted: totals_over_time(s, w(c))
            for column in ("status", "error_kind", "template"):
                found[f"overview: by {column}, {name}"] = lambda s, c, _, w=wanted, k=column: count_by(s, w(c), k)
            found[f"overview: steps, {name}"] = lambda s, c, _, w=wanted: step_figures(s, w(c))
    found["overview: what holds now"] = lambda session, *_: current_totals(session)
    found["overview: sizes"] = lambda session, *_: artifact_sizes(session)
    found["overview: tasks"] = lambda session, *_: known_words(session, "task")
    found["overview: types"] = lambda session, *_: known_words(session, "model_type")
    found["overview: workers"] = lambda session, *_: known_words(session, "worker")
    found["overview: in work"] = lambda session, *_: list_running(session)
    found["overview: running"] = lambda session, catalog, _: [
        running_totals(session, batch.id) for batch in running_batches(session, now=catalog.ended_at)
    ]
    return found


def _commands() -> dict[str, Query]:
    found: dict[str, Query] = {
        "list: all": lambda session, *_: list_conversions(session),
        "list: all, how many": lambda session, *_: count_conversions(session),
        "list: every attempt": lambda session, *_: list_conversions(session, latest_only=False),
        "list: every attempt, how many": lambda session, *_: count_conversions(session, latest_only=False),
        "list: templates": lambda session, *_: list_templates(session),
    }
    for status, task in (("failed", None), (None, "fill-mask"), ("failed", "fill-mask")):
        name = ", ".join(filter(None, (status, task)))
        for every in (False, True):
            given = {"status": status, "task": task, "latest_only": not every}
            words = f"{name}{', every attempt' if every else ''}"
            found[f"list: {words}"] = lambda s, *_, g=given: list_conversions(s, **g)
            found[f"list: {words}, how many"] = lambda s, *_, g=given: count_conversions(s, **g)
    for name, text in (_TEXTS | _MORE_TEXTS).items():
        for every in (False, True):
            words = f"search: {name}{', every attempt' if every else ''}"
            found[words] = lambda s, *_, t=text, e=every: list_conversions(s, text=t, latest_only=not e)
            found[f"{words}, how many"] = lambda s, *_, t=text, e=every: count_conversions(
                s, text=t, latest_only=not e, most=501
            )
    return found


def _one() -> dict[str, Query]:
    def an_id(session: Session, catalog: BulkCatalog, number: int) -> str:
        return model_id(_model(catalog, number), catalog.models)

    def digits(session: Session, catalog: BulkCatalog, number: int) -> str:
        record = get_conversion(session, 1 + number * 7 % catalog.conversions)
        return "abcdef0" if record is None or record.artifact is None else record.artifact.sha256[:12]

    return {
        "model: one": lambda s, c, n: get_conversion(s, 1 + n * 7919 % c.conversions),
        "model: its history": lambda s, c, n: model_history(s, an_id(s, c, n)),
        "runs: a page": lambda s, c, n: [batch.totals for batch in list_batches(s, limit=51)],
        "runs: the last page": lambda s, c, n: list_batches(s, limit=51, offset=max(0, c.batches - 51)),
        "runs: one": lambda s, c, n: (get_batch(s, 1 + n % c.batches), running_totals(s, 1 + n % c.batches)),
        "runs: its timeline": lambda s, c, n: timed_conversions(s, 1 + n % c.batches, limit=300),
        "show: a number": lambda s, c, n: find_conversion(s, str(1 + n * 7919 % c.conversions)),
        "show: an id": lambda s, c, n: find_conversion(s, an_id(s, c, n)),
        "show: an id at a revision": lambda s, c, n: find_conversion(s, f"{an_id(s, c, n)}@main"),
        "show: digits": lambda s, c, n: find_conversion(s, digits(s, c, n)),
        "show: absent": lambda s, c, n: find_conversion(s, "no/such-model"),
        "places: an id": lambda s, c, n: find_artifacts(s, an_id(s, c, n)),
    }


def _model(catalog: BulkCatalog, number: int) -> int:
    return 1 + number * 104_729 % catalog.models


QUERIES: dict[str, Query] = _overview() | _models() | _one() | _commands()
