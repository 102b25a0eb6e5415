"""Launches and bytes of the kernels of a callable, counted in Triton's interpreter.

    with count_launches() as log:
        y = layer_norm(x, weight)
    len(log); log[0].name, log[0].grid, log[0].bytes_read, log[0].bytes_written

`bytes_read` and `bytes_written` count each 32-byte sector that a kernel addresses once per launch, as if a cache never
evicted it. `lines` counts the bytes of every access, by source line. The interpreter has no bfloat16, so
bytes of bfloat16 are counted on float16 tensors. PyTorch's matrix products are left out. The audit runs it in a process
of its own, with TRITON_INTERPRET=1:

    python -m fastgpt2.bench.audit.traffic --json FILE [--op layer_norm,gelu]
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton

from fastgpt2.bench.cases.interpreter import quickened
from fastgpt2.gpt2.cli.cli import in_a_process
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.options import CommandOptions, File, Names

SECTOR = 32  # bytes: the least that a GPU's memory moves
# The path of the import and the real path, which differ where the checkout was imported through a link.
KERNELS = {str(file.parents[2] / "kernels") for file in (Path(__file__), Path(__file__).resolve())}
COUNTED_DTYPE = torch.float16  # of the cases that are counted; bfloat16 has as many bytes
COUNTED_ROWS = 2 * 257  # few, because the interpreter is slow, and enough to fill programs of many rows


@dataclass
class Launch:
    """One kernel launch. Grid, bytes and lines are known in the interpreter only."""

    name: str
    grid: tuple[int, ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0
    lines: Counter[str] = field(default_factory=Counter)  # "layer_norm.py:103" -> bytes of all its accesses
    _read: list[np.ndarray] = field(default_factory=list, repr=False)
    _written: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def _count(self, sectors: list[np.ndarray], pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        touched = pointers[mask] // np.uint64(SECTOR)
        self.lines[_line()] += touched.size * itemsize
        if touched.size > 1:  # drops equal neighbours, which are most; `_close` drops the other repetitions
            touched = touched[np.append(True, touched[1:] != touched[:-1])]
        sectors.append(touched)

    def _close(self) -> None:
        self.bytes_read, self.bytes_written = (
            SECTOR * int(np.unique(np.concatenate(sectors)).size) if sectors else 0
            for sectors in (self._read, self._written)
        )
        self._read, self._written = [], []


def _line() -> str:
    """The innermost running line in kernels/; for a kernel that is defined elsewhere, its own running line."""
    frame: FrameType | None = sys._getframe(1)
    outside = ""
    while frame is not None:
        folder, name = os.path.split(frame.f_code.co_filename)
        if folder in KERNELS:
            return f"{name}:{frame.f_lineno}"
        if frame.f_code.co_name.endswith("_kernel") and not outside:
            outside = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


class Launches(list[Launch]):
    """In order. `interpreting`: whether the interpreter is running one of them right now."""

    interpreting = False


@contextlib.contextmanager
def count_launches() -> Iterator[Launches]:
    """Lists the kernels launched inside. On a GPU their names alone: Triton's launch hook is not told the grid."""
    log = Launches()
    with contextlib.ExitStack() as stack:
        if triton.knobs.runtime.interpret:
            _record_interpreted(log, stack)
        else:
            stack.enter_context(launch_hook(lambda launch: log.append(Launch(launch["name"]))))
        yield log


@contextlib.contextmanager
def launch_hook(enter: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Inside, `enter` is called before every compiled launch with Triton's "name", "function" and "stream" of it."""

    def hook(metadata: Any) -> None:
        enter(metadata.get())

    runtime = triton.knobs.runtime
    chain: Any = runtime.launch_enter_hook
    if hasattr(chain, "add"):
        chain.add(hook)
        try:
            yield
        finally:
            chain.remove(hook)
        return

    def both(metadata: Any) -> None:
        if chain is not None:
            chain(metadata)
        hook(metadata)

    with runtime.scope():  # Triton 3.4 has one hook, not a chain of them
        runtime.launch_enter_hook = both  # type: ignore[assignment]
        yield


def _record_interpreted(log: Launches, patches: contextlib.ExitStack) -> None:
    # Patched, because the interpreter calls no hooks, neither for a launch nor for a load or store.
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    call, set_dim = GridExecutor.__call__, InterpreterBuilder.set_grid_dim
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def recorded_call(self, *args, **kwargs):
        log.append(Launch(self.fn.__name__))
        log.interpreting = True
        try:
            return call(self, *args, **kwargs)
        finally:
            log.interpreting = False
            log[-1]._close()

    def recorded_dim(self, *grid):
        log[-1].grid = grid
        set_dim(self, *grid)

    def itemsize(pointers) -> int:
        return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def recorded_load(self, pointers, mask, other, *rest, **named):
        log[-1]._count(log[-1]._read, pointers.data, mask.data, itemsize(pointers))
        return load(self, pointers, mask, other, *rest, **named)

    def recorded_store(self, pointers, value, mask, *rest):
        log[-1]._count(log[-1]._written, pointers.data, mask.data, itemsize(pointers))
        return store(self, pointers, value, mask, *rest)

    def recorded_atomic(self, operation, pointers, value, mask, *rest):
        for sectors in (log[-1]._read, log[-1]._written):
            log[-1]._count(sectors, pointers.data, mask.data, itemsize(pointers))
        return atomic(self, operation, pointers, value, mask, *rest)

    patches.enter_context(mock.patch.object(GridExecutor, "__call__", recorded_call))
    for name, method in dict(
        set_grid_dim=recorded_dim,
        create_masked_load=recorded_load,
        create_masked_store=recorded_store,
        create_atomic_rmw=recorded_atomic,
    ).items():
        patches.enter_context(mock.patch.object(InterpreterBuilder, name, method))


@dataclass(frozen=True, kw_only=True)
class CountingOptions(CommandOptions):
    """Counts launches and bytes in Triton's interpreter, for the audit."""

    json: File  # where the counts go
    op: Names = ""  # comma-separated kernel functions; by default all


def counting_options(argv: Sequence[str], module: str) -> tuple[CountingOptions, set[str]]:
    """Of a process that counts in the interpreter: (its options, the ops asked for, none where it counts all)."""
    options = parse(CountingOptions, argv, f"python -m {module}")
    if not triton.knobs.runtime.interpret:
        raise ValueError("set TRITON_INTERPRET=1: bytes are counted in the interpreter")
    return options, set(filter(None, options.op.split(",")))


def main(argv: Sequence[str]) -> int:
    """Writes the counts; returns 0."""
    from fastgpt2.bench.audit.compiled import pretended
    from fastgpt2.bench.cases.registry import all_cases
    from fastgpt2.gpt2.ops import kernels_digest

    options, wanted = counting_options(argv, "fastgpt2.bench.audit.traffic")
    results = []
    sources = kernels_digest()
    for case in all_cases(COUNTED_ROWS):
        if case.dtype != COUNTED_DTYPE or (wanted and case.op not in wanted):
            continue
        inputs = case.inputs(fill=torch.zeros)
        with pretended("80"), quickened(), np.errstate(all="ignore"):
            with count_launches() as forward:
                outputs = case.forward(inputs)
            with count_launches() as backward:
                case.backward(inputs, outputs)
        for direction, log, minimum in (
            ("forward", forward, case.forward_bytes),
            ("backward", backward, case.backward_bytes),
        ):
            if minimum is None:
                continue
            launches = [dict(kernel=entry.name, bytes=entry.bytes, lines=dict(entry.lines)) for entry in log]
            results.append(
                dict(op=case.op, case=case.name, direction=direction, minimum_bytes=minimum, launches=launches)
            )
    Path(options.json).write_text(json.dumps({"sources": sources, "passes": results}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(in_a_process(main))
