"""What the attention tests share: inputs, small tiles, the 2x rule."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from numerics import check
from torch import Tensor

from fastgpt2.kernels import _device, _tuning
from fastgpt2.kernels.attention import causal_attention, causal_attention_reference

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts what the interpreter does")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(B: int, T: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(B, T, 3 * H * D).to(device, dtype)


def offsets(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def lengths_of(*lengths: int, device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def token_and_cache(B: int, H: int, S: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """qkv (B, 1, 3*C) and a cache (2, B, H, S, D) of normal numbers."""
    return torch.randn(B, 1, 3 * H * D).to(device, dtype), torch.randn(2, B, H, S, D).to(device, dtype)


def tiles(**numbers: int):
    """Every row of the table with these block sizes, so that small inputs cross many tiles."""
    config = _tuning.config

    def small(key, *args) -> dict[str, int]:
        row = config(key, *args)
        return row | {name: n for name, n in numbers.items() if name in row} if key.op.startswith("attention") else row

    return mock.patch.object(_tuning, "config", small)


def rule(qkv: Tensor, n_head: int, upstream=None, **options):
    """The 2x rule for the output and dqkv."""
    return check(
        lambda x: causal_attention(x, n_head, **options),
        lambda x: causal_attention_reference(x, n_head, **options),
        qkv,
        names=("qkv",),
        upstream=upstream,
    )


@contextlib.contextmanager
def multiprocessors(n: int):
    """That many, and a short cache is split too."""
    config = _tuning.config

    def split(key, *args) -> dict[str, int]:
        row = config(key, *args)
        return {**row, "ONE_SPLIT": 0} if key.op == "decode_attention" else row

    with mock.patch.object(_device, "sm_count", lambda device: n), mock.patch.object(_tuning, "config", split):
        yield


# What the kernels with descriptors do not serve.
UNSERVED = ("documents", "window", "dropout", "float32", "head size 32", "head size 128", "address")


def unserved(what: str, T: int, device: torch.device) -> tuple[Tensor, int, dict]:
    """-> (qkv (2, T, 384), n_head, options) of a call that is one of UNSERVED."""
    qkv, H, options = packed(2, T, 2, 64, torch.float16, device), 2, {}
    if what == "documents":
        options = dict(cu_seqlens=offsets(device, 0, 30, 2 * T))
    elif what == "window":
        options = dict(window=9)
    elif what == "dropout":
        options = dict(dropout_p=0.1)
    elif what == "float32":
        qkv = qkv.float()
    elif what == "address":
        qkv = torch.randn(2, T, 392).to(device, torch.float16)[..., 4:388]
    else:
        H = 128 // int(what.removeprefix("head size "))
    return qkv, H, options


def compiled_loops(direction: str, folder: Path) -> dict:
    """What the kernel with descriptors of a direction does on sm_90, by a process that compiles (tma_loop.py)."""
    file = folder / "loops.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("tma_loop.py")), direction, str(file)]
    subprocess.run(command, env=environment, check=True)
    return json.loads(file.read_text())
