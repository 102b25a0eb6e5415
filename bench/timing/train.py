"""`fastgpt2 bench train`: tokens per second of a training step: our model with each kernel switch, and baselines.

Every variant starts from the same weights and takes the same step on the same random tokens: forward, backward,
clipping, fused AdamW. Before anything is timed, `fastgpt2 verify` must succeed and every variant's gradient must agree
with PyTorch's. A step's time is wall-clock time until the device is done. Where Python launches kernels more slowly
than the GPU runs them, that is Python's time, so every variant is measured on several roads: launched from Python, with
forward and backward as CUDA graphs, or by torch.compile in one of three modes. Variants on one road take turns, and a
speed-up is the median, over rounds, of the ratio to PyTorch's kernels on the same road.

MFU is `GPTConfig.flops_per_token` (PaLM's appendix B as nanoGPT counts: 6 N + 12 L H D T, causality not discounted)
times tokens per second over the data sheet's dense bf16 peak. It is unknown in other dtypes and on unknown hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from fastgpt2.bench.cases import flash_gpt, variants
from fastgpt2.bench.cases.case import DTYPES
from fastgpt2.bench.cases.variants import (
    CUDAGRAPH_TREES,
    FLASH_ATTN,
    GRAPH,
    MAX_AUTOTUNE,
    NANOGPT,
    OURS,
    ROADS,
    SUFFIXES,
    Variant,
)
from fastgpt2.bench.report import measured, tables
from fastgpt2.bench.report.record import Results, summary_line
from fastgpt2.bench.timing.options import DeviceOption, NanogptOption, OutOption
from fastgpt2.bench.timing.steps import Disagreement, Setting, TrainBench
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import PRESETS
from fastgpt2.gpt2.options import Names, about
from fastgpt2.gpt2.training.train_config import find_device

MFU_FORMULA = "(6 N + 12 L H D T) * tokens/s / peak dense bf16 FLOP/s of the data sheet; N without positions"
GPT2_SIZES = tuple(name for name in PRESETS if name.startswith("gpt2"))


@dataclass(frozen=True)
class Scope:
    """What a run measures by default; depends on the device and on --quick."""

    sizes: tuple[str, ...]
    batch: int
    block: int
    dtypes: tuple[str, ...]
    budget_s: float

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scope:
        if device.type == "cuda":
            return cls(("gpt2",), 16, 1024, ("bfloat16",), 10.0 if quick else 30.0)
        if quick:
            return cls(("baby",), 4, 256, ("float32",), 25.0)
        return cls(("gpt2",), 2, 256, ("float32", "bfloat16"), 120.0)


def select(
    device: torch.device, quick: bool, roads: tuple[str, ...] | None, with_nanogpt: bool, results: Results
) -> list[Variant]:
    """The variants that run here on `roads` (by default all). Records in `results` why others do not."""
    no_triton = no_graphs = None
    if not ops.TRITON_INSTALLED:
        no_triton = "the package triton is not installed"
    elif device.type != "cuda":
        no_triton = "Triton's kernels run on a GPU; a CPU can only interpret them, which says nothing about their speed"
    if device.type != "cuda":
        no_graphs = "there is no GPU"
    no_flash_attn = flash_gpt.why_not(device)
    no_cudnn = ops.why_not_cudnn(device)
    reasons: dict[str, str] = {}

    def why_not(variant: Variant) -> tuple[str, str] | None:
        """(what is left out, why) for a variant that does not run."""
        how = SUFFIXES[variant.road].removeprefix(" + ")
        if variants.on_triton(variant) and no_triton:
            return "all variants with Triton kernels", no_triton
        if variant.road == GRAPH and no_graphs:
            return "all variants as CUDA graphs", no_graphs
        if variant.road in CUDAGRAPH_TREES and no_graphs:
            return f"all variants with {how}", f"{no_graphs}, which this mode is made for"
        if quick and variant.road == MAX_AUTOTUNE and roads is None:
            return f"all variants with {how}", "it takes minutes to compile: --quick leaves it out"
        if quick and variant.mode and variant.family != OURS:
            return f"{variant.family} + compile", "--quick leaves it out"
        return None

    chosen = []
    for variant in variants.all_variants(with_nanogpt, no_flash_attn is None, no_cudnn is None):
        if roads is not None and variant.road not in roads:
            continue
        if (left_out := why_not(variant)) is None:
            chosen.append(variant)
        else:
            reasons.setdefault(*left_out)
    if not with_nanogpt:
        reasons[NANOGPT] = "--nanogpt PATH/model.py was not given"
    if no_flash_attn:
        reasons[FLASH_ATTN] = no_flash_attn
    if no_cudnn:
        reasons["cuDNN attention"] = no_cudnn
    if roads is not None:
        reasons["other roads than " + ", ".join(roads)] = "--road asks for these"
    for name, why in reasons.items():
        results.leave_out(name, why)
    return chosen


HELP = "tokens a second, MFU and memory of a training step, ours by every switch beside the baselines"


@dataclass(frozen=True, kw_only=True)
class Options(OutOption, DeviceOption, NanogptOption):
    """Times one training step of every variant, in turns: ours by every switch and PyTorch's, launched from Python, as
    CUDA graphs and compiled; HuggingFace, nanoGPT, flash-attn's GPT. `fastgpt2 verify` runs first; where it finds an
    error, no numbers are printed.
    """

    quick: bool = False  # an answer in about two minutes on 2 CPU cores
    size: Annotated[
        Names | None, about(f"comma-separated, from {', '.join(PRESETS)}, or all for GPT-2's four; None: by the device")
    ] = None
    batch: int | None = None  # sequences a step; None: by the device
    block: int | None = None  # tokens a sequence; None: by the device
    dtype: Annotated[
        Names | None,
        about(f"comma-separated, from {', '.join(DTYPES)}; of autocast where it is not float32; None: by the device"),
    ] = None
    seconds: float | None = None  # about how long the variants of one setting are timed; None: by the device
    sweep: bool = False  # also time each variant alone at 1, 2, 4, ... sequences until memory ends
    road: Annotated[
        Names | None,
        about(
            f"time only these ways to launch kernels, comma-separated, from {', '.join(ROADS)}; they get a file of "
            "their own; None: all"
        ),
    ] = None


def main(options: Options) -> int:
    """Prints the table and writes the result file; returns 1 and prints no number if something is computed wrongly."""
    device = find_device(options.device)
    settings = list(_settings(options, device))
    roads = _roads(options.road)
    part = " ".join(roads or ())
    nanogpt = variants.nanogpt_module(options.nanogpt) if options.nanogpt else None
    results = Results.begin("train", device, {"MFU": MFU_FORMULA, measured.DIGEST: ops.kernels_digest()})
    chosen = select(device, options.quick, roads, nanogpt is not None, results)
    if not gate.verified(device):
        return 1
    bench = TrainBench(results, chosen, nanogpt)
    with results.kept_if_cut_short(options.out, part):
        try:
            for setting in settings:
                print(f"measuring {setting.name}: {len(chosen)} variants", flush=True)
                bench.compare(setting)
                if options.sweep:
                    bench.sweep(setting)
        except Disagreement as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    tables.show(results)
    file = results.save(options.out, part)
    for line in measured.lines(device, options.out):
        print(line)
    best = {row["name"]: round(row["tokens_per_s"]["median"], 1) for row in results.rows if row["time_ms"]}
    print(summary_line(results, file, {"tokens_per_s": best}))
    return 0


def _roads(wanted: str | None) -> tuple[str, ...] | None:
    """The roads that --road names; None without it. Raises ValueError for an unknown one."""
    if wanted is None:
        return None
    roads = tuple(wanted.split(","))
    for road in roads:
        if road not in ROADS:
            raise ValueError(f"--road is {road!r}, allowed are {', '.join(ROADS)}")
    return roads


def _settings(options: Options, device: torch.device) -> Iterator[Setting]:
    """Raises ValueError for an option that is not allowed."""
    scope = Scope.of(device, options.quick)
    sizes = GPT2_SIZES if options.size == "all" else options.size.split(",") if options.size else scope.sizes
    dtypes = options.dtype.split(",") if options.dtype else scope.dtypes
    for name, given, allowed in (("size", sizes, PRESETS), ("dtype", dtypes, DTYPES)):
        for value in given:
            if value not in allowed:
                raise ValueError(f"--{name} is {value!r}, allowed are {', '.join(allowed)}")
    numbers = dict(batch=options.batch, block=options.block, seconds=options.seconds)
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise ValueError(f"--{name} is {number}, allowed are numbers above 0")
    for size in sizes:
        for dtype in dtypes:
            yield Setting(
                size=size,
                B=options.batch or scope.batch,
                T=options.block or scope.block,
                dtype=dtype,
                device=device,
                budget_s=options.seconds or scope.budget_s,
            )
