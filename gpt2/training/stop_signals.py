"""Signals that ask a run to stop, which it does where it can save its state."""

from __future__ import annotations

import os
import signal
import threading

LOOK_S = 1.0  # time between two checks of the parent process


class StopSignals:
    """Inside a `with`, the first SIGINT, SIGTERM or SIGHUP is stored in `received`; a second raises KeyboardInterrupt.

    SIGHUP, which is sent when a terminal is closed, is handled unless it is ignored, as under nohup.
    launched: whether torchrun started this process. torchrun forwards signals that the terminal has already sent, so a
        second signal is then ignored. If torchrun itself is gone, for example killed, this counts as SIGTERM, because
        the ranks would otherwise keep training while the run is resumed elsewhere.
    Handlers are installed only in the main thread; in other threads nothing is changed.
    """

    HANDLED = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no SIGHUP

    def __init__(self, launched: bool = False) -> None:
        self.launched = launched
        self.received: signal.Signals | None = None
        self._over = threading.Event()
        self._parent = os.getppid() if launched and hasattr(os, "getppid") else None

    def __enter__(self) -> StopSignals:
        main = threading.current_thread() is threading.main_thread()
        wanted = [s for s in self.HANDLED if main and signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in wanted}
        if self._parent is not None:
            threading.Thread(target=self._watch_parent, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and not self.launched:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _watch_parent(self) -> None:
        while not self._over.wait(LOOK_S):
            if os.getppid() != self._parent:
                self.received = self.received or signal.SIGTERM
                return
