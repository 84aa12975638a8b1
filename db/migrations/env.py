"""Runs the migrations on the connection that `db.migrate` hands over, inside its transaction.

With ``--sql`` there is no connection, and the statements are printed for a database that others administer.
"""

from __future__ import annotations

from alembic import context

from db.models import Base
from db.search import SEARCH_OBJECTS

connection = context.config.attributes.get("connection")


def is_declared(name: str | None, kind: str, parents: object) -> bool:
    """Return whether a model declares what is called so; what searches texts is of another kind on each database."""
    return not str(name).startswith(SEARCH_OBJECTS)


if connection is None:
    context.configure(
        url=context.config.get_main_option("sqlalchemy.url"),
        target_metadata=Base.metadata,
        literal_binds=True,
        transactional_ddl=True,
    )
else:
    # SQLite cannot alter a constraint in place: its tables are copied.
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        include_name=is_declared,
    )

with context.begin_transaction():
    context.run_migrations()
