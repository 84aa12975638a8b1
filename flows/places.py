"""Where `AutoModelForONNX` finds a model by its id: the catalog of the settings in force.

The library has not heard of the catalog; it calls what stands under ``onnx_ferry.places`` among the entry points.
"""

from __future__ import annotations

from pathlib import Path

from onnx_config.export.artifact import FERRY_FILE

__all__ = ["find_in_catalog"]


def find_in_catalog(name: str) -> Path | None:
    """Return the folder of the newest verified artifact of a model; ``None`` where the catalog knows none.

    One in quarantine is returned only where there is no verified one, so that the loader says so. Where there is no
    catalog yet, none is made.

    Args:
        name: A model's id, with ``@`` and a revision or not, as it was converted; or what `db.find_conversion` takes
            else.

    Raises:
        InputError: If the settings cannot be read.
        TransientError: If the catalog cannot be (``catalog``).
    """
    import db
    from flows.settings import load_settings
    from tasks.register import catalog_errors

    with catalog_errors():
        engine = db.make_engine(load_settings().catalog_url)
        try:
            if db.schema_version(engine) is None:
                return None
            db.upgrade(engine)
            with db.session_scope(engine, read_only=True) as session:
                found = db.find_artifacts(session, name)
        finally:
            engine.dispose()
    # What was cleared away, or lies on another machine, is none.
    return next((folder for artifact in found if ((folder := Path(artifact.path)) / FERRY_FILE).is_file()), None)
