"""Made-up results of an invented GPU, with a row of every sort: what reports and plots are tested on."""

import torch

from fastgpt2.bench.cases import variants
from fastgpt2.bench.report.record import Results
from fastgpt2.gpt2.ops import Kernels

MACHINE = dict(
    device="cuda", name="Invented GPU", gpu="Invented GPU", gpu_bytes=80 << 30, driver="1.2.3", power_limit_w=400.0,
    cuda="99.0", rocm=None, multiprocessors=100, cpu="Invented CPU", cores=8, threads=8, load=6.5,
    system="Linux x86_64",
    python="3.11.0", versions={"torch": "9.9.9", "triton": "9.9.8"},
)  # fmt: skip


def ms(median: float) -> dict:
    return dict(p20=0.97 * median, median=median, p80=1.04 * median, runs=20)


def begin(kind: str, **settings) -> Results:
    results = Results.begin(kind, torch.device("cpu"), settings)
    results.machine = MACHINE
    return results


def train_results() -> Results:
    """As `bench train` writes them now."""
    results = begin("train", MFU="a formula")
    ours = [v for v in variants.all_variants(False) if v.family == variants.OURS]
    steps = {v: 100.0 / (1 + 0.05 * i) for i, v in enumerate(ours)}
    for i, v in enumerate(ours):
        label, base = variants.label(v.kernels, v.road, v.naive_attention), variants.label(v.base.kernels, v.road)
        alone = (1, 2, 4) if v.road == variants.LAUNCHED and not v.one_switch else ()
        for batch, by_itself in ((16, False), *((b, True) for b in alone)):
            time, ratio = steps[v] * batch / 16, steps[v.base] / steps[v]
            per_s = {"p20": 15e6 / time, "median": 16e6 / time, "p80": 17e6 / time}
            results.add(
                f"gpt2 B={batch} T=1024 bfloat16 {label}" + " alone" * by_itself,
                what="a step", time_ms=ms(time), label=label, size="gpt2", batch=batch, block=1024, dtype="bfloat16",
                alone=by_itself, compiled=v.mode is not None, cuda_graph=v.road == variants.GRAPH, road=v.road,
                kernels={n: getattr(v.kernels, n) for n in Kernels.names()},
                tokens_per_s=per_s, mfu=0.4, model_ms=40.0, peak_bytes=(i + 3 * batch) << 29,
                speedup=None if by_itself else dict(over=base, p20=0.97 * ratio, median=ratio, p80=1.02 * ratio),
                speedup_over_launched=None,
            )  # fmt: skip
    results.add(
        "gpt2 B=16 T=1024 bfloat16 HuggingFace, sdpa", what="out of memory", time_ms=None, label="HuggingFace, sdpa",
        size="gpt2", batch=16, block=1024, dtype="bfloat16", alone=False, compiled=False, road="launched",
        kernels=None, tokens_per_s=None, model_ms=40.0, mfu=None, peak_bytes=None, speedup=None,
    )  # fmt: skip
    results.leave_out("nanoGPT", "no path <given>")
    return results


def ops_results() -> Results:
    results = begin("ops", copy_bytes_per_s=3e12, matmul_flops_per_s=6e14, dtype="bfloat16")
    for op, flops, cost in (("gelu", 0, 1.0), ("causal_attention", 10**9, 5.0), ("decode_attention", 10**7, 0.5)):
        for direction in ("forward",) if op == "decode_attention" else ("forward", "backward", "both"):
            for T in (256, 1024, 4096):
                for i, label in enumerate(("PyTorch", "torch.compile", "Triton", "flash-attn")):
                    time = cost * T / 1024 * (2 - 0.3 * i) * (3 if direction == "both" else 1)
                    results.add(
                        f"{op}[{T}x768-bfloat16] {direction} {label}",
                        what=op, time_ms=ms(time), label=label, op=op, T=T, C=768, direction=direction,
                        minimum_bytes=T * 10**6, flops=flops * T or None, gb_per_s=T * 1e-3 / time * 1e3,
                        tflop_per_s=flops * T / time * 1e-9 or None, fraction=0.5, fraction_of="copy", model_ms=0.1,
                        peak_bytes=T << 12, speedup=dict(over="PyTorch", p20=1.0, median=1.0, p80=1.0),
                    )  # fmt: skip
    return results


def generate_results() -> Results:
    results = begin("generate", copy_bytes_per_s=3e12)
    for batch in (1, 8):
        for label, token in (("Triton, cache, CUDA graph", 0.5), ("HuggingFace, cache", 4.0)):
            per_s = dict(p20=900 * batch / token, median=1000 * batch / token, p80=1030 * batch / token)
            results.add(
                f"gpt2 B={batch} T=32 new=64 bfloat16 {label}",
                what="64 tokens after 32", time_ms=ms(64 * token), label=label, size="gpt2", dtype="bfloat16",
                batch=batch, prompt=32, new=64, first_ms=ms(token), token_ms=token, tokens_per_s=per_s, gb_per_s=500.0,
                fraction=0.2, times_ideal=5.0, speedup=dict(over="HuggingFace, cache", p20=1.0, median=1.0, p80=1.0),
            )  # fmt: skip
    return results


def race_results() -> Results:
    results = begin("race", text="some text")
    for label, per_s in (("fastgpt2, Triton + CUDA graph", 3e4), ("nanoGPT, SDPA + compile", 2e4)):
        points = [(10.0 * i, int(i * per_s / 160), 4.0 - 1e-5 * i * per_s) for i in range(11)]
        results.add(
            f"gpt2 B=16 T=1024 bfloat16 {label}", what="steps", time_ms=ms(16384e3 / per_s), label=label, size="gpt2",
            batch=16, block=1024, dtype="bfloat16", road="graph", seconds=100.0, steps=points[-1][1], first_s=2.5,
            tokens_per_s=dict(p20=0.97 * per_s, median=per_s, p80=1.03 * per_s), training=points[1:], held_out=points,
            held_out_loss=points[-1][2], common_loss_s=66.7,
        )  # fmt: skip
    return results


def other_results() -> Results:
    """Of a kind that has no table of its own."""
    results = begin("other")
    for batch in (1, 8):
        results.add(f"B={batch}", what="something", time_ms=ms(80.0), per_s=123.456 * batch)
    return results
