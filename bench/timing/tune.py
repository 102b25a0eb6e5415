"""`fastgpt2 bench tune`: searches block sizes, warps and stages on this GPU, rewrites the table of kernels/_launch.py.

Kernels never tune themselves: that would repeat for every shape and process, and fail where there is no GPU. Here each
row of the table that a registered case uses is improved by coordinate descent from what stands: one number at a time
is halved or doubled (stages: one less or more), the case is timed without the host's time to launch it, and what is
faster by more than the noise is kept. A configuration that does not compile or fit, that spills registers, or that
changes the results beyond rounding, is passed over.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton

from fastgpt2.bench.cases import registry as cases
from fastgpt2.bench.report.record import FOLDER, Results
from fastgpt2.bench.timing import timing
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.kernels import _launch

Config = dict[str, int]
Row = tuple[str, str]  # op and variant, as in the table
BUDGET_S = 0.1  # to time one configuration
WORTH_IT = 0.98  # a configuration must take at most this part of the time to replace another
FIXED = ("MIN_ROWS", "enable_fp_fusion")  # set by a budget of bytes, and for all alike: not by speed


@contextlib.contextmanager
def overridden(configs: dict[Row, Config]) -> Iterator[list[Row]]:
    """Inside, launches take these configurations where given; the list holds the rows that were asked for."""
    asked: list[Row] = []
    original = _launch.config

    def config(op: str, device: torch.device, variant: str = "") -> Config:
        asked.append((op, variant))
        return configs.get((op, variant)) or original(op, device, variant)

    _launch.config = config
    try:
        yield asked
    finally:
        _launch.config = original


@contextlib.contextmanager
def launched() -> Iterator[list]:
    """The list holds the compiled kernels that are launched inside."""
    kernels: list = []
    run = triton.JITFunction.run

    def recorded(*args, **kwargs):
        kernels.append(run(*args, **kwargs))
        return kernels[-1]

    with mock.patch.object(triton.JITFunction, "run", recorded):
        yield kernels


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number, or in a block size and the warps that share it."""
    for key, value in config.items():
        if key in FIXED:
            continue
        values = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        yield from _allowed({**config, key: v} for v in values)
        if "BLOCK" in key:
            warps = config["num_warps"]
            both = ((value // 2, warps // 2), (value * 2, warps * 2))
            yield from _allowed({**config, key: v, "num_warps": w} for v, w in both)


def _allowed(configs: Iterable[Config]) -> Iterator[Config]:
    most = {"num_stages": 5, "num_warps": 32}
    yield from (c for c in configs if all(1 <= v <= most.get(k, 1 << 14) for k, v in c.items()))


def descend(config: Config, time_ms: Callable[[Config], float]) -> tuple[Config, float, float]:
    """-> the best configuration found, its time and the time of the first. `time_ms` is infinite for a bad one."""
    known: dict[tuple, float] = {}

    def timed(c: Config) -> float:
        key = tuple(sorted(c.items()))
        if key not in known:
            known[key] = time_ms(c)
        return known[key]

    best, first = config, timed(config)
    while True:
        better = min(neighbours(best), key=timed, default=best)
        if not timed(better) < WORTH_IT * timed(best):
            return best, timed(best), first
        best = better


def tune_case(case: cases.Case, done: set[Row], time_ms: Callable[[Callable], float], device: torch.device):
    """Yields (row, best configuration, its ms, ms before) for each row of the table that this case uses, once a row."""
    inputs = case.inputs(device)

    def forward():
        return case.forward(inputs)

    def both():
        return case.backward(inputs, case.forward(inputs))

    for run in (forward, both):
        with overridden({}) as asked:
            expected = run()
        for row in dict.fromkeys(asked):
            if row in done:
                continue
            done.add(row)

            def timed(config: Config, row: Row = row, run: Callable = run, expected: tuple = expected) -> float:
                with overridden({row: config}):
                    try:
                        with launched() as kernels:
                            right = same(run(), expected)
                        if not right or any(kernel.n_spills for kernel in kernels):
                            return float("inf")
                        return time_ms(run)
                    except Exception as error:  # the compiler's and the driver's errors share no class
                        if "out of memory" in str(error).lower():
                            raise
                        return float("inf")

            yield row, *descend(dict(_launch.config(row[0], device, row[1])), timed)


def median_ms(run: Callable, device: torch.device) -> float:
    return timing.measure({"": run}, device, budget_s=BUDGET_S, warmup=2, device_only=True)[""].median_ms


def same(results: tuple, expected: tuple) -> bool:
    """Equal up to the rounding of another order of sums."""
    for a, b in zip(results, expected, strict=True):
        if (a.double() - b.double()).abs().max() > 4 * torch.finfo(a.dtype).eps * b.double().abs().max():
            return False
    return True


# ----------------------------------------------------------------------------------------------- the table's source


def rewrite(source: str, best: dict[Row, Config], architecture: int | str, tuned_on: str) -> str:
    """The source of _launch.py with these rows for one architecture and a note of their origin; the rest stays."""
    tree = ast.parse(source)
    tuned = _assigned(tree, "TUNED")
    changes: list[tuple[ast.expr, dict]] = [(tuned, _literal(tuned) | {architecture: tuned_on})]
    missing = set(best)
    for op, variants in _entries(_assigned(tree, "TABLE")):
        for variant, node in _entries(variants):
            if (op, variant) in best:
                missing.remove((op, variant))
                changes.append((node, _literal(node) | {architecture: best[op, variant]}))
    if missing:
        raise ValueError(f"the table has no rows {sorted(missing)}")
    lines = source.splitlines(keepends=True)
    for node, value in sorted(changes, key=lambda change: change[0].lineno, reverse=True):
        assert node.end_lineno is not None and node.end_col_offset is not None
        first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
        indent = first[: len(first) - len(first.lstrip())]
        comments = "".join(c for c in lines[node.lineno : node.end_lineno - 1] if c.lstrip().startswith("#"))
        rows = "".join(f"{indent}    {_text(key)}: {_text(config)},\n" for key, config in value.items())
        text = first[: node.col_offset] + "{\n" + comments + rows + indent + "}" + last[node.end_col_offset :]
        lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def _assigned(tree: ast.Module, name: str) -> ast.Dict:
    """The dict literal assigned to a variable of the module."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            assert isinstance(node.value, ast.Dict)
            return node.value
    raise ValueError(f"kernels/_launch.py assigns no {name}")


def _entries(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    assert isinstance(node, ast.Dict)
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(key.value, str)
        yield key.value, value


def _literal(node: ast.expr) -> dict:
    """A dict display's value; unlike `ast.literal_eval` it takes `**{...}` too."""
    return eval(compile(ast.Expression(node), "kernels/_launch.py", "eval"), {"__builtins__": {}})


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


# ------------------------------------------------------------------------------------------------------- command


def add_command(commands) -> None:
    command = commands.add_parser(
        "tune",
        help="search block sizes, warps and stages on this GPU and rewrite the table of kernels/_launch.py",
        description="Improves every row of the table that GPT-2 uses, by measurements on this GPU, and writes it back.",
    )
    command.add_argument("--op", help="comma-separated public kernel functions, such as layer_norm; all by default")
    command.add_argument("--seconds", type=float, default=math.inf, help="begin no row of the table after so many")
    command.add_argument("--dry-run", action="store_true", help="print what was found and leave the table as it is")
    command.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file; default: %(default)s")
    command.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Prints and saves what was found, rewrites the table; 1 where verify is red. Raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench tune measures on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    ops = cases.chosen(options.op)
    if not gate.verified(device):
        return 1
    results = Results.begin("tune", device, {"a row": "one row of kernels/_launch.py, timed as a part of its case"})
    best: dict[Row, Config] = {}
    done: set[Row] = set()
    end = time.monotonic() + options.seconds
    with results.kept_if_cut_short(options.out):
        for case in cases.cases():
            if case.op not in ops:
                continue
            if time.monotonic() > end:
                results.leave_out(case.name, f"--seconds {options.seconds:g} were over")
                continue
            for row, config, ms, before in tune_case(case, done, functools.partial(median_ms, device=device), device):
                config = {key: value for key, value in config.items() if key != "enable_fp_fusion"}
                print(f"{case.name:<44} {'/'.join(row):<28} {before:9.4f} -> {ms:9.4f} ms  {config}", flush=True)
                figures = dict(before_ms=before, best_ms=ms, config=config)
                results.add(f"{case.name} {'/'.join(row)}", what="best configuration found", time_ms=None, **figures)
                if ms < before:
                    best[row] = config
    print(f"figures are in {results.save(options.out)}")
    path = Path(_launch.__file__)
    tuned_on = f"{torch.cuda.get_device_name(device)}, {datetime.date.today()}"
    source = rewrite(path.read_text("utf-8"), best, _launch.architecture(device), tuned_on)
    if options.dry_run or not best:
        print(f"{len(best)} rows improved, nothing written")
        return 0
    write_atomically(path, source)
    print(f"{len(best)} rows improved and written to {path}; run the tests, then `fastgpt2 bench audit --write`")
    return 0
