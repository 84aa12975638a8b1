"""Where `AutoModelForONNX` finds a model by its id: the catalog of the settings in force.

The library has not heard of the catalog; it calls what stands under ``onnx_ferry.places`` among the entry points.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_in_catalog"]


def find_in_catalog(name: str) -> Path | None:
    """Return the folder of the newest verified artifact of a model; ``None`` where the catalog knows none.

    Of one in a store elsewhere, the folder is a copy on this machine, which is fetched where there is none.

    One in quarantine is returned only where there is no verified one, so that the loader says so. Where there is no
    catalog yet, none is made.

    Args:
        name: A model's id, with ``@`` and a revision or not, as it was converted; or what `db.find_conversion` takes
            else.

    Raises:
        InputError: If the settings cannot be read.
        TransientError: If the catalog cannot be (``catalog``), or the store does not answer (``store``).
    """
    import db
    from flows.settings import load_settings
    from tasks.register import catalog_errors
    from tasks.store import store_of

    settings = load_settings()
    with catalog_errors():
        engine = db.make_engine(settings.catalog_url)
        try:
            if db.schema_version(engine) is None:
                return None
            db.upgrade(engine)
            with db.session_scope(engine, read_only=True) as session:
                found = db.find_artifacts(session, name)
        finally:
            engine.dispose()
    workspace = settings.workspace()
    for artifact in found:
        store = store_of(workspace, artifact.path)
        # What was cleared away, or lies on another machine, is none.
        if store.has(artifact.path):
            return store.folder(artifact.path)
    return None
