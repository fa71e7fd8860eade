"""SIGTERM and SIGINT as a flag that the loop reads between micro-batches."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from qaft.ranks import lost_peer

HANDLED = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context in which the first SIGTERM or SIGINT only sets ``received``; previous handlers come back at its end.

    After a signal, an error that only says that another rank is gone becomes the exit code of the signal.
    A second SIGINT raises ``KeyboardInterrupt`` at once, for a user who does not want to wait for the checkpoint.
    Python delivers signals to the main thread alone: elsewhere the context changes nothing and ``received`` stays None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received is not None and error is not None and lost_peer(error):
            # A launcher signals the ranks that are left when one has failed: theirs is not the error to be told.
            raise SystemExit(self.exit_code(self.received)) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    @staticmethod
    def exit_code(number: int) -> int:
        """Return 128 + the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + number
