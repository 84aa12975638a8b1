"""Work that is given up when it has used its processor time."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import pytest

from onnx_config.export.cpu_limit import OutOfTimeError, cpu_limit


def _burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _swallow_everything() -> None:
    while True:
        with suppress(Exception):
            _burn(5)


def test_work_over_the_limit_ends_even_where_it_swallows_every_exception() -> None:
    with pytest.raises(OutOfTimeError, match="more than 0 s of processor time"), cpu_limit(0.2):
        _swallow_everything()


def test_waiting_costs_no_processor_time() -> None:
    with cpu_limit(0.3):
        time.sleep(0.5)


def test_work_within_the_limit_leaves_no_timer_behind() -> None:
    before = signal.getsignal(signal.SIGPROF)
    with cpu_limit(0.3):
        _burn(0.01)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) is before


def test_no_limit_and_other_threads_run_on() -> None:
    done = []

    def work() -> None:
        with cpu_limit(0.05):
            _burn(0.2)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with cpu_limit(None):
        _burn(0.01)
    assert done == [True]
