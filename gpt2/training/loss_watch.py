"""Steps that must not be made: losses and gradients that are no numbers, and losses far above those before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

RECENT_STEPS = 20
SMALLEST_DEVIATION = 0.01  # nats: a loss that stands still is no reason to call its next move a spike
MOST_IN_A_ROW = 20


class LossWatch:
    """Looks at every step before its update.

    spike: standard deviations of the last 20 losses that one may lie above their mean. Counted so, the noise of small
    batches is no spike, and a small jump of a large batch is one.
    """

    def __init__(self, spike: float):
        self.spike = spike
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.left_out = 0

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the loss is {loss}, the gradient's norm {grad_norm}"
        if len(self.recent) == RECENT_STEPS:
            mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
            if loss > mean + self.spike * max(deviation, SMALLEST_DEVIATION):
                return (
                    f"the loss is {loss:.4f}, the mean of the {RECENT_STEPS} before it {mean:.4f}, their standard "
                    f"deviation {deviation:.4f}"
                )
        self.recent.append(loss)
        self.left_out = 0
        return None

    def leave_out(self, step: int, problem: str) -> None:
        """Notes that a step's update is not made. Raises FloatingPointError where that has become the rule."""
        self.left_out += 1
        if self.left_out > MOST_IN_A_ROW:
            raise FloatingPointError(f"step {step}: {problem}, the {self.left_out}th bad step in a row; lower lr")

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])
        self.left_out = state["left_out"]
