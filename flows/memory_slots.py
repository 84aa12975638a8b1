"""Memory that several machines share: a concurrency limit of the Prefect server, with a slot for each GiB."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from onnx_config.errors import InputError
from tasks.job import raise_if_stopping
from tasks.memory import MemoryGate

__all__ = ["SlotGate"]

_GIB = 1024**3
_LOOK_SECONDS = 10.0
_LEASE_SECONDS = 300.0


class SlotGate(MemoryGate):
    """Lets a conversion in when this machine has the memory for it, and then when the limit has the slots.

    The slots of a process that dies come back when its lease ends. One that needs more than there are gets all.
    """

    def __init__(self, limit_bytes: int, name: str) -> None:
        super().__init__(limit_bytes)
        self.name = name
        """The concurrency limit on the Prefect server."""
        self.slots = self._limit(name)
        """How many it has."""

    @staticmethod
    def _limit(name: str) -> int:
        try:
            with get_client(sync_client=True) as client:
                return client.read_global_concurrency_limit_by_name(name).limit
        except ObjectNotFound as error:
            # Prefect itself would let everything in where there is no limit of this name.
            raise InputError(
                f"The batch takes its memory from the concurrency limit {name!r}, and the Prefect server has none of "
                f"that name. Register it with `ferry deploy`, or type: prefect gcl create {name!r} --limit GIBIBYTES."
            ) from error

    @contextmanager
    def admit(self, wanted_bytes: int, *, stopping: threading.Event | None = None) -> Iterator[int]:
        """Wait for a share of ``wanted_bytes``, here and among all machines, and hold it; yields the bytes granted.

        Raises:
            KeyboardInterrupt: If ``stopping`` is set meanwhile.
        """
        with super().admit(wanted_bytes, stopping=stopping) as share, ExitStack() as held:
            occupied = max(1, min(math.ceil(share / _GIB), self.slots))
            while True:
                slots = concurrency(
                    self.name,
                    occupy=occupied,
                    timeout_seconds=_LOOK_SECONDS,
                    lease_duration=_LEASE_SECONDS,
                    strict=True,
                    # A server that goes away takes its record with it, and no conversion.
                    raise_on_lease_renewal_failure=False,
                )
                try:
                    held.enter_context(slots)
                    break
                except TimeoutError:
                    if stopping is not None:
                        raise_if_stopping(stopping)
            yield share
