"""Which models run at once: each takes its share of the memory that all may use together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_config.sentence_modules import module_files
from tasks.job import raise_if_stopping

__all__ = ["MemoryGate", "estimate_bytes", "weight_bytes_in"]

_LOOK_SECONDS = 0.2
_BASE_BYTES = 3 * 1024**3 // 2
_COPIES = 6


def estimate_bytes(weight_bytes: int) -> int:
    """Return the resident bytes that one conversion may need.

    The weights are held once by PyTorch, twice over in float64, and by ONNX Runtime; torch and the exporter
    themselves stay under a gigabyte.
    """
    return _BASE_BYTES + _COPIES * weight_bytes


def weight_bytes_in(folder: Path) -> int:
    """Return the bytes of a model's safetensors files, those of its modules included."""
    files = [*folder.glob("*.safetensors"), *(p for p in module_files(folder) if p.suffix == ".safetensors")]
    return sum(p.stat().st_size for p in files if p.is_file())


class MemoryGate:
    """Lets conversions in while their estimates together stay within a limit.

    One that needs more than the limit gets all of it, and runs alone. An estimate knows the weights and not the inputs:
    an image of a megapixel takes gigabytes in a model of a megabyte. So where it is known how many run at once, each
    gets an equal part of the limit at least, which nobody else would have.
    """

    def __init__(self, limit_bytes: int, *, workers: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        """Bytes that all conversions together may use."""
        self._least = 0 if workers is None else limit_bytes // max(1, workers)
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def admit(self, wanted_bytes: int, *, stopping: threading.Event | None = None) -> Iterator[int]:
        """Wait for a share of ``wanted_bytes`` or more and hold it; yields the bytes granted.

        Raises:
            KeyboardInterrupt: If ``stopping`` is set meanwhile.
        """
        share = min(max(wanted_bytes, self._least), self.limit_bytes)
        with self._changed:
            while not self._changed.wait_for(lambda: self._used + share <= self.limit_bytes, _LOOK_SECONDS):
                if stopping is not None:
                    raise_if_stopping(stopping)
            self._used += share
        try:
            yield share
        finally:
            with self._changed:
                self._used -= share
                self._changed.notify_all()

    @contextmanager
    def alone(self, *, stopping: threading.Event | None = None) -> Iterator[int]:
        """Wait until nothing else runs and hold the whole limit; yields it.

        Raises:
            KeyboardInterrupt: If ``stopping`` is set meanwhile.
        """
        with self.admit(self.limit_bytes, stopping=stopping) as share:
            yield share
