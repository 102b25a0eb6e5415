"""`fastgpt2 bench ops`: times each op's forward, backward and both: our kernels, PyTorch, torch.compile and other
libraries where they are installed.

GB/s is the least that the op must move (`bench/cases/`) over the time, and TFLOP/s the FLOPs of its matrix products
over the time, so that all implementations are credited with the same work. The fraction is of the speed of a copy or of
a large matrix product on this machine, whichever the op is closer to; both are measured at the start. On a CPU, small
tensors stay in caches, which are faster than that copy. The roofline model is the least time that the data sheet of a
known GPU allows (report/roofline.py). Implementations of an op take turns. On a GPU, L2 is flushed before each call and
the host's time to launch is left out. An implementation whose results differ from PyTorch's is not timed.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from fastgpt2.bench.cases.case import HEAD_SIZE, WIDTHS, Case
from fastgpt2.bench.cases.peers import first_line, peers, version
from fastgpt2.bench.cases.registry import chosen_operations, sized_cases
from fastgpt2.bench.report import roofline, tables
from fastgpt2.bench.report.record import Results, summary_line
from fastgpt2.bench.timing import peaks, timing
from fastgpt2.bench.timing.options import DeviceOption, OutOption
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import hardware, ops
from fastgpt2.gpt2.options import Names, Word
from fastgpt2.gpt2.training.train_config import find_device

PYTORCH, COMPILED, OURS = "PyTorch", "torch.compile", "Triton"
DIRECTIONS = ("forward", "backward", "both")
# Largest difference over the largest magnitude: far above rounding, far below another mask or a lost term.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Scope:
    """What a run measures; depends on the device and on --quick."""

    shapes: tuple[tuple[int, int], ...]  # (T, C)
    tokens: int  # of attention and embedding, which get tokens / T sequences
    dtype: torch.dtype
    compiled: bool
    budget_s: float  # for the variants of one op in one direction

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scope:
        if device.type == "cuda":
            lengths = (256, 1024, 4096, 16384)
            every = tuple((T, C) for C in WIDTHS for T in lengths)
            cross = tuple((T, C) for T, C in every if T == 4096 or C == WIDTHS[0])
            return cls(cross if quick else every, 16384, torch.bfloat16, True, 0.15)
        shapes = tuple((T, C) for C in WIDTHS for T in (256, 1024))
        return cls(shapes[:1] if quick else shapes, 0, torch.float32, not quick, 0.5)


def functions(case: Case, device: torch.device, compiled: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """-> (label -> implementation that runs here, label -> why one is left out)."""
    found: dict[str, Callable] = {PYTORCH: case.eager}
    missing: dict[str, str] = {}
    if compiled:
        # Each case is compiled anew with static shapes: otherwise Dynamo would try dynamic ones and then give up.
        # A backward that is timed alone runs repeatedly on what its forward saved: compiled code may not overwrite it.
        torch._dynamo.reset()
        functorch_config.donated_buffer = False
        found[COMPILED] = torch.compile(case.eager, dynamic=False)
    else:
        missing[COMPILED] = "--quick leaves it out"
    if not ops.TRITON_INSTALLED:
        missing[OURS] = "the package triton is not installed"
    elif device.type != "cuda":
        missing[OURS] = "Triton's kernels run on a GPU; a CPU can only interpret them"
    else:
        found[OURS] = case.ours
    others, missing_others = peers(case.op, device)
    return found | others, missing | missing_others


def calls(case: Case, inputs: tuple, function: Callable) -> dict[str, Callable[[], Any]]:
    """Direction -> the call that is timed. A function without gradients has only a forward."""
    if case.backward_bytes is None:
        return {"forward": lambda: case.forward(inputs, function)}
    outputs = case.forward(inputs, function)
    upstream = tuple(torch.ones_like(o) for o in outputs)
    return {
        "forward": lambda: case.forward(inputs, function),
        "backward": lambda: case.backward(inputs, outputs, upstream, again=True),
        "both": lambda: case.backward(inputs, case.forward(inputs, function), upstream),
    }


def values(case: Case, inputs: tuple, function: Callable) -> tuple[Tensor, ...]:
    """Outputs and gradients, in which all implementations must agree."""
    outputs = case.forward(inputs, function)
    return *(o.detach() for o in outputs), *case.backward(inputs, outputs)


def differs(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of the worst tensor: the largest difference over the largest magnitude; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(results, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        scale = b.abs().max().float().item() or 1.0
        difference = (a.float() - b.float()).abs().max().item() / scale
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


class OpsBench:
    """Measures cases and adds rows to `results`."""

    def __init__(self, results: Results, device: torch.device, scope: Scope):
        self.results, self.device, self.scope, self.gpu = results, device, scope, hardware.gpu(device)
        self.copy_bytes_per_s = peaks.copy_bytes_per_s(device)
        self.matmul_flops_per_s = peaks.matmul_flops_per_s(device, scope.dtype)
        results.settings |= dict(
            copy_bytes_per_s=self.copy_bytes_per_s,
            matmul_flops_per_s=self.matmul_flops_per_s,
            dtype=str(scope.dtype).removeprefix("torch."),
        )

    def measure(self, case: Case, T: int, C: int) -> None:
        """Adds the rows of one case: every implementation in every direction."""
        found, missing = functions(case, self.device, self.scope.compiled)
        for label, why in missing.items():
            self._leave_out(label, why)
        inputs = case.inputs(self.device)
        ready: dict[str, dict[str, Callable]] = {}
        peak: dict[tuple[str, str], int | None] = {}
        expected: tuple | None = None
        for label, function in found.items():
            try:
                computed = values(case, inputs, function)
                expected = computed if expected is None else expected
                if (off := differs(computed, expected)) > AGREEMENT[case.dtype]:
                    raise ArithmeticError(f"its results are {off:.1%} off PyTorch's")
                del computed
                ready[label] = calls(case, inputs, function)
            except Exception as error:  # errors of compilers, drivers and libraries have no common class
                self._failed(label, f"{label} ({case.name})", error)
        for label, made in ready.items():
            for direction, call in list(made.items()):
                try:
                    call()
                    peak[label, direction] = timing.peak_bytes(call, self.device)
                except Exception as error:  # for example of a backward that can run only once
                    del made[direction]
                    self._failed(label, f"{label} ({case.name} {direction})", error)
        for direction in DIRECTIONS if case.backward_bytes is not None else DIRECTIONS[:1]:
            variants = {label: made[direction] for label, made in ready.items() if direction in made}
            try:
                times = timing.measure(variants, self.device, budget_s=self.scope.budget_s, device_only=True)
            except Exception as error:  # all together, with their saved tensors, need more memory than each alone
                if not timing.out_of_memory(error):
                    raise
                self._leave_out(f"{case.name} {direction}", "out of memory with all variants in turns")
                continue
            for label in variants:
                speedup = timing.speedup(times[PYTORCH], times[label]).as_dict() if PYTORCH in times else None
                self._add_row(case, T, C, direction, label, times[label], peak[label, direction], speedup)

    def _failed(self, label: str, name: str, error: Exception) -> None:
        """Leaves out what failed. Raises the error again if ours failed for another reason than memory."""
        no_memory = timing.out_of_memory(error)
        if label == OURS and not no_memory:
            raise error
        self._leave_out(name, "out of memory" if no_memory else first_line(error))

    def _leave_out(self, name: str, why: str) -> None:
        if dict(name=name, why=why) not in self.results.left_out:
            self.results.leave_out(name, why)

    def _add_row(self, case: Case, T: int, C: int, direction: str, label: str, taken, peak, speedup) -> None:
        seconds = taken.median_ms * 1e-3
        moved, flops = case.work(direction)
        reached = {
            "copy": moved / seconds / self.copy_bytes_per_s,
            "matmul": flops / seconds / self.matmul_flops_per_s,
        }
        bound = max(reached, key=lambda name: reached[name])
        unknown = case.forward_flops and not flops  # the FLOPs of this direction are not known
        self.results.add(
            f"{case.name} {direction} {label}",
            what=f"{case.op} {direction} at {case.shape}, in turns with the other variants, caches flushed on a GPU",
            time_ms=taken.as_dict(),
            label=label,
            version=version(label),
            op=case.op,
            T=T,
            C=C,
            direction=direction,
            minimum_bytes=moved,
            flops=flops or None,
            gb_per_s=moved / seconds * 1e-9,
            tflop_per_s=flops / seconds * 1e-12 if flops else None,
            fraction=None if unknown else reached[bound],
            fraction_of=bound,
            model_ms=None if unknown else roofline.least_ms(moved, flops, self.gpu, case.dtype),
            peak_bytes=peak,
            speedup=speedup and dict(over=PYTORCH, **speedup),
        )


# ------------------------------------------------------------------------------------------------------- command


HELP = "time, GB/s or TFLOP/s and memory of each op, ours beside PyTorch, torch.compile, Liger, flash-attn, ..."


@dataclass(frozen=True, kw_only=True)
class Options(OutOption, DeviceOption):
    """Times each op forward, backward and both over GPT-2's widths and sequence lengths. `fastgpt2 verify` runs first;
    where it finds an error, no numbers are printed.
    """

    quick: bool = False  # fewer shapes; on a CPU without torch.compile
    op: Names | None = None  # comma-separated public kernel functions, such as layer_norm; None: all
    # comma-separated lengths and widths, such as 1024x768,4096x768; None: by the device
    shape: Annotated[str, Word("TxC,...")] | None = None


def chosen_cases(scope: Scope, wanted: str | None) -> Iterator[tuple[Case, int, int]]:
    """Yields (case, T, C) for a scope. Raises ValueError for an unknown op."""
    names = chosen_operations(wanted)
    for T, C in scope.shapes:
        for case in sized_cases(T, C, scope.dtype, scope.tokens):
            if case.op in names:
                yield case, T, C


def shapes(wanted: str) -> tuple[tuple[int, int], ...]:
    """The (T, C) that --shape names. Raises ValueError for a malformed one."""
    found = [re.fullmatch(r"(\d+)x(\d+)", shape) for shape in wanted.split(",")]
    pairs = tuple((int(match[1]), int(match[2])) for match in found if match)
    if len(pairs) < len(found) or any(T < 1 or C < 1 or C % HEAD_SIZE for T, C in pairs):
        raise ValueError(
            f"--shape is {wanted!r}, expected TxC with T at least 1 and C a multiple of {HEAD_SIZE}, such as 1024x768"
        )
    return pairs


def main(options: Options) -> int:
    """Prints the table and writes the result file; returns 1 and prints no number if verify fails."""
    device = find_device(options.device)
    scope = Scope.of(device, options.quick)
    if options.shape:
        scope = dataclasses.replace(scope, shapes=shapes(options.shape))
    listed = list(chosen_cases(scope, options.op))
    results = Results.begin("ops", device, {})
    if not gate.verified(device):
        return 1
    bench = OpsBench(results, device, scope)
    with results.kept_if_cut_short(options.out):
        for i, (case, T, C) in enumerate(listed, 1):
            print(f"\r{i}/{len(listed)} {case.name:<60}", end="", file=sys.stderr, flush=True)
            bench.measure(case, T, C)
    print(file=sys.stderr)
    tables.show(results)
    file = results.save(options.out)
    whole = ("both", "forward") if all(row["direction"] == "forward" for row in results.rows) else ("both",)
    figures = {row["name"]: round(row["time_ms"]["median"], 4) for row in results.rows if row["direction"] in whole}
    print(summary_line(results, file, {"ms": figures}))
    return 0
