"""Timings take turns, leave warm-up out and say how they spread; memory is counted above what was there before."""

import time

import pytest
import torch

from fastgpt2.bench.timing import timing
from fastgpt2.bench.timing.timing import Spread, Timing, measure, peak_bytes, speedup

MB = 1 << 20


class Clock:
    """Time that passes when a variant says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_variants_take_turns_and_warm_up_is_left_out(clock):
    order = []

    def variant(name, seconds):
        def call():
            first = order.count(name) < 2
            order.append(name)
            clock.now += 100.0 if first else seconds  # compiling

        return call

    times = measure(
        {"a": variant("a", 0.001), "b": variant("b", 0.003)}, torch.device("cpu"), budget_s=0.0, min_rounds=4
    )
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab" + "ba"
    assert times["a"].times_ms == pytest.approx([1.0] * 4) and times["b"].times_ms == pytest.approx([3.0] * 4)


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 5), (0.02, 20), (100.0, 50)])
def test_the_budget_sets_the_rounds(clock, budget_s, rounds):
    def call():
        clock.now += 0.001

    times = measure({"a": call}, torch.device("cpu"), budget_s=budget_s * 1.001, max_rounds=50)
    assert len(times["a"].times_ms) == rounds


def test_percentiles_are_those_of_the_values():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.p20, spread.median, spread.p80) == (2.0, 3.5, 5.0)
    assert Timing((1.0, 2.0, 9.0)).as_dict() == dict(median=2.0, p20=pytest.approx(1.4), p80=pytest.approx(6.2), runs=3)


def test_a_speedup_is_taken_within_rounds():
    """A machine that becomes ten times slower in the middle changes no ratio."""
    slow, fast = Timing((2.0, 2.0, 20.0, 20.0)), Timing((1.0, 1.0, 10.0, 10.0))
    assert speedup(slow, fast) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize("wrong", [dict(warmup=0), dict(min_rounds=0), dict(min_rounds=9, max_rounds=8)])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="allowed is at least 1"):
        measure({"a": lambda: None}, torch.device("cpu"), **wrong)


def test_nothing_to_time_is_nothing():
    assert measure({}, torch.device("cpu")) == {}


def test_peak_memory_is_what_a_call_needs(device):
    kept = torch.ones(64 * MB // 4, device=device)

    def call(megabytes: int):
        torch.ones(megabytes * MB // 4, device=device).sum().item()

    call(8)
    needed = peak_bytes(lambda: call(200), device)
    if needed is None:
        pytest.skip("this machine does not tell")
    assert 190 * MB <= needed < 232 * MB  # the kernel counts pages in batches
    assert peak_bytes(lambda: call(16), device) < 48 * MB, "an earlier peak is not this one's"
    del kept


def test_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert timing.out_of_memory(error.value)
    assert timing.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not timing.out_of_memory(RuntimeError("expected scalar type Half"))


@pytest.mark.gpu
@pytest.mark.parametrize("device_only", [False, True])
def test_what_the_device_does_is_timed(device, device_only):
    x = torch.randn(4096, 4096, device=device)
    calls = {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    times = measure(calls, device, budget_s=0.2, device_only=device_only)
    assert 3.0 < speedup(times["four"], times["one"]).median < 5.0


@pytest.mark.gpu
def test_the_host_counts_but_for_device_only(device):
    """A host that is slower than the device, which nothing before the call hides."""
    x = torch.ones(4, device=device)

    def slow():
        for _ in range(10):
            time.sleep(0.0005)
            x.add_(0)

    calls = {"slow": slow, "busy": lambda: torch.cuda._sleep(20_000_000)}
    assert measure(calls, device, budget_s=0.1)["slow"].median_ms > 5.0
    assert measure(calls, device, budget_s=0.1, device_only=True)["slow"].median_ms < 1.0
