"""The Alembic environment of the catalog; `db.migrate` runs it."""

__all__: list[str] = []
