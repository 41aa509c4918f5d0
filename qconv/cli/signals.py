"""SIGINT and SIGTERM as an exception, so that context managers remove what is half written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from qconv.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Interrupts:
    """Which signal arrived, if one did.

    Attributes:
        received: Its number.
        remedy: What to do after an interruption of the command at hand.
    """

    received: int | None = None
    remedy: str | None = None

    def check(self) -> None:
        """Raise again what an ``except Exception`` or a destructor in other people's code may have swallowed.

        Raises:
            Interrupted: a signal arrived.
        """
        if self.received is not None:
            raise Interrupted(self.received, hint=self.remedy)

    def _handle(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = number
        # What is committed is safe at any instant, so a second signal need not wait for the cleanup of the first.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number, hint=self.remedy)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block. Does nothing outside the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
