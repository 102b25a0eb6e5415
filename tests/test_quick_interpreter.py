"""bench/cases/interpreter.py: the results of Triton's own interpreter, its check of int32, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fastgpt2.bench.cases.interpreter import quickened

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")

# The tests' own session is quickened as a whole: the stock interpreter needs another process.
BOTH = """
import torch, triton.language as tl
from calls import CALLS
from fastgpt2.bench.cases.interpreter import quickened

def results():
    dtypes = (torch.float32, torch.float16)
    every = [c.results(c.inputs(dtypes[i % 2], torch.device("cpu"))) for i, c in enumerate(CALLS)]
    return [(call.name, r) for call, tensors in zip(CALLS, every) for r in tensors]

torch.manual_seed(0)
stock = results()
torch.manual_seed(0)
with quickened():
    with quickened():
        quick = results()
    assert not tl.core.is_builtin(tl.load), "the inner one ended the outer one"
assert tl.core.is_builtin(tl.load), "the language was left exchanged"
assert len(stock) > len(CALLS) and not any(r.isnan().any() for _, r in stock)
different = [name for (name, a), (_, b) in zip(stock, quick, strict=True) if not torch.equal(a, b)]
assert not different, different
"""


def test_the_results_are_the_stock_interpreters():
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_without_interpretation_nothing_changes(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr("triton.runtime.interpreter._patch_lang", None)  # would be called
    with quickened():
        pass


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr):
    a, b = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    if OPERATION == "add":
        tl.store(x_ptr + tl.arange(0, 2), a + b)
    elif OPERATION == "sub":
        tl.store(x_ptr + tl.arange(0, 2), a - b)
    else:
        tl.store(x_ptr + tl.arange(0, 2), a * b)


@pytest.mark.parametrize(
    ("operation", "a", "b"),
    [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15), ("mul", 2**16, -(2**16))],
)
def test_an_overflow_of_int32_is_seen(operation, a, b):
    x = torch.tensor([0, a], dtype=torch.int32)
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        _arithmetic_kernel[1,](x, torch.tensor([0, b], dtype=torch.int32), operation)
    x = torch.tensor([0, a])  # int64 holds it
    _arithmetic_kernel[1,](x, torch.tensor([0, b]), operation)
    assert x.tolist() == [0, {"add": a + b, "sub": a - b, "mul": a * b}[operation]]


def test_the_largest_int32_is_no_overflow():
    x = torch.tensor([2**30, -(2**30)], dtype=torch.int32)
    _arithmetic_kernel[1,](x, torch.tensor([2**30 - 1, -(2**30)], dtype=torch.int32), "add")
    assert x.tolist() == [2**31 - 1, -(2**31)]


@triton.jit
def _quotient_kernel(x_ptr, y_ptr, quotient_ptr):
    rows, columns = tl.arange(0, 2)[:, None], tl.arange(0, 4)[None, :]
    tl.store(quotient_ptr + rows * 4 + columns, tl.load(x_ptr + rows) / tl.load(y_ptr + columns))


def test_a_column_by_a_row_of_halves_is_divided_in_float32():
    x, y = torch.tensor([1.0, 2.0]).half(), torch.tensor([3.0, 5.0, 7.0, 9.0]).half()
    quotient = torch.empty(2, 4)
    _quotient_kernel[1,](x, y, quotient)
    assert torch.equal(quotient, x.float()[:, None] / y.float())


@triton.jit
def _misfit_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, 4), tl.arange(0, 4) + tl.arange(0, N))


@pytest.mark.parametrize("n", [2, 8])
def test_blocks_that_do_not_fit_are_an_error(n):
    with pytest.raises(Exception, match="incompatible dimensions at index 0: 4 and " + str(n)):
        _misfit_kernel[1,](torch.zeros(4, dtype=torch.int32), n)
