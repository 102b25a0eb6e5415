"""A run that is asked to stop does so where it can save itself."""

from __future__ import annotations

import signal
import threading


class StopSignals:
    """SIGINT and SIGTERM inside a `with` are noted in `received`; a second one raises KeyboardInterrupt.

    launched: by torchrun, which passes on what the terminal has sent already: there a second one is nothing new.
    Only the main thread may install handlers; elsewhere nothing is changed.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, launched: bool = False) -> None:
        self.launched = launched
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        main = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in self.HANDLED} if main else {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and not self.launched:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
