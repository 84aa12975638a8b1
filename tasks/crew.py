"""A crew of threads that takes calls off a list: each result is handed out as it comes.

Not an executor of `concurrent.futures`: Python waits for that one's threads at its end, so that a download which
nobody needs any more would keep an interrupted batch alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

__all__ = ["Crew"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_SECONDS = 0.1


class Crew(Generic[Item, Result]):
    """Calls ``function`` for every item, ``workers`` at a time; starts at once."""

    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> None:
        self._function = function
        self._waiting = iter(items)
        self._count = len(items)
        self._lock = threading.Lock()
        self._dismissed = False
        self._ended: SimpleQueue[tuple[Item, Result | None, BaseException | None]] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"ferry-{number}", daemon=True)
            for number in range(min(workers, len(items)))
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._dismissed:
                    return
                try:
                    item = next(self._waiting)
                except StopIteration:
                    return
            try:
                self._ended.put((item, self._function(item), None))
            # Raised again where the results are read, an interruption too.
            except BaseException as error:  # noqa: BLE001
                self._ended.put((item, None, error))

    def results(self) -> Iterator[tuple[Item, Result]]:
        """Yield each item with its result, those that ended first first.

        Raises:
            BaseException: What a call raised; other calls go on until `dismiss`.
        """
        for _ in range(self._count):
            item, result, error = self._ended.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]  # None only beside an error, or as a result

    def dismiss(self, *, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """Begin no further call and wait for those in work; return whether all ended in time.

        ``meanwhile`` is called ten times a second until then.
        """
        with self._lock:
            self._dismissed = True
        deadline = time.monotonic() + seconds
        while any(thread.is_alive() for thread in self._threads):
            if time.monotonic() > deadline:
                return False
            meanwhile()
            time.sleep(_LOOK_SECONDS)
        return True
