from __future__ import annotations

import os
import signal
import threading

import pytest

from qaft.train.signals import HANDLED, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_sets_the_flag_and_has_the_conventional_exit_code(number: int, code: int) -> None:
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert StopSignals.exit_code(number) == code


@pytest.mark.parametrize("fails", [False, True])
def test_previous_handlers_come_back(fails: bool) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    try:
        with StopSignals():
            assert [signal.getsignal(number) for number in HANDLED] != before
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_second_sigterm_still_waits_for_the_checkpoint() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM


def test_other_threads_change_nothing() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    inside: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            inside.extend([stop.received, *(signal.getsignal(number) for number in HANDLED)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [None, *before]
