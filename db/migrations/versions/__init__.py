"""One module for each change of the schema."""

__all__: list[str] = []
