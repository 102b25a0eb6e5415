"""Launches and bytes of our ops, of eager PyTorch's and of Liger's, counted the same way, without a GPU.

All work on the device is counted, PyTorch's operators around our kernels too. An operator is one launch that reads its
distinct inputs once and writes its outputs once; of a kernel, the interpreter counts what it addresses. Bytes of matrix
products are left out. CUDA needs several kernels for some operators, so PyTorch's launches are a lower bound. Liger
takes the CPU for a GPU of one multiprocessor, for which it makes fewer partial sums than for a real one.
The audit runs it in a process of its own, with TRITON_INTERPRET=1:

    python -m fastgpt2.bench.audit.peer_traffic --json FILE [--op layer_norm,gelu]
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl

from fastgpt2.bench.audit.compiled import pretended
from fastgpt2.bench.audit.dispatch import count_traffic
from fastgpt2.bench.audit.traffic import COUNTED_DTYPE, COUNTED_ROWS, counting_options
from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.interpreter import quickened
from fastgpt2.bench.cases.peers import PEERS, installed
from fastgpt2.bench.cases.registry import all_cases
from fastgpt2.gpt2.cli.cli import in_a_process

OURS, PYTORCH, LIGER = "ours", "PyTorch", "Liger"


def count(case: Case, function: Callable) -> dict[str, dict[str, Any]]:
    """direction -> launches, and bytes divided by the least that the pass must move."""
    inputs = case.inputs(fill=torch.zeros)
    with pretended("80"), np.errstate(all="ignore"):
        with count_traffic() as forward:
            outputs = case.forward(inputs, function)
        upstream = tuple(torch.ones_like(o) for o in outputs)
        with count_traffic() as backward:
            case.backward(inputs, outputs, upstream)
    found = {}
    for direction, traffic in (("forward", forward), ("backward", backward)):
        minimum, _ = case.work(direction)
        if minimum:
            found[direction] = dict(launches=traffic.launches, bytes_over_minimum=round(traffic.bytes / minimum, 3))
    return found


def functions(case: Case) -> dict[str, Callable]:
    """label -> implementation of a case's op to count. Liger's only where it is installed and has the op."""
    found = {OURS: case.ours, PYTORCH: case.eager}
    if make := PEERS[LIGER].makers.get(case.op) if installed(PEERS[LIGER].module) else None:
        found[LIGER] = make()
    return found


@contextlib.contextmanager
def foreign_kernels() -> Iterator[None]:
    """Lets the interpreter run other libraries' kernels, which pass floats as numbers and use CUDA's `rsqrt`. To be
    entered before such kernels are imported."""
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt  # patched, because the interpreter has no setting for what it accepts

    def convert_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    with (
        mock.patch.object(interpreter, "_implicit_cvt", convert_floats),
        mock.patch.object(libdevice, "rsqrt", lambda x: tl.rsqrt(x)),
    ):
        yield


def main(argv: Sequence[str]) -> int:
    """Writes the counts; returns 0."""
    options, wanted = counting_options(argv, "fastgpt2.bench.audit.peer_traffic")
    results = []
    with foreign_kernels(), quickened():
        for case in all_cases(COUNTED_ROWS):
            if case.dtype == COUNTED_DTYPE and (not wanted or case.op in wanted):
                for label, function in functions(case).items():
                    for direction, figures in count(case, function).items():
                        results.append(dict(op=case.op, direction=direction, label=label, **figures))
    Path(options.json).write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(in_a_process(main))
