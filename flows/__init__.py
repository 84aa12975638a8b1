"""What runs, when, over which models: Prefect flows and the command line.

For Python programs: ``from flows import convert_models`` is the batch as a Prefect flow.
"""

from __future__ import annotations

# Known by this name to type checkers; importing it from typing would take longer than all the rest here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from flows.python_api import convert_models

__all__ = ["convert_models"]


def __getattr__(name: str) -> object:
    # The command line imports this package too, and must not wait for Prefect to be imported.
    if name == "convert_models":
        from flows.python_api import convert_models

        return convert_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
