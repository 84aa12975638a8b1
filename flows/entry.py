"""The ``ferry`` command's door: nothing heavy is imported here, and no error leaves as a traceback.

Worker processes import the main script again, so this module must stay cheap.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit: 0 all verified, 1 something was not, 2 the call is wrong, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            # A name that the terminal's encoding lacks must not end a batch.
            reconfigure(errors="backslashreplace")
    try:
        from flows.cli import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    except Exception as error:
        from onnx_config.errors import FerryError, InputError

        if not isinstance(error, FerryError):
            raise
        sys.stderr.write(f"Error: {error.message}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
