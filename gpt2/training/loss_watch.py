"""Detecting bad steps: a loss or gradient that is NaN or infinite, or a loss far above the previous ones."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

RECENT_STEPS = 20
SMALLEST_DEVIATION = 0.01  # nats; after a nearly constant loss, a small change is not a spike
MOST_IN_A_ROW = 20


class LossWatch:
    """Checks every step before its update.

    spike: a loss is bad if it exceeds the mean of the last 20 losses by more than this many of their standard
        deviations. So the noise of small batches is not a spike, and a small jump with a large batch is one.
    """

    def __init__(self, spike: float):
        self.spike = spike
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.left_out = 0

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """A description of what is wrong with a step; None if it is good. loss: nats a token."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the loss is {loss} and the gradient's norm {grad_norm}"
        if len(self.recent) == RECENT_STEPS:
            mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
            if loss > mean + self.spike * max(deviation, SMALLEST_DEVIATION):
                return (
                    f"the loss is {loss:.4f}, the {RECENT_STEPS} losses before it have mean {mean:.4f} and standard "
                    f"deviation {deviation:.4f}"
                )
        self.recent.append(loss)
        self.left_out = 0
        return None

    def leave_out(self, step: int, problem: str) -> None:
        """Records that the update of a step is left out. Raises FloatingPointError after more than 20 in a row."""
        self.left_out += 1
        if self.left_out > MOST_IN_A_ROW:
            raise FloatingPointError(f"step {step}: {problem}, the {self.left_out}th bad step in a row; lower lr")

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])
        self.left_out = state["left_out"]
