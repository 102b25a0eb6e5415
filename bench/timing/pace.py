"""What `fastgpt2 bench` runs without a command: as much as takes about four minutes on this machine.

On a GPU that is each command with --quick. A CPU may be twenty times slower than another one, or busy: there a short
measurement says how long each command would take at several sizes, and the largest that fits into what is left of the
four minutes runs. Whatever is smaller than --quick or left out is said in a line.

Estimates count FLOPs over the measured FLOP/s, and bytes of weights over the measured speed of reading them; how often
each is needed follows from the commands: see `timing.measure` for warm-up calls and the least number of rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastgpt2.bench.cases.registry import sized_cases
from fastgpt2.bench.timing import timing
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT

Line = list[str]  # the words of a command
COMPLETE: tuple[Line, ...] = (["train", "--quick"], ["ops", "--quick"], ["generate", "--quick"], ["report"])
WHOLE_S = 240.0
MEASURE_S = 1.0
START_PART = 1 / 8  # of verify's time: what a command takes to import, to build models and to measure peaks
MEASURED = GPTConfig.preset("baby")
TOKENS = 128  # of the measured pass
PROMPT = 32  # tokens, as `bench generate` has them


@dataclass(frozen=True)
class Speed:
    """What this machine does in a second, in float32."""

    flops: float  # in a forward pass over TOKENS tokens
    weight_bytes: float  # read by a pass over one token

    @classmethod
    def measured(cls) -> Speed:
        model = GPT(MEASURED, kernels="torch").eval()
        idx = torch.randint(MEASURED.vocab_size, (1, TOKENS))
        passes: dict[str, Callable[[], object]] = {"all": lambda: model(idx), "one": lambda: model(idx[:, :1])}
        with torch.no_grad():
            times = timing.measure(passes, torch.device("cpu"), budget_s=MEASURE_S, warmup=1, min_rounds=3)
        seconds = {name: taken.median_ms * 1e-3 for name, taken in times.items()}
        forward = MEASURED.flops_per_token(TOKENS) / 3 * TOKENS  # a training step is three forwards
        return cls(forward / seconds["all"], 4 * MEASURED.num_params() / seconds["one"])


class Choice(NamedTuple):
    """A command's line at one size, and the seconds that it takes."""

    line: Line
    seconds: float


def train_choices(speed: Speed, verify_s: float) -> Iterator[Choice]:
    """Smaller batches, then without torch.compile. It times three variants launched from Python, and two compiled."""
    for compiled in (True, False):
        for B, T in ((4, 256), (2, 256), (1, 256), (1, 64)):
            step_s = MEASURED.flops_per_token(T) * B * T / speed.flops
            calls = 1 + 7 * 3 + 7 * 2 * compiled  # the gradient that all agree with, then seven steps a variant
            budget_s = max(5.0, 7 * step_s)
            line = ["train", "--quick", "--batch", str(B), "--block", str(T), "--seconds", f"{budget_s:.0f}"]
            line += [] if compiled else ["--road", "launched"]
            # To compile takes about as long as to verify: both are work of Python and a compiler.
            yield Choice(line, verify_s * (START_PART + compiled) + budget_s + calls * step_s)


def ops_choices(speed: Speed, verify_s: float) -> Iterator[Choice]:
    """Shorter sequences, then without the loss, whose vocabulary takes most of the time."""
    C = 768
    for T, left_out in ((256, ""), (128, ""), (64, ""), (64, "linear_cross_entropy")):
        some = [case for case in sized_cases(T, C, torch.float32) if case.op != left_out]
        # Two implementations, each direction ten times: to check, to warm up and in five rounds.
        moved, flops = (2 * 10 * sum(2 * case.work("both")[i] for case in some) for i in (0, 1))
        line = ["ops", "--quick", "--shape", f"{T}x{C}"]
        line += ["--op", ",".join(dict.fromkeys(case.op for case in some))] if left_out else []
        calls_s = flops / speed.flops + moved / speed.weight_bytes + 0.25 * 3 * len(some)
        yield Choice(line, START_PART * verify_s + calls_s)


def generate_choices(speed: Speed, verify_s: float) -> Iterator[Choice]:
    """Fewer tokens, then the small model."""
    for size in ("gpt2", "baby"):
        config = GPTConfig.preset(size)
        for new in (64, 32, 16):
            cached_s = 4 * config.num_params() / speed.weight_bytes * new
            whole_s = config.flops_per_token(PROMPT + new) / 3 * (PROMPT + new) / speed.flops * new
            texts_s = 2 * cached_s + (whole_s if whole_s < 20 else 0)  # longer ones are left out by the command itself
            budget_s = max(5.0, texts_s)
            line = ["generate", "--quick", "--size", size, "--new", str(new), "--seconds", f"{budget_s:.0f}"]
            yield Choice(line, START_PART * verify_s + budget_s + 5 * texts_s)


def default_lines(device: torch.device) -> Iterator[Line]:
    """What to run, one after the other: each line is chosen when the one before has run."""
    if device.type != "cuda":
        yield from _fitting(device)
    else:
        yield from COMPLETE


def _fitting(device: torch.device) -> Iterator[Line]:
    begin = time.monotonic()
    if not gate.verified(device):
        yield COMPLETE[0]  # which says that nothing is measured
        return
    verify_s = time.monotonic() - begin
    speed = Speed.measured()
    print(
        f"This machine: {speed.flops * 1e-9:.3g} GFLOP/s and {speed.weight_bytes * 1e-9:.3g} GB/s in a model's forward "
        f"pass; verify took {verify_s:.0f} s. Sizes are chosen for about {WHOLE_S / 60:.0f} minutes in all.",
        flush=True,
    )
    parts = (train_choices, ops_choices, generate_choices)
    for i, (complete, choices) in enumerate(zip(COMPLETE, parts, strict=False)):
        left_s = WHOLE_S - (time.monotonic() - begin)
        every = list(choices(speed, verify_s))
        fits = [choice for choice in every if choice.seconds <= left_s / (len(parts) - i)]
        chosen = fits[0] if fits else None if i else every[-1]  # something is always measured
        command = " ".join(complete)
        if chosen is None:
            print(
                f"left out: fastgpt2 bench {command}, which takes about {every[-1].seconds:.0f} s at its smallest, and "
                f"{max(0.0, left_s):.0f} s of {WHOLE_S:.0f} are left",
                flush=True,
            )
            continue
        words = " ".join(chosen.line)
        print(f"\nfastgpt2 bench {words}    # about {chosen.seconds:.0f} s", flush=True)
        if chosen is not every[0]:
            print(
                f"That is smaller than {command}, which would take about {every[0].seconds:.0f} s here.",
                flush=True,
            )
        yield chosen.line
    yield COMPLETE[-1]
