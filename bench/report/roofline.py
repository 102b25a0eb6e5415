"""A roofline *model*: the least time that a GPU's data sheet allows, per op and training step; measures nothing.

    time >= max(bytes / memory bandwidth, FLOPs / peak dense bf16 FLOP/s)

for each op; for a training step the sum over its ops, which run one after the other. Bytes are the least that an op
must move (bench/cases/): every operand once. A training step is forward and backward under bf16 autocast with float32
parameters, then clipping and AdamW. No kernel reaches this time; it shows how far a measurement is from the hardware's
limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastgpt2.bench.cases.case import BF16, VOCABULARY, Case
from fastgpt2.bench.cases.registry import all_cases, step_cases
from fastgpt2.bench.report import tables
from fastgpt2.gpt2.config import PRESETS, GPTConfig
from fastgpt2.gpt2.hardware import Gpu, gpu_by_name
from fastgpt2.gpt2.options import CommandOptions

SHOWN = ("A100", "H100", "H200", "B200", "RTX 4090", "MI300X")
B, T = 16, 1024  # sequences and tokens, in the tables
LABEL = "Roofline model (data sheets, nothing measured)"
E, P = 2, 4  # bytes of an element in bf16, of a parameter or gradient in fp32


@dataclass(frozen=True)
class Work:
    """An op of a training step, forward and backward: the bytes it must move, its FLOPs, and how often it occurs."""

    name: str
    bytes: int
    flops: int
    times: int = 1

    def least_s(self, gpu: Gpu) -> float:
        return self.times * max(self.bytes / gpu.bytes_per_s, self.flops / gpu.bf16_flops)


def least_ms(moved: int, flops: int, gpu: Gpu | None, dtype: torch.dtype) -> float | None:
    """The least time of one op; None for an unknown GPU, and for matrix products in a dtype whose peak is unknown."""
    if gpu is None or (flops and dtype.itemsize != E):
        return None
    return 1e3 * Work("", moved, flops).least_s(gpu)


def step_work(config: GPTConfig, B: int, T: int) -> Iterator[Work]:
    """The ops of one training step of B sequences of T tokens."""
    N, C, L = B * T, config.n_embd, config.n_layer
    V, parameters = config.padded_vocab_size, config.num_params()
    case = step_cases(B, T, C)

    def whole(op: str, times: int = 1) -> Work:
        return Work(op, *case[op].work("both"), times=times)

    def product(name: str, inputs: int, outputs: int) -> Work:
        """x (N, inputs) times a weight: y, dx and dweight."""
        x, weight, y = N * inputs, inputs * outputs, N * outputs
        forward, dx, dweight = E * (x + weight + y), E * (y + weight + x), E * (y + x) + P * weight
        return Work(name, forward + dx + dweight, 6 * N * inputs * outputs, L)

    yield whole("token_position_embedding")
    yield whole("layer_norm")
    yield whole("add_layer_norm", 2 * L)  # after each branch, the last one before the head
    yield product("c_attn", C, 3 * C)
    yield whole("causal_attention", L)
    yield product("attn.c_proj", C, C)
    yield product("c_fc", C, 4 * C)
    yield whole("bias_gelu", L)
    yield product("mlp.c_proj", 4 * C, C)
    loss = whole("linear_cross_entropy")
    yield dataclasses.replace(loss, flops=6 * N * C * V)  # of the padded table
    yield Work("weights to bf16", (P + E) * parameters, 0)
    yield Work("gradient norm", P * parameters, 0)
    yield Work("AdamW with clipping", 7 * P * parameters, 0)  # p, m, v read and written, the gradient read


def step_ms(config: GPTConfig, B: int, T: int, gpu: Gpu) -> float:
    """The least time of one training step."""
    return 1e3 * sum(work.least_s(gpu) for work in step_work(config, B, T))


def shown_cases() -> dict[str, Case]:
    """Every op at GPT-2 124M's sizes. Ops of a training step have its sizes, the others the registry's."""
    step = step_cases(B, T, PRESETS["gpt2"]["n_embd"])
    others = (case for case in all_cases(B * T) if case.dtype == BF16 and case.op not in step)
    first: dict[str, Case] = {}
    for case in others:
        first.setdefault(case.op, case)
    return step | first


def table() -> tuple[list[str], list[list[str]]]:
    """Headers and rows: ops of GPT-2 124M and training steps of every size, on each GPU shown."""
    gpus = [gpu for name in SHOWN if (gpu := gpu_by_name(name))]
    rows = []
    for op, case in shown_cases().items():
        for direction in ("forward", "backward", "both") if case.backward_bytes is not None else ("forward",):
            moved, flops = case.work(direction)
            if case.forward_flops and not flops:
                continue  # unknown how they split into forward and backward
            least = (least_ms(moved, flops, gpu, BF16) for gpu in gpus)
            rows.append([f"{op} {direction} ({case.shape})", *(f"{ms:.3f} ms" for ms in least)])
    for size in (name for name in PRESETS if name.startswith("gpt2")):
        config = GPTConfig.preset(size, vocab_size=VOCABULARY, vocab_multiple=128, block_size=T)
        steps = [step_ms(config, B, T, gpu) for gpu in gpus]
        cells = (f"{ms:,.1f} ms, at most {B * T / ms * 1e3:,.0f} tokens/s" for ms in steps)
        rows.append([f"training step of {size}, B={B} T={T}", *cells])
    return ["least time, model", *(f"{gpu.part}, model" for gpu in gpus)], rows


def as_markdown() -> str:
    return f"## {LABEL}\n\n{tables.as_markdown(*table())}\n"


# ------------------------------------------------------------------------------------------------------- command


HELP = "a model: the least time that data sheets allow, per op and training step; measures nothing"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Prints a roofline model: the least time that data sheets allow. Nothing is measured."""


def main(options: Options) -> int:
    print(as_markdown())
    return 0
