"""Finds the attempts that have a text in them, the newest first, without reading a large catalog from end to end.

A text is looked for as a part of something, whatever the case of its ASCII letters. Indexes over every three letters in
a row (migration 0006) name the rows that may have it, and LIKE decides. A word may be in a third of all rows or in
three of them, at the beginning of a catalog's time or at its end, and no one way is fast for all: the newest attempts
are looked through first, and only where too few of them fit is every place that holds text asked through its own index.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Select,
    Text,
    and_,
    case,
    cast,
    column,
    func,
    literal,
    literal_column,
    or_,
    select,
    table,
    true,
    union_all,
)
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.among import one_of
from db.models import Conversion, SourceModel
from db.types import storable

__all__ = ["SEARCH_OBJECTS", "TextSearch", "contains", "known_values"]

SEARCH_OBJECTS = ("source_models_search", "conversions_search")
"""The tables on SQLite, or the indexes on PostgreSQL, that no model declares: each database has its own kind."""

# So many of the newest attempts are looked through before anything else, and where these promise enough among more.
_LOOK_FIRST = 2000
_LOOK_ON = 16_000
# Of a text that many models have, so many of the newest attempts are counted.
_COUNTED_AMONG = 10_000
# So many models can be asked for their attempts one by one.
_FEW_MODELS = 2000
_GRAM = 3
_PARTS_PER_STATEMENT = 40
# What a model says of itself in few words, which many models share.
_WORD_COLUMNS = (Conversion.task, Conversion.model_type, Conversion.architecture)

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

Where = Sequence[ColumnElement[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSearch:
    """One text, and what else must hold of an attempt."""

    text: str
    """A part of what is looked for; ASCII letters in any case; no letter is a wildcard."""

    where: Where = ()
    """Further conditions on `db.models.Conversion`, save for the next."""

    latest_only: bool = True
    """Leave out what a later attempt at the same request replaced."""

    everywhere: bool = False
    """Look also at task, model type, class and, for texts of three letters or more, error message."""

    def newest(self, session: Session, *, most: int) -> list[int]:
        """Return the numbers of the attempts that fit, those that ended last first, ``most`` at most."""
        found = self._among_newest(session, _LOOK_FIRST, most)
        # A third more than so many would do if they were as dense further back.
        needed = _LOOK_FIRST * most * 4 // (3 * max(1, len(found)))
        if len(found) < most and needed <= _LOOK_ON:
            found = self._among_newest(session, needed, most)
        if len(found) < most:
            for query in self._by_index(session, most):
                found |= _numbers(session, query)
        return sorted(found, key=lambda number: (found[number], number), reverse=True)[:most]

    def count(self, session: Session, *, most: int) -> tuple[int, bool]:
        """Return how many attempts fit, and whether there are no more than that; in model ids alone.

        Counted are ``most`` at most, and where many models have the text in their id, those among the newest attempts.
        """
        models = self._few_models(session)
        if models is not None:
            theirs = one_of(session, Conversion.source_model_id, models)
            inner = select(Conversion.id).where(theirs, *_aside(self._conditions()))
            number = session.execute(select(func.count()).select_from(inner.limit(most + 1).subquery())).scalar_one()
            return min(number, most), number <= most
        newest = _newest(self._conditions(), _COUNTED_AMONG).subquery()
        fits = func.count(case((contains(session, _model_id(newest.c.source_model_id), self.text), 1)))
        number, looked_at = session.execute(select(fits, func.count()).select_from(newest)).one()
        return min(number, most), looked_at < _COUNTED_AMONG and number <= most

    def _conditions(self) -> list[ColumnElement[bool]]:
        return [*([Conversion.latest.is_(True)] if self.latest_only else []), *self.where]

    def _among_newest(self, session: Session, number: int, most: int) -> dict[int, datetime]:
        newest = _newest(self._conditions(), number).subquery()
        fits = [contains(session, _model_id(newest.c.source_model_id), self.text)]
        if self.everywhere:
            fits += [contains(session, newest.c[one.key], self.text) for one in _WORD_COLUMNS]
            if len(self.text) >= _GRAM:
                fits.append(contains(session, newest.c.error_message, self.text))
        query = (
            select(newest.c.id, newest.c.finished_at)
            .where(or_(*fits))
            .order_by(newest.c.finished_at.desc(), newest.c.id.desc())
            .limit(most)
        )
        return _numbers(session, query)

    def _few_models(self, session: Session) -> list[int] | None:
        """Return the models that have the text in their id; ``None`` where they are many."""
        found = list(session.scalars(_models_with(session, self.text).limit(_FEW_MODELS + 1)))
        return found if len(found) <= _FEW_MODELS else None

    def _by_index(self, session: Session, most: int) -> Iterator[Select[Any]]:
        """Yield what gives the newest attempts that have the text, of each place that holds text."""
        models = self._few_models(session)
        columns = select(Conversion.id, Conversion.finished_at)
        aside = _aside(self._conditions())
        if models != []:
            their = Conversion.source_model_id
            among = their.in_(_models_with(session, self.text)) if models is None else one_of(session, their, models)
            yield _last_of(columns.where(among, *aside), most)
        if not self.everywhere:
            return
        parts = [
            select(_last(columns.where(Conversion.latest.is_(latest), one == word, *self.where), most).subquery())
            for one, latest, word in self._words(session)
        ]
        for first in range(0, len(parts), _PARTS_PER_STATEMENT):
            both = union_all(*parts[first : first + _PARTS_PER_STATEMENT]).subquery()
            yield select(both.c.id, both.c.finished_at)
        if len(self.text) >= _GRAM:
            yield _last_of(_errors_with(session, self.text).where(*aside), most)

    def _words(self, session: Session) -> list[tuple[InstrumentedAttribute[str | None], bool, str]]:
        """Return every column and word of it that has the text, apart for attempts that hold and that do not."""
        places = [(one, latest) for one in _WORD_COLUMNS for latest in _ways(latest_only=self.latest_only)]
        words = [_known(one, latest) for one, latest in places]
        # In one statement, which passes on no more than is wanted: some hundred words are known.
        found = union_all(
            *(
                select(literal(number).label("place"), word.c.word).where(contains(session, word.c.word, self.text))
                for number, word in enumerate(words)
            )
        )
        return [(*places[number], word) for number, word in session.execute(found)]


def contains(
    session: Session, place: ColumnElement[Any] | InstrumentedAttribute[Any], text: str
) -> ColumnElement[bool]:
    """Return the condition that a column has the text in it, whatever the case of ASCII letters; no wildcards."""
    escaped = storable(text).replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    if session.get_bind().dialect.name == "postgresql":
        return func.lower(place.collate("C")).like(f"%{_folded(escaped)}%", escape="\\")
    # SQLite's LIKE looks past the case by itself; lower() on every row would take three times as long.
    return place.like(f"%{escaped}%", escape="\\")


def known_values(session: Session, place: InstrumentedAttribute[str | None], *, latest_only: bool = False) -> list[str]:
    """Return every task, model type or class that there is, by name; from one to the next within an index."""
    found: set[str] = set()
    for latest in _ways(latest_only=latest_only):
        known = _known(place, latest)
        found |= set(session.scalars(select(known.c.word).where(known.c.word.is_not(None))))
    return sorted(found)


def _ways(*, latest_only: bool) -> tuple[bool, ...]:
    return (True,) if latest_only else (True, False)


def _known(place: InstrumentedAttribute[str | None], latest: bool) -> CTE:
    """Return the words of a column one after another, and a NULL at the end; from one to the next within an index."""
    first = select(func.min(place).label("word")).where(Conversion.latest.is_(latest), place > "")
    known = first.cte(f"known_{place.key}_{'latest' if latest else 'replaced'}", recursive=True)
    after = select(func.min(place)).where(Conversion.latest.is_(latest), place > known.c.word).scalar_subquery()
    return known.union_all(select(after).where(known.c.word.is_not(None)))


def _models_with(session: Session, text: str) -> Select[Any]:
    query = select(SourceModel.id).where(contains(session, SourceModel.model_id, text))
    return _narrowed(session, query, SourceModel.id, SourceModel.model_id, text)


def _errors_with(session: Session, text: str) -> Select[Any]:
    query = select(Conversion.id, Conversion.finished_at).where(
        Conversion.error_message.is_not(None), contains(session, Conversion.error_message, text)
    )
    return _narrowed(session, query, Conversion.id, Conversion.error_message, text)


def _narrowed(
    session: Session,
    query: Select[Any],
    number: InstrumentedAttribute[int],
    place: InstrumentedAttribute[Any],
    text: str,
) -> Select[Any]:
    """Return the query over the rows that may have the text alone, where an index can tell."""
    text = storable(text)
    if session.get_bind().dialect.name == "postgresql":
        # There the index has every two letters in a row too.
        if len(text) < _GRAM - 1:
            return query
        asked = cast([_folded(gram) for gram in _grams(text)], ARRAY(Text))
        return query.where(func.catalog_grams(place).op("@>")(asked))
    name = f"{place.class_.__tablename__}_search"
    if len(text) < _GRAM or not _has_table(session, name):
        return query
    found = table(name, column("rowid"))
    match = " AND ".join('"' + gram.replace('"', '""') + '"' for gram in _grams(text))
    return query.join(found, found.c.rowid == number).where(literal_column(name).op("MATCH")(match))


def _grams(text: str) -> list[str]:
    """Return three letters after three letters, and the last three: those between are more to read and tell little.

    >>> _grams("bert-base"), _grams("bert")
    (['ase', 'ber', 't-b'], ['ber', 'ert'])
    """
    last = max(0, len(text) - _GRAM)
    return sorted({text[at : at + _GRAM] for at in (*range(0, last, _GRAM), last)})


def _has_table(session: Session, name: str) -> bool:
    # A SQLite without FTS5's trigrams makes a catalog without them, which reads more.
    listed = table("sqlite_master", column("name"))
    return session.execute(select(listed.c.name).where(listed.c.name == name)).first() is not None


def _model_id(number: ColumnElement[int]) -> ColumnElement[str]:
    """Return the id of the model with a number, looked up for each row: a join would read all models for a few."""
    return select(SourceModel.model_id).where(SourceModel.id == number).scalar_subquery()


def _newest(where: Where, number: int) -> Select[Any]:
    columns = (Conversion.id, Conversion.finished_at, Conversion.source_model_id, Conversion.error_message)
    return _last(select(*columns, *_WORD_COLUMNS).where(*where), number)


def _last(query: Select[Any], number: int) -> Select[Any]:
    return query.order_by(Conversion.finished_at.desc(), Conversion.id.desc()).limit(number)


def _last_of(query: Select[Any], number: int) -> Select[Any]:
    """Return the last of what a query finds, in words that keep a database from walking by time to look for it."""
    found = query.offset(0).subquery()
    return select(found.c.id, found.c.finished_at).order_by(found.c.finished_at.desc(), found.c.id.desc()).limit(number)


def _aside(where: Where) -> Where:
    """Return the conditions in words that no index answers, so that the one beside them chooses the way.

    A database that knows little of how many rows fit a word would walk through all attempts that hold now, in the hope
    to meet some soon.
    """
    return [case((and_(true(), *where), 1), else_=0) == 1] if where else []


def _numbers(session: Session, query: Select[Any]) -> dict[int, datetime]:
    return dict(session.execute(query).tuples().all())


def _folded(text: str) -> str:
    return text.translate(_LOWER)
