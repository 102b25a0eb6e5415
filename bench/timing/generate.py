"""`fastgpt2 bench generate`: how fast text is written, ours beside HuggingFace's `generate` and whole passes a token.

All variants have the same weights and go on from the same prompts, greedily. Before anything is timed, in float32 all
must write the same tokens, but for one row in ten, where rounding may decide between two tokens; whatever dtypes are
timed, this is checked. Then they take turns, and a speed-up is the median of the ratio within a round.

The time to the first token is that of a call that writes one; a token's is that of the others.
A token costs at least the reading of all weights, but for the position table, and of the cache: bytes a second are
these over the time of a token, and the share is of the copy speed that was measured here. "x ideal" is how many times
longer a token takes than reading only the weights at that speed.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from fastgpt2.bench.cases import variants
from fastgpt2.bench.report import tables
from fastgpt2.bench.report.record import Results, summary_line
from fastgpt2.bench.timing import peaks, timing
from fastgpt2.bench.timing.options import DeviceOption, NanogptOption, OutOption
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2.config import PRESETS, GPTConfig
from fastgpt2.gpt2.generation.generate import generate
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.options import Name, Names, about
from fastgpt2.gpt2.training.train_config import find_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "HuggingFace, cache"
WHOLE_PASSES = ", whole passes"
NANOGPT = "nanoGPT" + WHOLE_PASSES
WHOLE_PASSES_S = 20.0  # left out where a text would take longer by them
FIRST = ", first token"
Write = Callable[[int], Tensor]


@dataclass(frozen=True)
class Setting:
    size: str
    dtype: str
    B: int
    T: int
    new: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.size} B={self.B} T={self.T} new={self.new} {self.dtype}"

    @property
    def config(self) -> GPTConfig:
        return GPTConfig.preset(self.size)

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    def weight_bytes(self) -> int:
        return self.config.num_params(non_embedding=True) * self.element_bytes

    def token_bytes(self) -> float:
        """What writing one token in every row reads: weights, and a cache that is on average half grown."""
        cached = self.config.kv_cache_bytes(self.B, self.T, self.element_bytes)
        grown = self.config.kv_cache_bytes(self.B, self.T + self.new, self.element_bytes)
        return self.weight_bytes() + (cached + grown) / 2


class Disagreement(Exception):
    """Two variants wrote different tokens."""


def writers(setting: Setting, quick: bool, nanogpt, results: Results) -> dict[str, Write]:
    """Label -> a function that writes so many tokens after the prompts and returns the ids (B, T + n)."""
    torch.manual_seed(0)
    config, device, dtype = setting.config, setting.device, DTYPES[setting.dtype]
    model = GPT(config).to(device, dtype).eval()
    idx = torch.randint(config.vocab_size, (setting.B, setting.T), device=device)
    ours = variants.label(model.kernels) + ", cache"
    graph = ", CUDA graph" * (device.type == "cuda")
    found: dict[str, Write] = {ours + graph: lambda n: generate(model, idx, n, greedy=True)}
    if graph:
        found[ours] = lambda n: generate(model, idx, n, greedy=True, cuda_graph=False)
    if not quick:
        found[f"{ours} + compile{graph}"] = lambda n: generate(model, idx, n, greedy=True, compile=True)
    found[BASELINE] = _huggingface(model, idx)
    longest = torch.randint(config.vocab_size, (setting.B, setting.T + setting.new), device=device)
    (one_pass,) = timing.measure(
        {"one pass": lambda: _whole_passes(model, longest, 1)}, device, budget_s=0, warmup=1, min_rounds=1
    ).values()
    if (seconds := one_pass.median_ms * 1e-3 * setting.new) > WHOLE_PASSES_S:
        results.leave_out(f"{setting.name} whole passes", f"a text would take up to {seconds:.0f} s by them")
        return found
    found[variants.label(model.kernels) + WHOLE_PASSES] = lambda n: _whole_passes(model, idx, n)
    if nanogpt is not None:
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        settings = {name: getattr(config, name) for name in names}
        theirs = nanogpt.GPT(nanogpt.GPTConfig(**settings)).to(device, dtype).eval()
        found[NANOGPT] = lambda n: theirs.generate(idx, n, top_k=1)
    return found


def _huggingface(model: GPT, idx: Tensor) -> Write:
    hf = model.to_huggingface().eval()
    hf.generation_config.eos_token_id = None  # so that it writes as many tokens as the others
    mask = torch.ones_like(idx)

    def write(n: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hf.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)

    return write


@torch.no_grad()
def _whole_passes(model: GPT, idx: Tensor, n: int) -> Tensor:
    """As nanoGPT's `generate`: every token from a pass over all that is there."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


def write_once(found: dict[str, Write], setting: Setting, results: Results) -> dict[str, Tensor]:
    """What every variant writes; one that cannot is taken out of `found` and noted."""
    written = {}
    for label, write in list(found.items()):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="the decode step was not captured")
                written[label] = write(setting.new)
        except Exception as error:  # compilers and drivers share no class
            if label == BASELINE:
                raise
            del found[label]
            why = "out of memory" if timing.out_of_memory(error) else (str(error).splitlines() or [repr(error)])[0]
            results.leave_out(f"{setting.name} {label}", why)
    return written


def agree(written: dict[str, Tensor], setting: Setting) -> None:
    """Raises Disagreement where two variants with our weights wrote different tokens in float32."""
    expected = written[BASELINE]
    for label, ids in written.items():
        other_rows = int((ids != expected).any(dim=1).sum())
        if label != NANOGPT and setting.dtype == "float32" and other_rows > setting.B // 10:
            raise Disagreement(f"{setting.name}: {label!r} wrote other tokens than {BASELINE!r}")


def compare(setting: Setting, quick: bool, nanogpt, budget_s: float, copy_speed: float, results: Results) -> None:
    """Adds a row for every variant."""
    found = writers(setting, quick, nanogpt, results)
    agree(write_once(found, setting, results), setting)
    calls: dict[str, Callable[[], object]] = {}
    for label, write in found.items():
        calls[label] = partial(write, setting.new)
        calls[label + FIRST] = partial(write, 1)
    times = timing.measure(calls, setting.device, budget_s=budget_s, warmup=1, min_rounds=3)
    baseline = times[BASELINE]
    for label in found:
        first, whole = times[label + FIRST], times[label]
        token_ms = (whole.median_ms - first.median_ms) / (setting.new - 1)
        cached = not label.endswith("whole passes") and token_ms > 0
        bytes_per_s = setting.token_bytes() / (token_ms * 1e-3) if cached else None
        tokens = setting.B * setting.new * 1e3
        results.add(
            f"{setting.name} {label}",
            what=f"{setting.new} tokens after {setting.T}, in each of {setting.B} rows",
            time_ms=whole.as_dict(),
            label=label,
            size=setting.size,
            dtype=setting.dtype,
            batch=setting.B,
            prompt=setting.T,
            new=setting.new,
            first_ms=first.spread.as_dict(),
            token_ms=token_ms,
            tokens_per_s=timing.Spread.of([tokens / t for t in whole.times_ms]).as_dict(),
            gb_per_s=bytes_per_s and bytes_per_s / 1e9,
            fraction=bytes_per_s and bytes_per_s / copy_speed,
            times_ideal=token_ms * 1e-3 / (setting.weight_bytes() / copy_speed),
            speedup=dict(over=BASELINE, **timing.speedup(baseline, whole).as_dict()),
        )


HELP = "time to the first token, tokens and bytes a second of writing text"


@dataclass(frozen=True, kw_only=True)
class Options(OutOption, DeviceOption, NanogptOption):
    """Times ours beside HuggingFace's generate and whole passes for each token, greedily and in turns. `fastgpt2
    verify` runs first; where it finds an error, no numbers are printed.
    """

    quick: bool = False  # one row, float32 on a CPU, without torch.compile
    size: Annotated[Name, about(f"of the model, from {', '.join(PRESETS)}")] = "gpt2"
    batch: Names | None = None  # comma-separated numbers of rows; None: 1,8,32, and 1 with --quick
    prompt: int = 32  # tokens of a prompt
    new: int = 64  # tokens that are written
    dtype: Annotated[
        Names | None, about(f"of the weights, comma-separated, from {', '.join(DTYPES)}; None: by the device")
    ] = None
    seconds: float = 30.0  # about how long one setting is timed


def main(options: Options) -> int:
    """Prints the card and writes the file; returns 1 and prints no number where something computed is wrong."""
    device = find_device(options.device)
    settings = list(_settings(options, device))
    nanogpt = variants.nanogpt_module(options.nanogpt) if options.nanogpt else None
    if not gate.verified(device):
        return 1
    copy_speed = peaks.copy_bytes_per_s(device)
    results = Results.begin("generate", device, {"copy_bytes_per_s": copy_speed})
    if nanogpt is None:
        results.leave_out(NANOGPT, "--nanogpt PATH/model.py was not given")
    if options.quick:
        results.leave_out("ours + compile", "--quick leaves it out")
    with results.kept_if_cut_short(options.out):
        try:
            if all(setting.dtype != "float32" for setting in settings):
                exact = dataclasses.replace(settings[0], dtype="float32")
                found = writers(exact, options.quick, nanogpt, results)
                agree(write_once(found, exact, results), exact)
                del found
            for setting in settings:
                print(f"measuring {setting.name}", flush=True)
                compare(setting, options.quick, nanogpt, options.seconds, copy_speed, results)
        except Disagreement as error:
            print(f"red: {error}", file=sys.stderr)
            return 1
    tables.show(results)
    file = results.save(options.out)
    print(summary_line(results, file, {"tokens_per_s": {r["name"]: r["tokens_per_s"]["median"] for r in results.rows}}))
    return 0


def _settings(options: Options, device: torch.device) -> Iterator[Setting]:
    """Raises ValueError for an option that is not allowed."""
    usual = "1" if options.quick else "1,8,32"
    batches = [int(b) if b.isdigit() else 0 for b in (options.batch or usual).split(",")]
    fast = ("bfloat16",) if device.type == "cuda" else ("float32",) if options.quick else ("float32", "bfloat16")
    dtypes = options.dtype.split(",") if options.dtype else fast
    if options.size not in PRESETS:
        raise ValueError(f"--size is {options.size!r}, allowed are {', '.join(PRESETS)}")
    S = GPTConfig.preset(options.size).block_size
    if min(batches) < 1:
        raise ValueError(f"--batch is {options.batch!r}, expected numbers of rows such as 1,8,32")
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"--dtype is {unknown[0]!r}, allowed are {', '.join(DTYPES)}")
    if options.prompt < 1 or options.new < 2 or options.prompt + options.new > S:
        raise ValueError(
            f"--prompt is {options.prompt} and --new {options.new}, allowed are at least 1 and 2, together {S} tokens"
        )
    if options.seconds <= 0:
        raise ValueError(f"--seconds is {options.seconds}, allowed are numbers above 0")
    for dtype in dtypes:
        for B in batches:
            yield Setting(options.size, dtype, B, options.prompt, options.new, device)
