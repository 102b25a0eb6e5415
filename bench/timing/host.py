"""`fastgpt2 bench host`: what the host does in a training step, without any work on a device; needs no GPU.

Tensors are small and on the CPU, so that PyTorch's operators take little time for their computation. Our kernels are
launched by Triton's real code with a CUDA driver that does nothing (no_device.py). For each op, for one block (the cost
of one layer more) and for a model of 12 layers, forward and backward, it prints: microseconds on this CPU, calls (of
Python functions, and of C functions from Python; own calls are made in this package's code), tensors allocated, and
launches of our kernels (PyTorch's are not counted). The time that a GPU's allocator, streams and dispatch would add is
not included: compare these figures with each other only. They are not a GPU's speeds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2.bench.audit import audit
from fastgpt2.bench.cases import variants
from fastgpt2.bench.timing import no_device
from fastgpt2.bench.timing.options import NanogptOption
from fastgpt2.gpt2 import linear, ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, ALL_TRITON, Kernels, Stream
from fastgpt2.gpt2.options import File

LAYERS = 12
B, T, C, HEADS, VOCABULARY = 2, 16, 32, 2, 64
ROUNDS = 15
OWN = tuple(str(Path(ops.__file__).parents[1] / folder) for folder in ("kernels", "gpt2"))
ROADS = {"ours": ALL_TRITON, "ours, SDPA": ALL_TORCH}


@dataclass(frozen=True)
class Pass:
    """One forward and one backward of something."""

    forward_us: float
    backward_us: float
    calls: float
    own_calls: float
    allocations: float
    launches: float

    def __sub__(self, other: Pass) -> Pass:
        return Pass(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __truediv__(self, n: int) -> Pass:
        return Pass(*(a / n for a in vars(self).values()))


class _Allocations(TorchDispatchMode):
    """Counts tensors that PyTorch's operators return with newly allocated memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in _tensors((args, kwargs or {}))}
        self.count += sum(t.untyped_storage().data_ptr() not in given for t in _tensors(made))
        return made


def _tensors(value: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def as_on_gpu():
    """Turns off what our model does on a CPU alone."""
    # Both are decided by a tensor's device, for which there is no switch: nobody but this command runs the code for a
    # GPU on CPU tensors.
    with mock.patch.object(linear, "_suits", lambda *tensors: False), mock.patch.object(ops, "SHORT_ON_CPU", 0):
        yield


# ----------------------------------------------------------------------------------------------- what is measured


def op_runs(kernels: Kernels) -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """op -> (a function that computes it, the tensors that get gradients)."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, residual, x_bias, qkv = leaf(B, T, C), leaf(B, T, C), leaf(C), leaf(B, T, 3 * C)
    norm, fc, proj = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C, bias=False)
    wte, wpe, head = nn.Embedding(VOCABULARY, C), nn.Embedding(T, C), nn.Linear(C, VOCABULARY, bias=False)
    idx = torch.randint(VOCABULARY, (B, T))
    stream, V = Stream(x, x_bias, residual), VOCABULARY
    return {
        "add_layer_norm": (
            lambda: ops.add_layer_norm(stream, norm, kernels),
            [x, residual, x_bias, *norm.parameters()],
        ),
        "attention": (lambda: ops.causal_attention(qkv, HEADS, 0.25, 0.0, kernels), [qkv]),
        "mlp": (lambda: ops.mlp(x, fc, proj, kernels)[0], [x, *fc.parameters(), *proj.parameters()]),
        "embedding": (
            lambda: ops.embedding(idx, wte, wpe, None, 0.0, kernels),
            [*wte.parameters(), *wpe.parameters()],
        ),
        "loss": (
            lambda: ops.head_loss(x, head, idx, V, V, False, kernels)[1],
            [x, *head.parameters()],
        ),
    }


def model_run(family: str, kernels: Kernels, layers: int, nanogpt: ModuleType | None) -> tuple[Callable, nn.Module]:
    """-> (a function that computes the loss of a model with `layers` layers, the model)."""
    config = GPTConfig(
        block_size=T, vocab_size=VOCABULARY, n_layer=layers, n_head=HEADS, n_embd=C, dropout=0.0, bias=True
    )
    made = variants.Family(family, config, GPT(config, kernels="torch"), nanogpt, torch.device("cpu"))
    idx, targets = torch.randint(VOCABULARY, (2, B, T)).unbind()
    if family == variants.OURS:
        made.model.kernels = kernels
        return lambda: made.model(idx, targets)[1], made.model
    return made.loss(variants.Variant(family), idx, targets), made.model


class Run:
    """Times and counts one computation. `once` is called in turns with other runs, so that all meet the same load."""

    def __init__(self, compute: Callable[[], Any], leaves: Iterable[Tensor], autocast: bool):
        self.compute, self.leaves, self.autocast = compute, list(leaves), autocast
        self.forward_us = self.backward_us = float("inf")
        outputs = [o for o in self._forward() if o.requires_grad]
        self.upstream = [torch.ones_like(o) for o in outputs]

    def _forward(self) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            made = self.compute()
        return [made] if isinstance(made, Tensor) else list(made)

    def _step(self) -> tuple[float, float]:
        for t in self.leaves:
            t.grad = None
        start = time.thread_time()
        outputs = [o for o in self._forward() if o.requires_grad]
        middle = time.thread_time()
        torch.autograd.backward(outputs, self.upstream)
        return 1e6 * (middle - start), 1e6 * (time.thread_time() - middle)

    def once(self, repeats: int) -> None:
        for _ in range(repeats):
            forward, backward = self._step()
            self.forward_us, self.backward_us = min(self.forward_us, forward), min(self.backward_us, backward)

    def result(self) -> Pass:
        calls = own = 0

        def count(frame, event, argument):
            nonlocal calls, own
            if event in ("call", "c_call"):
                calls += 1
                own += frame.f_code.co_filename.startswith(OWN)

        gc.disable()  # its callbacks are not part of a step
        sys.setprofile(count)
        try:
            self._step()
        finally:
            sys.setprofile(None)
            gc.enable()
        before = no_device.launches()
        with _Allocations() as allocations:
            self._step()
        launches = no_device.launches() - before
        return Pass(self.forward_us, self.backward_us, calls, own, allocations.count, launches)


def measure(autocast: bool, rounds: int, nanogpt: ModuleType | None) -> dict[str, dict[str, Pass]]:
    """name -> implementation -> its figures; the names are the ops', "block" and "model"."""
    runs: dict[str, dict[str, Run]] = {}
    with no_device.no_device(), as_on_gpu():
        for road, kernels in ROADS.items():
            for op, (compute, leaves) in op_runs(kernels).items():
                runs.setdefault(op, {})[road] = Run(compute, leaves, autocast)
        families = {road: (variants.OURS, kernels) for road, kernels in ROADS.items()}
        families |= {variants.NANOGPT: (variants.NANOGPT, ALL_TORCH)} if nanogpt else {}
        families |= {variants.HUGGINGFACE: (variants.HUGGINGFACE, ALL_TORCH)}
        for layers in (1, LAYERS):
            for road, (family, kernels) in families.items():
                compute, model = model_run(family, kernels, layers, nanogpt)
                runs.setdefault(f"{layers} layers", {})[road] = Run(compute, model.parameters(), autocast)
        for _ in range(rounds):
            for thing, by_road in runs.items():
                for run in by_road.values():
                    run.once(3 if "layers" in thing else 10)
        found = {thing: {road: run.result() for road, run in by_road.items()} for thing, by_road in runs.items()}
    one, whole = found.pop("1 layers"), found.pop(f"{LAYERS} layers")
    found["block"] = {road: (whole[road] - one[road]) / (LAYERS - 1) for road in whole}
    found["model"] = whole
    return found


# --------------------------------------------------------------------------------------------------------- command


def table(found: dict[str, dict[str, Pass]], title: str) -> str:
    """Markdown with a row for each name and implementation."""
    lines = [
        f"| {title} | road | forward us | backward us | both / SDPA's | calls | own calls | allocations | launches |",
        "|---" * 9 + "|",
    ]
    for thing, by_road in found.items():
        base = by_road["ours, SDPA"]
        for road, taken in by_road.items():
            ratio = (taken.forward_us + taken.backward_us) / (base.forward_us + base.backward_us)
            counts = (taken.calls, taken.own_calls, taken.allocations, taken.launches)
            cells = [
                f"{taken.forward_us:.0f}",
                f"{taken.backward_us:.0f}",
                f"{ratio:.2f}",
                *map("{:.0f}".format, counts),
            ]
            lines.append(f"| {thing} | {road} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    """The name of this machine's CPU and its number of cores."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


HELP = "count what the host does in a step, without a GPU"


@dataclass(frozen=True, kw_only=True)
class Options(NanogptOption):
    """Runs our ops, a block and a model of 12 layers forward and backward with nothing on the device, and prints
    microseconds on this CPU, calls and allocations: ours, our SDPA road, nanoGPT, HuggingFace.
    """

    rounds: int = ROUNDS  # of timing, the best of which counts
    json: File | None = None  # also write the figures to this file
    write: bool = False  # write the tables to bench/results, and into its kernel card too


def main(options: Options) -> int:
    if options.rounds < 1:
        raise ValueError(f"bench host: --rounds is {options.rounds}, allowed is at least 1")
    nanogpt = variants.nanogpt_module(options.nanogpt) if options.nanogpt else None
    torch.set_num_threads(1)
    lines = [
        "# What the host does in a step",
        "",
        "Written by `fastgpt2 bench host --write`, with nothing on a device: no figure here is a speed of a GPU.",
        f"Microseconds of {processor()}, the best of {options.rounds} rounds;",
        f"PyTorch {torch.__version__}, Triton {triton.__version__}.",
    ]
    print("\n".join(lines[2:]))
    results = {}
    for name, autocast in (("fp32", False), ("autocast, bf16", True)):
        found = measure(autocast, options.rounds, nanogpt)
        lines += ["", table(found, name)]
        print("\n" + lines[-1])
        results[name] = {t: {road: vars(p) for road, p in by_road.items()} for t, by_road in found.items()}
    if options.write:
        audit.HOST.write_text("\n".join(lines) + "\n", encoding="utf-8")
        audit.write_markdown()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0
