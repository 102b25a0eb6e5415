"""`fastgpt2 bench race`: loss against seconds, of one model trained by each implementation for the same time.

All begin with the same weights and make the same steps on the same batches of real text: clipping, fused AdamW, the
same learning rate at the same step. They run one after the other, each as fast as its users run it: ours with forward
and backward as CUDA graphs on a GPU, nanoGPT compiled, HuggingFace launched from Python. At the same step their losses
agree but for rounding (and nanoGPT's GELU by erf), so what differs is how many steps fit into the time.

The clock starts before the first step, so that compilation and capture count (what a compiler finds in its cache on
disk, it does not compile again). It stands still while the loss on held-out text is computed. Losses of training are
read every few steps, because each reading waits for the device.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.peers import first_line
from fastgpt2.bench.cases.variants import COMPILE, GRAPH, HUGGINGFACE, LAUNCHED, NANOGPT, OURS, Family, Variant
from fastgpt2.bench.report import tables
from fastgpt2.bench.report.record import Results, summary_line
from fastgpt2.bench.timing import steps
from fastgpt2.bench.timing.options import DeviceOption, NanogptOption, OutOption
from fastgpt2.bench.timing.steps import Disagreement, Setting
from fastgpt2.bench.timing.timing import Timing
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import PRESETS, GPTConfig
from fastgpt2.gpt2.data.corpus import Corpus, load_corpus
from fastgpt2.gpt2.data.windows import MAX_SEED, Windows, check_tokens, eval_batches
from fastgpt2.gpt2.evaluation.evaluate import evaluating
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TRITON
from fastgpt2.gpt2.options import Name, Source, about
from fastgpt2.gpt2.output import plain_console
from fastgpt2.gpt2.training.optim import wsd_schedule
from fastgpt2.gpt2.training.progress import stages
from fastgpt2.gpt2.training.train_config import DTYPES, find_device

READ_EVERY = 10  # steps
HELD_OUT_WINDOWS = 64
HELD_OUT_CHECKS = 10  # in the whole time, the last one at its end
FIRST_LOSSES_AGREE = 0.02  # the largest part by which two may differ; GELU by erf and 16 bits stay far below
GPU_WARMUP, CPU_WARMUP = 100, 10  # steps
FLOAT16 = "float16"  # needs a gradient scaler, which the compared steps do not have
Batch = tuple[Tensor, Tensor]
Point = tuple[float, int, float]  # seconds, steps made, loss in nats a token


@dataclass(frozen=True)
class Course:
    """What is the same for all: text, batches and learning rates."""

    setting: Setting
    config: GPTConfig
    corpus: Corpus
    lr: float
    warmup: int  # steps
    seed: int

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0: a linear warm-up, then constant, since nobody knows how many steps will fit."""
        return wsd_schedule(step, peak=self.lr, floor=self.lr, warmup=self.warmup, steps=sys.maxsize, decay=0)

    def batches(self) -> Iterator[Batch]:
        """Training batches without end, in pinned memory where there is a GPU."""
        windows = Windows(self.corpus.train, self.setting.T, self.seed)
        while True:
            yield self._shared(windows.next_batch(self.setting.B))

    def held_out(self) -> list[Batch]:
        """Whole batches of held-out text."""
        B = self.setting.B
        batches = eval_batches(self.corpus.val, self.setting.T, B, max(B, HELD_OUT_WINDOWS))
        return [self._shared(batch) for batch in batches if len(batch[0]) == B]

    def _shared(self, batch: Batch) -> Batch:
        idx, targets = batch
        targets[:, -1] = steps.NO_TARGET
        if self.setting.device.type == "cuda":
            return idx.pin_memory(), targets.pin_memory()
        return idx, targets


@dataclass
class Run:
    """What one implementation reached."""

    label: str
    first_s: float = 0.0  # of the first step, compilation included
    steps: int = 0
    training: list[Point] = field(default_factory=list)  # the mean loss of the steps since the previous point
    held_out: list[Point] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.training[-1][0]

    def step_times(self) -> Timing:
        """Milliseconds of a step between two readings; the first reading, with compilation in it, is left out."""
        points = [(self.first_s, 1), *((seconds, made) for seconds, made, _ in self.training)]
        points = points[1:] if len(points) > 2 else points
        return Timing(tuple(1e3 * (b[0] - a[0]) / (b[1] - a[1]) for a, b in zip(points, points[1:], strict=False)))

    def reached_s(self, loss: float) -> float | None:
        """Seconds until the held-out loss was as low as `loss`, linear between two checks and at the earliest those of
        the first check; None where it never was."""
        if self.held_out[0][2] <= loss:
            return self.held_out[0][0]
        for (a_s, _, a), (b_s, _, b) in zip(self.held_out, self.held_out[1:], strict=False):
            if b <= loss:
                return a_s + (a - loss) / (a - b) * (b_s - a_s)
        return None


class Contestant:
    """One implementation on the course."""

    def __init__(self, course: Course, family: Family, variant: Variant):
        self.course, self.family = course, family
        setting = course.setting
        # Every road reads its batch from the same memory; a CUDA graph can do nothing else.
        self.idx = torch.zeros(setting.B, setting.T, dtype=torch.int64, device=setting.device)
        self.targets = torch.zeros_like(self.idx)
        self.step = family.step(family.backward(variant, self.idx, self.targets, setting.autocast))
        self._loss = family.loss(dataclasses.replace(variant, road=LAUNCHED), self.idx, self.targets)
        self.run = Run(f"{OURS}, " * (variant.family == OURS) + family.label(variant))

    def train(self, seconds: float, say: Callable[[str], None]) -> None:
        """Trains until `seconds` are over at a reading. Notes in `run` what was reached. Raises FloatingPointError for
        a loss that is not finite."""
        run, paused_s = self.run, 0.0
        held_out, total = self.course.held_out(), torch.zeros((), device=self.idx.device)
        start_s = time.perf_counter()
        for batch in self.course.batches():
            self._load(batch)
            for group in self.family.optimizer.param_groups:
                group["lr"] = self.course.learning_rate(run.steps)
            total += self.step()
            run.steps += 1
            if run.steps == 1:
                total.item()  # waits for the device
                run.first_s = time.perf_counter() - start_s
            if run.steps % READ_EVERY:
                continue
            loss = total.item() / READ_EVERY  # waits for the device
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of training is {loss} at step {run.steps}: try a lower --lr")
            total.zero_()
            now_s = time.perf_counter() - start_s - paused_s
            run.training.append((now_s, run.steps, loss))
            if now_s >= seconds * (len(run.held_out) + 1) / HELD_OUT_CHECKS:
                begin_s = time.perf_counter()
                run.held_out.append((now_s, run.steps, self._held_out_loss(held_out)))
                paused_s += time.perf_counter() - begin_s
                say(f"{now_s:.0f} s, {run.steps:,} steps: held-out loss {run.held_out[-1][2]:.4f}")
            if now_s >= seconds:
                return

    def _load(self, batch: Batch) -> None:
        self.idx.copy_(batch[0], non_blocking=True)
        self.targets.copy_(batch[1], non_blocking=True)

    def _held_out_loss(self, batches: list[Batch]) -> float:
        losses = []
        with evaluating(self.family.model), self.course.setting.autocast():
            for batch in batches:
                self._load(batch)
                losses.append(self._loss().item())
        return float(np.mean(losses))


def contestants(device: torch.device, with_nanogpt: bool, results: Results) -> list[Variant]:
    """The implementations, each as its users run it. Records in `results` what is left out."""
    on_gpu = device.type == "cuda" and ops.TRITON_INSTALLED
    chosen = [Variant(OURS, ALL_TRITON, GRAPH) if on_gpu else Variant(OURS)]
    if with_nanogpt:
        chosen.append(Variant(NANOGPT, road=COMPILE))
    else:
        results.leave_out(NANOGPT, "--nanogpt PATH/model.py was not given")
    return [*chosen, Variant(HUGGINGFACE)]


HELP = "loss against seconds: one model, trained by each implementation for the same time"


@dataclass(frozen=True, kw_only=True)
class Options(OutOption, DeviceOption, NanogptOption):
    """Trains one model from the same weights on the same batches by each implementation, for the same time each, and
    draws loss against seconds: ours as CUDA graphs on a GPU, nanoGPT compiled, HuggingFace. `fastgpt2 verify` runs
    first; where it finds an error, nothing is trained.
    """

    data: Source | None = None  # as `fastgpt2 train` takes it; None: the sources of Python's library
    tokenizer: Name | None = None  # as `fastgpt2 train` takes it; None: that of the shards, bytes for text
    seconds: float | None = None  # for each implementation; None: 300 on a GPU, 60 on a CPU
    size: Annotated[Name | None, about(f"from {', '.join(PRESETS)}; None: gpt2 on a GPU, baby on a CPU")] = None
    batch: int | None = None  # sequences a step; None: by the device
    block: int | None = None  # tokens a sequence; None: by the device
    dtype: Annotated[Name | None, about("float32 or bfloat16, of autocast; None: by the device")] = None
    lr: float = 6e-4  # of AdamW after the warm-up
    warmup: int | None = None  # steps; None: by the device
    seed: int = 1337  # of the weights and of the order of batches


def main(options: Options) -> int:
    """Trains, prints the table and writes the result file; returns 1 if something is computed wrongly."""
    device = find_device(options.device)
    course = _course(options, device)
    seconds = options.seconds or (300.0 if device.type == "cuda" else 60.0)
    nanogpt = variants.nanogpt_module(options.nanogpt) if options.nanogpt else None
    setting, corpus = course.setting, course.corpus
    shared = dict(lr=course.lr, warmup=course.warmup, seed=course.seed, seconds=seconds)
    text = f"{corpus.name}, {len(corpus.train):,} tokens of {corpus.tokenizer.vocab_size:,} kinds"
    checked = sum(targets.ge(0).sum().item() for _, targets in course.held_out())
    results = Results.begin("race", device, {"text": text, "held-out tokens": checked, **shared})
    chosen = contestants(device, nanogpt is not None, results)
    if not gate.verified(device):
        return 1
    torch.manual_seed(options.seed)
    weights = GPT(course.config, kernels="torch")
    runs: dict[Variant, Run] = {}
    failures: list[str] = []
    with results.kept_if_cut_short(options.out):
        for variant in chosen:
            contestant = Contestant(course, Family(variant.family, course.config, weights, nanogpt, device), variant)
            run = contestant.run
            print(f"training {setting.name} by {run.label} for {seconds:g} s", flush=True)
            try:
                contestant.train(seconds, lambda line: print(f"  {line}", flush=True))
            except Exception as error:  # a compiler's and a driver's errors share no class
                failures.append(f"{run.label}: {first_line(error)}")
                results.leave_out(run.label, f"failed: {first_line(error)}")
                continue
            except BaseException:  # Ctrl-C: what was reached is kept
                if run.held_out:
                    _add_row(results, course, variant, run)
                raise
            finally:
                del contestant
                steps.forget()
            runs[variant] = run
            try:
                _check_agreement(list(runs.values()))
            except Disagreement as error:
                print(f"failed: {error}", file=sys.stderr)
                return 1
            _add_row(results, course, variant, run)
        if not runs:
            print(f"failed: {'; '.join(failures)}", file=sys.stderr)
            return 1
        _compare(results, list(runs.values()))
    tables.show(results)
    file = results.save(options.out)
    print(summary_line(results, file, {"held_out_loss": {row["label"]: row["held_out_loss"] for row in results.rows}}))
    return 0


def _check_agreement(runs: list[Run]) -> None:
    """Raises Disagreement where the losses of the first steps are not those of one model with one optimizer."""
    (first, expected), (last, found) = ((run.label, run.training[0][2]) for run in (runs[0], runs[-1]))
    if not abs(found - expected) <= FIRST_LOSSES_AGREE * expected:
        raise Disagreement(
            f"{last}: the loss of its first {READ_EVERY} steps is {found:.4f}, that of {first} is {expected:.4f}; "
            "nothing is reported"
        )


def _add_row(results: Results, course: Course, variant: Variant, run: Run) -> None:
    setting, taken = course.setting, run.step_times()
    results.add(
        f"{setting.name} {run.label}",
        what=f"{steps.WHAT}, on real text, for {run.seconds:.0f} s",
        seconds=run.seconds,
        time_ms=taken.as_dict(),
        label=run.label,
        size=setting.size,
        batch=setting.B,
        block=setting.T,
        dtype=setting.dtype,
        road=variant.road,
        tokens_per_s=taken.per_second(setting.B * setting.T),
        steps=run.steps,
        first_s=round(run.first_s, 2),
        training=run.training,
        held_out=run.held_out,
        held_out_loss=run.held_out[-1][2],
    )


def _compare(results: Results, runs: list[Run]) -> None:
    """Notes the highest of the final held-out losses, and when each implementation had reached it."""
    common = max(run.held_out[-1][2] for run in runs)
    results.settings["common loss, the highest of the last held-out ones"] = common
    for row, run in zip(results.rows, runs, strict=True):
        row["common_loss_s"] = run.reached_s(common)


def _course(options: Options, device: torch.device) -> Course:
    """Raises ValueError for an option that is not allowed, OSError and ValueError for data that cannot be used."""
    on_gpu = device.type == "cuda"
    size, dtype = options.size or ("gpt2" if on_gpu else "baby"), options.dtype or ("bfloat16" if on_gpu else "float32")
    for name, value, allowed in (("size", size, PRESETS), ("dtype", dtype, [d for d in DTYPES if d != FLOAT16])):
        if value not in allowed:
            raise ValueError(f"--{name} is {value!r}, allowed are {', '.join(allowed)}")
    for name, number in dict(batch=options.batch, block=options.block, seconds=options.seconds, lr=options.lr).items():
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"--{name} is {number}, allowed are numbers above 0")
    if options.block == 1:
        raise ValueError("--block is 1, allowed are numbers from 2: the last token of a row has no target")
    if not 0 <= options.seed <= MAX_SEED:
        raise ValueError(f"--seed is {options.seed}, allowed are 0..{MAX_SEED}")
    warmup = (GPU_WARMUP if on_gpu else CPU_WARMUP) if options.warmup is None else options.warmup
    if warmup < 0:
        raise ValueError(f"--warmup is {warmup}, allowed are numbers from 0")
    B, T = options.batch or (16 if on_gpu else 4), options.block or (1024 if on_gpu else 256)
    with stages(plain_console(), "reading the text") as say:
        corpus = load_corpus(options.data, options.tokenizer, 0.1, T, text_tokenizer="byte", say=say)
    setting = Setting(size=size, B=B, T=T, dtype=dtype, device=device, budget_s=0.0)
    vocabulary = corpus.tokenizer.vocab_size if "vocab_size" in PRESETS[size] else steps.VOCABULARY
    config = GPTConfig.preset(size, vocab_size=vocabulary, block_size=T)
    for tokens in (corpus.train, corpus.val):
        check_tokens(tokens, config.vocab_size)
    course = Course(setting, config, corpus, options.lr, warmup, options.seed)
    if not course.held_out():
        raise ValueError(
            f"the held-out text of {corpus.name} is shorter than --batch {B} windows of --block {T} tokens"
        )
    return course
