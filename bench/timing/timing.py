"""Measures the time of calls and the memory of one.

    times = measure({"ours": step, "eager": other_step}, device, budget_s=20)
    times["ours"].median_ms; speedup(times["eager"], times["ours"]).median
    peak = peak_bytes(step, device)

Variants that are compared take turns in one process (A B C, B C A, ...), so that drifts (clocks, temperature, other
load) affect all of them alike, and a speed-up is the median over rounds of the ratio within a round. First calls, which
compile and allocate, are not timed. A call is timed by wall clock until the device is done: the host's time to launch
counts where the device has to wait for it. With `device_only`, a call is timed by CUDA events, after L2 was flushed,
and starts when the host has enqueued all of it.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLUSHED_BYTES = 256 << 20  # twice the largest L2 or last-level cache of today's GPUs
PERCENTILES = (20, 50, 80)
CLOCK_HZ = 3e9  # above every GPU's clock, so that so many cycles take at least a second
LONGEST_WAIT_S = 0.05
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


@dataclass(frozen=True)
class Spread:
    """20th percentile, median and 80th percentile of a quantity."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: list[float] | tuple[float, ...] | np.ndarray) -> Spread:
        return cls(*(float(v) for v in np.percentile(values, PERCENTILES)))

    def as_dict(self) -> dict[str, float]:
        return dict(median=self.median, p20=self.p20, p80=self.p80)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each timed call, in the order of the rounds."""

    times_ms: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.times_ms)

    @property
    def median_ms(self) -> float:
        return self.spread.median

    def per_second(self, amount: float) -> dict[str, float]:
        """The spread of a rate, where each call did `amount` of something."""
        spread = self.spread
        return {
            "p20": amount * 1e3 / spread.p80,
            "median": amount * 1e3 / spread.median,
            "p80": amount * 1e3 / spread.p20,
        }

    def as_dict(self) -> dict[str, Any]:
        """The field "time_ms" of a result's row."""
        return {**self.spread.as_dict(), "runs": len(self.times_ms)}


def speedup(baseline: Timing, of: Timing) -> Spread:
    """How many times faster `of` is than `baseline`, round by round; both from one call of `measure`."""
    return Spread.of(np.array(baseline.times_ms) / np.array(of.times_ms))


def measure(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget_s: float = 5.0,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 500,
    device_only: bool = False,
) -> dict[str, Timing]:
    """Times every variant once per round, for about `budget_s` seconds in all and at least `min_rounds` rounds.

    The first `warmup` calls of each variant are not timed and not part of the budget. device_only: on a GPU, leaves out
    the host's time to launch, which is part of the budget all the same.
    Raises what a variant raises; ValueError if `warmup` or the rounds are below 1 or out of order.
    """
    if warmup < 1 or not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            f"measure: warmup is {warmup}, rounds are {min_rounds} to {max_rounds}; allowed is at least 1 of each"
        )
    if not variants:
        return {}
    waits_s = {}
    for name, call in variants.items():
        for _ in range(warmup):
            start_s = time.perf_counter()
            call()
            waits_s[name] = min(2 * (time.perf_counter() - start_s), LONGEST_WAIT_S)
    timer = _DeviceTimer(device, waits_s) if device_only and device.type == "cuda" else _WallTimer(device)
    names = list(variants)
    collects = gc.isenabled()
    gc.disable()  # a garbage collection during a call would count as its time
    try:
        round_s = sum(timer.time(name, variants[name]) for name in names)
        rounds = min(max(int(budget_s / max(round_s, 1e-9)), min_rounds), max_rounds)
        for i in range(1, rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                timer.time(name, variants[name])
    finally:
        if collects:
            gc.enable()
    return {name: Timing(tuple(times)) for name, times in timer.results().items()}


class _WallTimer:
    def __init__(self, device: torch.device) -> None:
        self.wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        self.times_ms: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], object]) -> float:
        """Runs and records one call; -> seconds."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        seconds = time.perf_counter() - start
        self.times_ms.setdefault(name, []).append(seconds * 1e3)
        return seconds

    def results(self) -> dict[str, list[float]]:
        return self.times_ms


class _DeviceTimer:
    """Times by CUDA events, which are read at the end, so that the host runs ahead of the device."""

    def __init__(self, device: torch.device, waits_s: Mapping[str, float]) -> None:
        self.device, self.waits_s = device, waits_s
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self.cache = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def time(self, name: str, call: Callable[[], object]) -> float:
        first = not self.events.get(name)
        if first:
            torch.cuda.synchronize(self.device)
        start_s = time.perf_counter()
        self.cache.zero_()
        torch.cuda._sleep(int(self.waits_s[name] * CLOCK_HZ))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        call()
        end.record(stream)
        self.events.setdefault(name, []).append((start, end))
        if first:  # the number of rounds follows from the first one's time
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start_s

    def results(self) -> dict[str, list[float]]:
        torch.cuda.synchronize(self.device)
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in self.events.items()}


# -------------------------------------------------------------------------------------------------------- memory


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The peak of memory during one call, less what was in use before. Call `call` once before, to warm up.

    On a GPU the memory of tensors, on a CPU with Linux the process's resident memory, elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that the process still has would hide what the call needs
    try:
        reset.write_text("5")  # resets the peak to the memory that is resident now
    except OSError:
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU. Drivers and libraries word it differently."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in OUT_OF_MEMORY)
