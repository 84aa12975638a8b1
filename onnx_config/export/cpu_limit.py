"""End Python code that has used too much processor time, from inside its own process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["OutOfTimeError", "cpu_limit"]


class OutOfTimeError(Exception):
    """The code under `cpu_limit` used all of its processor time."""


class _Interrupt(BaseException):
    # No Exception, so that code which tries something else after any error does not go on.
    pass


@contextmanager
def cpu_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTimeError` once this process has used ``seconds`` of processor time; ``None``: no limit.

    Works between two steps of the interpreter, so native code finishes its call first, and in the main
    thread of the process alone: elsewhere there is no limit. It is for work that may be given up for
    something cheaper; a step as a whole is limited from outside.
    """
    if (
        seconds is None
        or threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "ITIMER_PROF")
    ):
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _Interrupt

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except _Interrupt:
        raise OutOfTimeError(f"it took more than {seconds:.0f} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
