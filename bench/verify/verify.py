"""`fastgpt2 verify`: every kernel, and the model by every toggle, against float64, eager PyTorch and HuggingFace.

The kernels are those described in bench/cases/ops/. The rule is in error_rule.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.registry import sized_cases
from fastgpt2.bench.report.tables import print_whole
from fastgpt2.bench.verify.error_rule import LIMIT, Row, compare, mean_size, root_mean_square, token_losses
from fastgpt2.bench.verify.kernel_errors import errors_of_case
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels
from fastgpt2.gpt2.options import CommandOptions, Name, Source
from fastgpt2.gpt2.output import plain_console
from fastgpt2.gpt2.training.train_config import find_device

RULE = f"at most {LIMIT:g} times eager PyTorch's (or half a unit in the last place) and 1e-5"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# --------------------------------------------------------------------------------------------------------- model


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    """A float64 model whose weights, biases and LayerNorms all matter, so that a dropped one shows."""
    torch.manual_seed(0)
    model = GPT(config, kernels="torch")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "wte" not in name and "wpe" not in name:
                p.normal_(std=p.size(1) ** -0.5)
            else:
                p.normal_(mean=float("ln_" in name and name.endswith("weight")), std=0.1)
    return model.double().to(device)


def verify_model(model: GPT, idx: Tensor, dtype: torch.dtype, with_hf: bool) -> Iterator[Row]:
    """Logits, loss and the gradient of every parameter, by each toggle alone and by all together, in one dtype.

    model: float64; it is left as it was. idx: (B, T + 1).
    """
    x, targets = idx[:, :-1], idx[:, 1:]
    rounded = copy.deepcopy(model).to(dtype)  # the truth is the float64 model of the rounded weights

    def results(m: GPT, kernels: Kernels) -> dict[str, Tensor]:
        m.zero_grad()
        with m.use_kernels(kernels):
            m.eval()  # with logits
            logits, loss = m(x, targets)
            assert logits is not None and loss is not None
            losses = token_losses(logits.detach(), targets)
            m.train()  # the step that training takes
            m(x, targets)[1].backward()
        grads = {f"d {n}": p.grad.detach().clone() for n, p in m.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), "loss": loss.detach(), "losses": losses, **grads}

    truth = results(copy.deepcopy(rounded).double(), ALL_TORCH)
    eager = results(rounded, ALL_TORCH)
    losses = truth.pop("losses")
    expected = mean_size(eager["losses"] - losses) / mean_size(losses)
    hf = _huggingface_results(rounded, x, targets) if with_hf else {}
    toggles = {name: Kernels.parse(name) for name in Kernels.names()} | {"all": Kernels.all("triton")}
    for toggle, kernels in toggles.items():
        ours = results(rounded, kernels)
        rows = [
            compare(
                *("model", toggle, name.replace("transformer.", ""), ours[name], eager[name], hf.get(name), t),
                size=root_mean_square,
                expected=expected if name == "loss" else 0.0,
            )
            for name, t in truth.items()
        ]
        yield rows[0]
        yield rows[1]
        yield max(rows[2:], key=lambda row: row.error / row.allowed)  # the worst of all gradients


def _huggingface_results(model: GPT, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    hf = model.to_huggingface().train()
    logits = hf(x).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten())
    loss.backward()
    results = {"logits": logits.detach(), "loss": loss.detach()}
    for name, p in hf.named_parameters():
        assert p.grad is not None
        ours = dict(model.named_parameters())[name]
        results[f"d {name}"] = p.grad if p.shape == ours.shape and not _is_conv1d(name) else p.grad.t()
    return results


def _is_conv1d(name: str) -> bool:
    """HuggingFace keeps these weights as (in, out)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


# ------------------------------------------------------------------------------------------------------- command


def verify(device: torch.device, dtypes: Sequence[torch.dtype], model: GPT | None = None) -> Iterator[Row]:
    """All comparisons on one device: small sizes where kernels are interpreted, GPT-2's on a GPU.

    model: whose weights to compare; random ones by default.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        with_hf = False
    else:
        with_hf = True
    on_gpu = device.type == "cuda"
    B, T, C, H, V = (2, 1000, 768, 12, 50257) if on_gpu else (2, 37, 64, 1, 97)
    for dtype in dtypes:
        for case in sized_cases(T, C, dtype, tokens=B * T, V=V):
            yield from errors_of_case(case, device, with_hf)
    if model is None:
        layers = 12 if on_gpu else 2
        model = random_model(GPTConfig(block_size=T, vocab_size=V, n_layer=layers, n_head=H, n_embd=C), device)
    model = model.double().to(device)
    T = min(T, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(2)).to(device)
    for dtype in dtypes:
        yield from verify_model(model, idx, dtype, with_hf)


def show(rows: Sequence[Row]) -> None:
    """Prints the table and, last, the verdict."""
    from rich.table import Table

    table = Table("what", "on triton", "result", "dtype", box=None)
    for title in ("error vs fp64", "eager vs fp64", "allowed", "error vs HF", "ratio to eager"):
        table.add_column(title, justify="right")
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        to_hf = "-" if row.to_hf is None else f"{row.to_hf:.1e}"
        ratio = f"{row.ratio:.2f}" if row.ok else f"[bold red]{row.ratio:.2f}[/]"
        ratio = f"at rounding, {ratio}" if row.at_rounding else ratio
        figures = (f"{row.error:.1e}", f"{row.eager_error:.1e}", f"{row.allowed:.1e}", to_hf, ratio)
        table.add_row(row.subject, row.toggle, row.result, row.dtype, *figures)
    console = plain_console()
    print_whole(console, table)
    bad = [row for row in rows if not row.ok]
    verdict = f"[bold red]{len(bad)} of {len(rows)} above it[/]" if bad else f"all {len(rows)} within"
    ratios = [row.ratio for row in rows if not row.at_rounding]
    worst = f"; worst ratio to eager's error {max(ratios):.2f}, at rounding {len(rows) - len(ratios)}" if ratios else ""
    console.print(f"\nErrors against float64, {RULE}: {verdict}{worst}")


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares every kernel with eager PyTorch, float64 and HuggingFace. Exits with 1 where an error, relative to the
    size of the result, is above what is allowed: twice eager PyTorch's (or half a unit in the last place) and 1e-5. The
    ratio shown is error / eager's error; 'at rounding' marks where eager's error is below the other terms.
    """

    device: Name = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU where there is one
    # Triton's interpreter has no bfloat16, so on the CPU all means float16 and float32
    dtype: Literal["bfloat16", "float16", "float32", "all"] = "all"
    checkpoint: Source | None = None  # weights to compare, a hub name or a folder; None: random ones


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when every error is within the rule, else 1."""
    args = parse(Options, argv, "fastgpt2 verify")
    device = find_device(args.device)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when kernels are decorated, which has happened in this process.
        command = [sys.executable, "-m", "fastgpt2.gpt2", "verify", *argv]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    names = list(DTYPES) if args.dtype == "all" else [args.dtype]
    if device.type != "cuda":
        print("No GPU: the kernels run in Triton's interpreter, on small shapes.")
        names = [n for n in names if n != "bfloat16" or args.dtype == n]
    model = GPT.from_pretrained(args.checkpoint) if args.checkpoint else None
    rows = list(verify(device, [DTYPES[name] for name in names], model))
    show(rows)
    return 0 if all(row.ok for row in rows) else 1
