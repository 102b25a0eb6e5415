"""`fastgpt2 bench tune`: searches block sizes, warps and stages on this GPU and rewrites the table of
kernels/_tuning.py.

Kernels do not tune themselves: they would have to for every shape and in every process, and could not without a GPU.
This command improves each row of the table that a registered case uses by coordinate descent, from its present
configuration: it halves or doubles one number at a time (stages: one less or more), or turns a choice over, times the
case without the host's time to launch it, and keeps what is faster by more than noise. It skips configurations that do
not compile or fit, that spill registers, or that change the results by more than rounding. Besides, it begins with
DESIGNS: configurations that were written without a GPU and are several steps away from what was measured.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.registry import all_cases, chosen_operations
from fastgpt2.bench.cases.rows import Config, overridden
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import timing
from fastgpt2.bench.timing.options import OutOption
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.options import Names
from fastgpt2.kernels import _device, _tuning
from fastgpt2.kernels._configurations import Key

BUDGET_S = 0.1  # to time one configuration
WORTH_IT = 0.98  # a configuration replaces another one if it takes at most this fraction of its time
COLUMNS = 120  # of a line of the table
FIXED = ("MIN_ROWS", "enable_fp_fusion")  # not chosen for speed: a limit on bytes, and the same for all kernels
LARGE_TILES: tuple[Config, ...] = (
    dict(DKV_BLOCK_M=64, DKV_BLOCK_N=128, DQ_BLOCK_M=128, DQ_BLOCK_N=64, num_warps=8, num_stages=2),
    dict(DKV_BLOCK_M=32, DKV_BLOCK_N=128, DQ_BLOCK_M=128, DQ_BLOCK_N=32, num_warps=8, num_stages=2),
)
# What differs from a row's present configuration, by op. Attention: the kernels that read by descriptors. Layer norm:
# rows in a pipeline, and backward in one launch. Cross-entropy: a row in registers, which is read once.
DESIGNS: dict[str, tuple[Config, ...]] = {
    "attention_tma_fwd": (
        dict(ON=True, BLOCK_N=64),
        dict(ON=True, BLOCK_N=128),
        dict(ON=True, BLOCK_N=64, num_stages=3),
    ),
    # What keeps the assembler for sm_90 from waiting for every product right after it: the order, larger tiles, both.
    "attention_bwd": (
        dict(DIAGONAL_FIRST=True),
        *LARGE_TILES,
        *(tiles | dict(DIAGONAL_FIRST=True) for tiles in LARGE_TILES),
    ),
    "attention_tma_bwd": (
        dict(ON=True, BLOCK=128, STEP=64, num_warps=8, STAGES=2),
        dict(ON=True, BLOCK=128, STEP=64, num_warps=8, STAGES=3),
        dict(ON=True, BLOCK=64, STEP=64, num_warps=4, STAGES=2),
        dict(ON=True, BLOCK=64, STEP=32, num_warps=4, STAGES=3),
    ),
    "layer_norm_bwd": (
        dict(STAGES=3),
        dict(STAGES=3, ROWS=4, SPAN_BYTES=1024, num_warps=8, PROGRAMS_PER_SM=1),
        dict(STAGES=3, ROWS=4, SPAN_BYTES=1024, num_warps=8, PROGRAMS_PER_SM=2),
        dict(FOLD=True),
        dict(STAGES=3, FOLD=True),
    ),
    "cross_entropy_row": (dict(COLUMNS=65536, num_warps=8),),
}


@contextlib.contextmanager
def launched() -> Iterator[list]:
    """Yields the list of compiled kernels that are launched inside."""
    # Patched, because a launch hook gets a kernel's name and handle, but not the compiled kernel, which knows what it
    # spills, and the hook after a compilation is silent for kernels that were compiled before.
    kernels: list = []
    run = triton.JITFunction.run

    def recorded(*args, **kwargs):
        kernels.append(run(*args, **kwargs))
        return kernels[-1]

    with mock.patch.object(triton.JITFunction, "run", recorded):
        yield kernels


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number or choice, or in a block size and the warps that share it. Numbers of a
    kernel that is off are left alone."""
    for key, value in config.items():
        if key in FIXED:
            continue
        if isinstance(value, bool):
            yield {**config, key: not value}
            continue
        values = (value - 1, value + 1) if "stages" in key.lower() else (value // 2, value * 2)
        yield from _allowed({**config, key: v} for v in values)
        if "BLOCK" in key:
            warps = config["num_warps"]
            both = ((value // 2, warps // 2), (value * 2, warps * 2))
            yield from _allowed({**config, key: v, "num_warps": w} for v, w in both)


def _allowed(configs: Iterable[Config]) -> Iterator[Config]:
    most = {"num_stages": 5, "STAGES": 5, "num_warps": 32}
    on = (c for c in configs if c.get("ON", True))
    yield from (c for c in on if all(isinstance(v, bool) or 1 <= v <= most.get(k, 1 << 14) for k, v in c.items()))


def descend(
    config: Config, time_ms: Callable[[Config], float], designs: Iterable[Config] = ()
) -> tuple[Config, float, float]:
    """-> (the best configuration found, its time, the time of `config`). time_ms: returns infinity for one to skip.

    designs: further configurations for the first step.
    """
    known: dict[tuple, float] = {}

    def timed(c: Config) -> float:
        key = tuple(sorted(c.items()))
        if key not in known:
            known[key] = time_ms(c)
        return known[key]

    best, first, others = config, timed(config), list(designs)
    while True:
        better = min((*others, *neighbours(best)), key=timed, default=best)
        if not timed(better) < WORTH_IT * timed(best):
            return best, timed(best), first
        best, others = better, []


def tune_case(case: Case, found: dict[Key, Config], time_ms: Callable[[Callable], float], device: torch.device):
    """Yields (row, best configuration, its ms, ms before) for each row of the table that this case uses and that is not
    in `found`, and adds it there. Rows in `found` have the configurations found."""
    inputs = case.inputs(device)

    def forward():
        return case.forward(inputs)

    def both():
        return case.backward(inputs, case.forward(inputs))

    for run in (forward, both):
        with overridden(found) as asked:
            expected = run()
        for row in dict.fromkeys(asked):
            if row in found or (run is forward and row.op.endswith("_bwd")):  # asked for what backward will need
                continue

            def timed(config: Config, row: Key = row, run: Callable = run, expected: tuple = expected) -> float:
                with overridden({**found, row: config}):
                    try:
                        with launched() as kernels:
                            right = same(run(), expected)
                        if not right or any(kernel.n_spills for kernel in kernels):
                            return float("inf")
                        return time_ms(run)
                    except Exception as error:  # errors of compilers and drivers have no common class
                        if "out of memory" in str(error).lower():
                            raise
                        return float("inf")

            config = _tuning.config(row, device)
            best, ms, before = descend(config, timed, (config | design for design in DESIGNS.get(row.op, ())))
            found[row] = best
            yield row, best, ms, before


def median_ms(run: Callable, device: torch.device) -> float:
    return timing.measure({"": run}, device, budget_s=BUDGET_S, warmup=2, device_only=True)[""].median_ms


def same(results: tuple, expected: tuple) -> bool:
    """Whether results are equal up to rounding in another order of summation."""
    for a, b in zip(results, expected, strict=True):
        if (a.double() - b.double()).abs().max() > 4 * torch.finfo(a.dtype).eps * b.double().abs().max():
            return False
    return True


# ----------------------------------------------------------------------------------------------- the table's source


def rewrite(source: str, best: dict[Key, Config], architecture: int | str, tuned_on: str) -> str:
    """The source of _tuning.py with these configurations for one architecture and `tuned_on` as their origin.

    Everything else stays as it is. Raises ValueError for a row that the table does not have.
    """
    tree = ast.parse(source)
    tuned, table = _assigned(tree, "TUNED"), _assigned(tree, "TABLE")
    rows = {_value(key): node for key, node in zip(table.keys, table.values, strict=True)}
    if missing := best.keys() - rows.keys():
        raise ValueError(f"the table has no rows for {', '.join(map(str, sorted(missing)))}")
    changes = [(tuned, _value(tuned) | {architecture: tuned_on})]
    for key, config in best.items():
        known = _value(rows[key])
        kind = type(next(iter(known.values())))
        changes.append((rows[key], known | {architecture: kind(**config)}))
    lines = source.splitlines(keepends=True)
    for node, value in sorted(changes, key=lambda change: change[0].lineno, reverse=True):
        first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
        indent = first[: len(first) - len(first.lstrip())]
        comments = "".join(c for c in lines[node.lineno : node.end_lineno - 1] if c.lstrip().startswith("#"))
        written = "".join(_entry(indent + "    ", key, row) for key, row in value.items())
        text = first[: node.col_offset] + "{\n" + comments + written + indent + "}" + last[node.end_col_offset :]
        lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def _assigned(tree: ast.Module, name: str) -> Any:
    """The dict expression that is assigned to a variable of the module."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return node.value
    raise ValueError(f"kernels/_tuning.py assigns no {name}")


def _value(node: ast.expr) -> Any:
    """The value of an expression of _tuning.py, evaluated in that module."""
    return eval(compile(ast.Expression(node), _tuning.__file__, "eval"), vars(_tuning))


def _entry(indent: str, key: object, value: object) -> str:
    """Source code of an entry of the table or of TUNED, on as many lines as ruff gives it. Fields that have their
    default are left out."""
    start = f"{indent}{'ANY' if key == _tuning.ANY else _source(key)}: "
    if not isinstance(value, tuple):
        return f"{start}{_source(value)},\n"
    names, defaults = value._fields, value._field_defaults  # type: ignore[attr-defined]
    fields = [f"{n}={x!r}" for n, x in zip(names, value, strict=True) if n not in defaults or x != defaults[n]]
    start += f"{type(value).__name__}("
    line = start + ", ".join(fields) + "),"
    if len(line) > COLUMNS:
        line = "\n".join([start, *(f"{indent}    {field}," for field in fields), f"{indent}),"])
    return line + "\n"


def _source(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


# ------------------------------------------------------------------------------------------------------- command


HELP = "search block sizes, warps and stages on this GPU and rewrite the table of kernels/_tuning.py"


@dataclass(frozen=True, kw_only=True)
class Options(OutOption):
    """Improves every row of the table that GPT-2 uses, by measurements on this GPU, and writes it back."""

    op: Names | None = None  # comma-separated public kernel functions, such as layer_norm; None: all
    seconds: float = math.inf  # after so many seconds no further row of the table is begun
    dry_run: bool = False  # print what was found and leave the table as it is


def main(options: Options) -> int:
    """Prints and saves the configurations found and rewrites the table; returns 1 if verify fails.

    Raises RuntimeError without a GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench tune measures on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    ops = chosen_operations(options.op)
    if not gate.verified(device):
        return 1
    results = Results.begin("tune", device, {"a row": "one row of kernels/_tuning.py, timed as a part of its case"})
    best: dict[Key, Config] = {}
    found: dict[Key, Config] = {}
    end = time.monotonic() + options.seconds
    with results.kept_if_cut_short(options.out):
        for case in all_cases():
            if case.op not in ops:
                continue
            if time.monotonic() > end:
                results.leave_out(case.name, f"--seconds {options.seconds:g} were over")
                continue
            for row, config, ms, before in tune_case(case, found, functools.partial(median_ms, device=device), device):
                config = {key: value for key, value in config.items() if key != "enable_fp_fusion"}
                print(f"{case.name:<44} {row!s:<50} {before:9.4f} -> {ms:9.4f} ms  {config}", flush=True)
                figures = dict(before_ms=before, best_ms=ms, config=config)
                results.add(f"{case.name} {row}", what="best configuration found", time_ms=None, **figures)
                if ms < before:
                    best[row] = config
    print(f"written: {results.save(options.out)}")
    path = Path(_tuning.__file__)
    tuned_on = f"{torch.cuda.get_device_name(device)}, {datetime.date.today()}"
    source = rewrite(path.read_text("utf-8"), best, _device.architecture(device), tuned_on)
    if options.dry_run or not best:
        print(f"{len(best)} rows improved, nothing written")
        return 0
    write_atomically(path, source)
    print(f"{len(best)} rows improved and written to {path}; run the tests, then `fastgpt2 bench audit --write`")
    return 0
