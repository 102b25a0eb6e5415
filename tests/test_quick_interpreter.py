"""bench/cases/interpreter.py: the results of Triton's own interpreter, its check of int32, and nothing left behind."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from fastgpt2.bench.cases.interpreter import quickened

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")

# The tests' own session is quickened as a whole: the stock interpreter needs another process.
BOTH = """
import torch, triton.language as tl
from fastgpt2.bench.cases.interpreter import quickened
from fastgpt2.kernels.attention import causal_attention
from fastgpt2.kernels.layer_norm import layer_norm

def results():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 40, 96, generator=generator)
    return causal_attention(qkv, 2), layer_norm(qkv, qkv[0, 0], qkv[1, 0])

stock = results()
with quickened():
    with quickened():
        quick = results()
    assert not tl.core.is_builtin(tl.load), "the inner one ended the outer one"
assert tl.core.is_builtin(tl.load), "the language was left exchanged"
assert all(torch.equal(a, b) for a, b in zip(stock, quick, strict=True))
assert all(torch.equal(a, b) for a, b in zip(stock, results(), strict=True))
"""


def test_the_results_are_the_stock_interpreters():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
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
