"""Being asked to stop."""

import os
import signal
import subprocess
import sys
import threading
from unittest.mock import patch

import pytest

from polyglu.training import signals
from polyglu.training.signals import stop_on_signals

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_a_request_that_is_told_at_once(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    (record,) = caplog.records
    again = "; Ctrl-C again quits at once" if number == signal.SIGINT else ""
    assert record.getMessage() == f"{number.name}: finishing the step, then saving{again}"


def test_sigterm_as_often_as_one_likes_is_one_request(caplog: pytest.LogCaptureFixture) -> None:
    with stop_on_signals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and len(caplog.records) == 1


@pytest.mark.parametrize("number", BOTH)
def test_handlers_are_put_back_however_it_ends(number: signal.Signals) -> None:
    def own(*_: object) -> None:
        pass

    before = {each: signal.signal(each, own) for each in BOTH}
    try:
        with stop_on_signals():
            os.kill(os.getpid(), number)
        assert [signal.getsignal(each) for each in BOTH] == [own, own]
        with pytest.raises(ZeroDivisionError), stop_on_signals():
            os.kill(os.getpid(), number)
            raise ZeroDivisionError
        assert [signal.getsignal(each) for each in BOTH] == [own, own]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_another_thread_catches_nothing() -> None:
    before, seen = [signal.getsignal(number) for number in BOTH], []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((stop.requested, [signal.getsignal(number) for number in BOTH]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_console_that_is_busy_does_not_stop_the_request() -> None:
    """A signal in the middle of a write finds the stream locked: RuntimeError, reentrant call."""
    with patch.object(signals.logger, "warning", side_effect=RuntimeError("reentrant call")), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


HANGS = """
import ctypes, os, signal
from polyglu.training.signals import stop_on_signals

with stop_on_signals():
    os.kill(os.getpid(), signal.SIGINT)
    print("hangs", flush=True)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter: no handler of Python's could run
"""


def test_ctrl_c_after_ctrl_c_ends_even_what_hangs() -> None:
    """In a call that never returns to Python, as a collective whose other ranks are gone."""
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"hangs\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()
