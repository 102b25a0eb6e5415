"""Training steps of every variant at one setting: checked against each other, then timed.

    bench = TrainBench(results, variants, nanogpt)
    bench.compare(setting)                     # all variants in turns
    bench.sweep(setting)                       # each alone at 1, 2, 4, ... sequences until memory runs out

A variant's gradient must agree with PyTorch's before anything is timed: see `Disagreement`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.case import DTYPES, FP32
from fastgpt2.bench.cases.peers import first_line
from fastgpt2.bench.cases.variants import GRAPH, LAUNCHED, OURS, Backward, Family, Variant
from fastgpt2.bench.report import roofline
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import timing
from fastgpt2.bench.timing.timing import Timing
from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.config import PRESETS, GPTConfig
from fastgpt2.gpt2.model import GPT

VOCABULARY = 50304  # GPT-2's 50257 padded as nanoGPT does, for every variant alike
LARGEST_BATCH = 4096
SHARE_FOR_STATE = 0.4  # of memory: families whose state needs more than this together are measured one by one
# Root mean square of the gradient's difference over that of the gradient. nanoGPT's GELU is by erf, GPT-2's by tanh.
AGREEMENT = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}
WHAT = "one optimizer step: forward, backward, clipping, fused AdamW"
NO_MEMORY = "out of memory"
NO_TARGET = -1  # what nanoGPT ignores; HuggingFace's loss has no target for a row's last token


@dataclass(frozen=True)
class Setting:
    """What is trained: `size` is a preset of GPTConfig, B sequences of T tokens."""

    size: str
    B: int
    T: int
    dtype: str
    device: torch.device
    budget_s: float

    @property
    def name(self) -> str:
        return f"{self.size} B={self.B} T={self.T} {self.dtype}"

    @property
    def config(self) -> GPTConfig:
        vocabulary = PRESETS[self.size].get("vocab_size", VOCABULARY)
        return GPTConfig.preset(self.size, vocab_size=vocabulary, block_size=self.T)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation, by the formula in bench/timing/train.py; None where no peak is known."""
        peak = hardware.peak_flops(self.device) if self.dtype == "bfloat16" else None
        return peak and tokens_per_s * self.config.flops_per_token() / peak

    def model_ms(self) -> float | None:
        """The least time of a step that this GPU's data sheet allows; None for an unknown GPU and other dtypes."""
        gpu = hardware.gpu(self.device) if self.dtype == "bfloat16" else None
        return None if gpu is None else roofline.step_ms(self.config, self.B, self.T, gpu)

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = DTYPES[self.dtype]
        return contextlib.nullcontext() if dtype == FP32 else torch.autocast(self.device.type, dtype)

    def batch(self) -> tuple[Tensor, Tensor]:
        """-> (random tokens, the next token of each); the last token of a row has no target."""
        idx = torch.randint(self.config.vocab_size, (self.B, self.T), generator=torch.Generator().manual_seed(0))
        targets = torch.cat([idx[:, 1:], torch.full((self.B, 1), NO_TARGET)], dim=1)
        return idx.to(self.device), targets.to(self.device)


class Disagreement(ArithmeticError):
    """A variant's gradient differs from PyTorch's, so that no number may be printed."""


@dataclass(frozen=True)
class Prepared:
    """A variant that has run forward and backward once, so that it is compiled and checked."""

    variant: Variant
    family: Family
    label: str
    backward: Backward
    step: Callable[[], Tensor]
    first_s: float  # of that run, compilation included

    def peak_bytes(self, device: torch.device) -> int | None:
        """Peak memory of a step with this variant's parameters and optimizer state, without other variants' models."""
        peak, held = timing.peak_bytes(self.step, device), self.backward.held_bytes()
        return None if peak is None or held is None else peak + self.family.state_bytes() + held


@dataclass
class TrainBench:
    """Measures variants and adds rows to `results`."""

    results: Results
    variants: list[Variant]
    nanogpt: ModuleType | None

    def compare(self, setting: Setting) -> None:
        """Measures all variants at one setting, one row each. Variants of a stage take turns. Raises Disagreement.

        Compiling can take minutes: a run that is stopped keeps the rows of finished stages. In every stage our model
        with PyTorch's kernels runs too, launched from Python and on the stage's road, so that a speed-up always
        compares two variants that took turns.
        """
        weights = GPT(setting.config, kernels="torch")
        try:
            gradient = self._expected_gradient(setting, weights)
        except Exception as error:
            if not timing.out_of_memory(error):
                raise
            self.results.leave_out(setting.name, f"{NO_MEMORY} for PyTorch's gradient, with which all must agree")
            forget()
            return
        names = list(dict.fromkeys(v.family for v in self.variants))
        for group in [names] if _fit_together(setting, len(names)) else [[name] for name in names]:
            stages = variants.stages([v for v in self.variants if v.family in group])
            part = dataclasses.replace(setting, budget_s=setting.budget_s / len(stages))
            for stage in stages:
                self._measure(part, stage, group, weights, gradient)

    def sweep(self, setting: Setting) -> None:
        """Measures each variant alone at 1, 2, 4, ... sequences until memory runs out, one row each.

        Leaves out variants with single switches, and compiled and captured ones, which would have to be compiled or
        captured again for each batch size.
        """
        weights = GPT(setting.config, kernels="torch")
        for variant in self.variants:
            if variant.road != LAUNCHED or variant.one_switch:
                continue
            B, fits = 1, True
            while fits and B <= LARGEST_BATCH:
                at = dataclasses.replace(setting, B=B, budget_s=setting.budget_s / 10)
                fits = self._in_turns(at, [variant], [], weights, None)
                B *= 2

    def _measure(
        self, setting: Setting, wanted: list[Variant], group: list[str], weights: GPT, gradient: Tensor
    ) -> None:
        """Adds the rows of one stage, for variants of the families in `group`. Where memory is too small for all in
        turns, measures them in halves; a single variant finally without its baselines."""
        bases = [v for v in dict.fromkeys([Variant(OURS), *(v.base for v in wanted)]) if v not in wanted]
        bases = [v for v in bases if v.family in group]
        if len(wanted) == 1:
            fits = bool(bases) and self._in_turns(setting, wanted, bases, weights, gradient, say=False)
            if not fits:
                self._in_turns(setting, wanted, [], weights, gradient)
        elif not self._in_turns(setting, wanted, bases, weights, gradient, say=False):
            for half in (wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]):
                self._measure(setting, half, group, weights, gradient)

    def _in_turns(
        self,
        setting: Setting,
        wanted: list[Variant],
        bases: list[Variant],
        weights: GPT,
        gradient: Tensor | None,
        say: bool = True,
    ) -> bool:
        """Prepares, times and adds a row for each of `wanted`, taking turns with `bases`, which may have rows already.

        gradient: what all must agree with; None for one that is measured alone. -> False where memory ended, for which
        there are rows unless `say` is False, or where one alone failed.
        """
        alone = gradient is None
        try:
            families = {v.family: self._family(v.family, setting, weights) for v in (*bases, *wanted)}
            prepared = [
                p
                for v in (*bases, *wanted)
                if (p := self._prepare(setting, families[v.family], v, gradient)) is not None
            ]
            timed = [p for p in prepared if p.variant in wanted]
            if timed:
                self._time(setting, prepared, timed, alone)
            return bool(timed) or not alone
        except Exception as error:  # a compiler's and a driver's errors share no class
            if not timing.out_of_memory(error):
                raise
        finally:
            families, prepared, timed = {}, [], []  # timing trains a model: the next stage begins with new ones
            forget()
        if say:
            for variant in wanted:
                self._add_row(setting, self._label(setting, variant, weights), variant, what=NO_MEMORY, alone=alone)
        return False

    def _expected_gradient(self, setting: Setting, weights: GPT) -> Tensor:
        reference = self._family(OURS, setting, weights)
        return reference.gradient(reference.backward(Variant(OURS), *setting.batch(), setting.autocast))

    def _family(self, name: str, setting: Setting, weights: GPT) -> Family:
        return Family(name, setting.config, weights, self.nanogpt, setting.device)

    def _label(self, setting: Setting, variant: Variant, weights: GPT) -> str:
        """Where the device has no memory for the model that says it."""
        return Family(variant.family, setting.config, weights, self.nanogpt, torch.device("cpu")).label(variant)

    def _prepare(self, setting: Setting, family: Family, variant: Variant, gradient: Tensor | None) -> Prepared | None:
        """Runs a variant once. None where it fails, which is then in the results. Raises what says that memory ended.

        gradient: what its own must agree with.
        """
        label = family.label(variant)
        backward = family.backward(variant, *setting.batch(), setting.autocast)
        start = time.perf_counter()
        try:
            own = family.gradient(backward)
        except Exception as error:  # a compiler's and a driver's errors share no class
            if timing.out_of_memory(error):
                raise
            family.optimizer.zero_grad(set_to_none=True)
            self._leave_out(f"{setting.name} {label}", f"failed: {first_line(error)}")
            return None
        first_s = time.perf_counter() - start
        if gradient is not None:
            print(f"  {label}: {first_s:.1f} s for the first step", flush=True)
            difference = ((own - gradient).square().mean().sqrt() / gradient.square().mean().sqrt()).item()
            if not difference <= AGREEMENT[setting.dtype]:
                raise Disagreement(
                    f"{label} at {setting.name}: its gradient is {difference:.2%} off PyTorch's, allowed are "
                    f"{AGREEMENT[setting.dtype]:.0%}; nothing is reported"
                )
        return Prepared(variant, family, label, backward, family.step(backward), first_s)

    def _time(self, setting: Setting, prepared: list[Prepared], wanted: list[Prepared], alone: bool) -> None:
        """All in turns; a row for each of `wanted`. Raises what says that memory ended."""
        peaks: dict[str, int | None] = {}
        for p in prepared:
            p.step()  # makes the optimizer's state
            peaks[p.label] = p.peak_bytes(setting.device)
        steps = {p.label: p.step for p in prepared}
        print(f"  timing {len(steps)} variants in turns, for {setting.budget_s:.0f} s or three rounds", flush=True)
        times = timing.measure(steps, setting.device, budget_s=setting.budget_s, warmup=1, min_rounds=3)
        labels = {p.variant: p.label for p in prepared}

        def over(variant: Variant, taken: Timing) -> dict | None:
            base = labels.get(variant)
            return None if alone or base is None else dict(over=base, **timing.speedup(times[base], taken).as_dict())

        for p in wanted:
            taken = times[p.label]
            self._add_row(
                setting,
                p.label,
                p.variant,
                what=f"{WHAT}; " + ("alone" if alone else f"{len(prepared)} variants in turns"),
                alone=alone,
                taken=taken,
                peak_bytes=peaks[p.label],
                speedup=over(p.variant.base, taken),
                speedup_over_launched=over(Variant(OURS), taken),
                first_s=round(p.first_s, 2),
            )

    def _leave_out(self, name: str, why: str) -> None:
        """Once: what fails as a base of several stages fails in each."""
        if dict(name=name, why=why) not in self.results.left_out:
            self.results.leave_out(name, why)

    def _add_row(
        self,
        setting: Setting,
        label: str,
        variant: Variant,
        what: str,
        alone: bool,
        taken: Timing | None = None,
        peak_bytes: int | None = None,
        speedup: dict | None = None,
        speedup_over_launched: dict | None = None,
        first_s: float | None = None,
    ) -> None:
        per_s = taken.per_second(setting.B * setting.T) if taken is not None else None
        self.results.add(
            f"{setting.name} {label}" + " alone" * alone,
            what=what,
            time_ms=taken.as_dict() if taken else None,
            label=label,
            size=setting.size,
            batch=setting.B,
            block=setting.T,
            dtype=setting.dtype,
            alone=alone,
            compiled=variant.mode is not None,
            cuda_graph=variant.road == GRAPH,
            road=variant.road,
            kernels=dataclasses.asdict(variant.kernels) if variant.family == OURS else None,
            tokens_per_s=per_s,
            model_ms=setting.model_ms(),
            mfu=setting.mfu(per_s["median"]) if per_s else None,
            peak_bytes=peak_bytes,
            speedup=speedup,
            speedup_over_launched=speedup_over_launched,
            first_s=first_s,
        )


def _fit_together(setting: Setting, families: int) -> bool:
    """Whether all models with their gradients and optimizers leave room for a step."""
    if setting.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setting.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return families * 16 * setting.config.num_params() < SHARE_FOR_STATE * memory


def forget() -> None:
    """Frees models and compiled code that nothing refers to."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
