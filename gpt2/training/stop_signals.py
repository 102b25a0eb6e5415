"""A run that is asked to stop does so where it can save itself."""

from __future__ import annotations

import os
import signal
import threading

LOOK_S = 1.0  # between two looks at the parent


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP inside a `with` are noted in `received`; a second one raises KeyboardInterrupt.

    SIGHUP, which a terminal sends that is closed, counts unless it is ignored, as under nohup.
    launched: by torchrun, which passes on what the terminal has sent already: there a second one is nothing new. A
    launcher that is gone, killed perhaps, is as good as its SIGTERM: the ranks would train on, unseen, while somebody
    resumes their run.
    Only the main thread may install handlers; elsewhere nothing is changed.
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
