"""`fastgpt2 verify`: every kernel, and the model by every toggle, against float64, eager PyTorch and HuggingFace.

The kernels are those described in bench/cases/ops/; with --model the ops are those of its layers, on what reaches them
there: see layer_errors.py. The rule is in error_rule.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.registry import sized_cases
from fastgpt2.bench.report.tables import print_whole
from fastgpt2.bench.verify import weight_errors
from fastgpt2.bench.verify.batch import IDS, read_batch
from fastgpt2.bench.verify.error_rule import RULE, Row, compare, mean_size, root_mean_square, token_losses, worst
from fastgpt2.bench.verify.kernel_errors import errors_of_case
from fastgpt2.bench.verify.layer_errors import call_errors, layer_table, recorded_calls, worst_layers
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.generation.sample import load_checkpoint
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels
from fastgpt2.gpt2.options import Checkpoint, CommandOptions, File, Name, about
from fastgpt2.gpt2.output import plain_console
from fastgpt2.gpt2.switches import FURTHER_VALUES
from fastgpt2.gpt2.training.train_config import find_device

TOKENS = {"cuda": 2048, "cpu": 16}  # of --batch; interpreted kernels take seconds a token in a large vocabulary
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
    names = (*Kernels.names(), *(f"{op}={value}" for op, values in FURTHER_VALUES.items() for value in values))
    toggles = {name: Kernels.parse(name) for name in names} | {"all": Kernels.all("triton")}
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
        yield worst(rows[2:])  # of all gradients


def _huggingface_results(model: GPT, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    hf = model.to_huggingface().train()
    logits = hf(x).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten())
    loss.backward()
    results = {"logits": logits.detach(), "loss": loss.detach()}
    own = dict(model.named_parameters())
    for name, p in hf.named_parameters():
        assert p.grad is not None
        gradient = p.grad.t() if _is_conv1d(name) else p.grad
        if gradient.size(0) < own[name].size(0):  # a padded token table, which HuggingFace's model does not have
            gradient = F.pad(gradient, (0, 0, 0, own[name].size(0) - gradient.size(0)))
        results[f"d {name}"] = gradient
    return results


def _is_conv1d(name: str) -> bool:
    """HuggingFace keeps these weights as (in, out)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


# ------------------------------------------------------------------------------------------------------- command


def verify(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """All comparisons on one device: small sizes where kernels are interpreted, GPT-2's on a GPU."""
    with_hf = _has_transformers()
    on_gpu = device.type == "cuda"
    B, T, C, H, V = (2, 1000, 768, 12, 50257) if on_gpu else (2, 37, 64, 1, 97)
    for dtype in dtypes:
        for case in sized_cases(T, C, dtype, tokens=B * T, V=V):
            yield from errors_of_case(case, device, with_hf)
    layers = 12 if on_gpu else 2
    model = random_model(GPTConfig(block_size=T, vocab_size=V, n_layer=layers, n_head=H, n_embd=C), device)
    idx = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(2)).to(device)
    for dtype in dtypes:
        yield from verify_model(model, idx, dtype, with_hf)


def verify_own(model: GPT, idx: Tensor, dtypes: Sequence[torch.dtype]) -> tuple[list[Row], list[Row]]:
    """Of the ops in each layer of a model, and of the whole model. idx (B, T + 1), on the model's device."""
    layers: list[Row] = []
    for call in recorded_calls(model, idx[:, :-1], idx[:, 1:]):
        for dtype in dtypes:
            layers += call_errors(call, dtype)
    with_hf, model = _has_transformers(), model.double()
    return layers, [row for dtype in dtypes for row in verify_model(model, idx, dtype, with_hf)]


def _has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def show(rows: Sequence[Row], layers: Sequence[Row] = ()) -> None:
    """Prints the table and, last, the verdict. layers: those of a model's ops, of which the worst layers are shown."""
    from rich.table import Table

    console = plain_console()
    if layers:
        print_whole(console, layer_table(layers))
        console.print()
    where = ("layer",) if layers else ()
    table = Table("what", *where, "on triton", "result", "dtype", box=None)
    for title in ("error vs fp64", "eager vs fp64", "allowed", "error vs HF", "ratio to eager"):
        table.add_column(title, justify="right")
    for column in table.columns:
        column.no_wrap = True
    for row in (*worst_layers(layers), *rows):
        to_hf = "-" if row.to_hf is None else f"{row.to_hf:.1e}"
        ratio = f"{row.ratio:.2f}" if row.ok else f"[bold red]above: {row.ratio:.2f}[/]"
        ratio = f"at rounding, {ratio}" if row.at_rounding else ratio
        figures = (f"{row.error:.1e}", f"{row.eager_error:.1e}", f"{row.allowed:.1e}", to_hf, ratio)
        place = (row.place,) if layers else ()
        table.add_row(row.subject, *place, row.toggle, row.result, row.dtype, *figures)
    print_whole(console, table)
    rows = [*layers, *rows]
    bad = [row for row in rows if not row.ok]
    verdict = f"[bold red]{len(bad)} of {len(rows)} above it[/]" if bad else f"all {len(rows)} within"
    ratios = [row.ratio for row in rows if not row.at_rounding]
    largest = (
        f"; worst ratio to eager's error {max(ratios):.2f}, at rounding {len(rows) - len(ratios)}" if ratios else ""
    )
    console.print(f"\nErrors against float64, {RULE}: {verdict}{largest}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compares every kernel with eager PyTorch, float64 and HuggingFace; with --model the ops in each of its layers, on
    the activations that reach them from the batch, and the whole model; with --weights what rounded weights change
    instead. Exits with 1 if an error against float64 breaks the rule
    error <= max(2 * eager's error, eps / 2) + 1e-5, relative to the size of the float64 result. Sizes are largest
    magnitudes, for the whole model root mean squares, and eps is that of the result's dtype. For a loss, eager's error
    is at least the mean over its tokens. The ratio shown is error / eager's error; 'at rounding' marks where eager's
    error is below eps / 2 + 1e-5.
    """

    device: Name = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU where there is one
    # Triton's interpreter has no bfloat16, so on the CPU all means float16 and float32
    dtype: Literal["bfloat16", "float16", "float32", "all"] = "all"
    model: Checkpoint | None = None  # weights to compare: a run's folder, a checkpoint, or gpt2, ...; None: random ones
    # for --model: text, or .npy or .pt with token ids (B, T); None: the sources of Python's library
    batch: File | None = None
    tokens: Annotated[
        int | None,
        about(
            f"at most so many tokens of --batch; None: {TOKENS['cuda']:,}, on a CPU {TOKENS['cpu']}, "
            f"with --weights {weight_errors.TOKENS}"
        ),
    ] = None
    # for --model, on a CPU: state what weights of 8 bits change in the logits and the loss, and compare nothing else
    weights: Literal["int8"] | None = None


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when every error is within the rule, else 1."""
    args = parse(Options, argv, "fastgpt2 verify")
    for name in ("batch", "tokens", "weights"):
        if args.model is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} is {getattr(args, name)}, which is for --model, and no --model is given")
    if args.weights is not None:
        return _weights(args)
    device = find_device(args.device)
    if device.type != "cuda" and args.dtype == "bfloat16":
        raise ValueError("--dtype is bfloat16, which Triton's interpreter does not have: allowed are float16, float32")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when kernels are decorated, which has happened in this process.
        command = [sys.executable, "-m", "fastgpt2.gpt2", "verify", *argv]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    names = list(DTYPES) if args.dtype == "all" else [args.dtype]
    if device.type != "cuda":
        print("No GPU: the kernels run in Triton's interpreter, on small shapes.")
        names = [name for name in names if name != "bfloat16"]
    dtypes = [DTYPES[name] for name in names]
    layers: list[Row] = []
    from fastgpt2.bench.cases.interpreter import quickened  # needs Triton, which find_device and --help do not

    with quickened():
        if args.model is None:
            rows = list(verify(device, dtypes))
        else:
            model, idx = _own(
                args.model, args.batch, TOKENS[device.type] if args.tokens is None else args.tokens, device
            )
            print(f"{args.model}: {model.config.n_layer} layers, {idx.size(0)} x {idx.size(1) - 1} tokens")
            layers, rows = verify_own(model, idx, dtypes)
    show(rows, layers)
    return 0 if all(row.ok for row in (*layers, *rows)) else 1


def _weights(args: Options) -> int:
    """`--weights int8`, on a CPU. It states errors and holds them to nothing: the status is 0."""
    assert args.model is not None
    if args.dtype != "all":
        raise ValueError(f"--dtype is {args.dtype}, and --weights compares with all: leave it out")
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device is {args.device}, and --weights {args.weights} is for a CPU: allowed are auto, cpu")
    tokens = weight_errors.TOKENS if args.tokens is None else args.tokens
    model, idx = _own(args.model, args.batch, tokens, torch.device("cpu"))
    print(f"{args.model}: {model.config.n_layer} layers, {idx.size(0)} x {idx.size(1) - 1} tokens")
    weight_errors.show(list(weight_errors.weight_errors(model, idx)))
    return 0


def _own(name: str, batch: str | None, tokens: int, device: torch.device) -> tuple[GPT, Tensor]:
    """The model of --model, and (B, T + 1) token ids for it."""
    if batch is not None and Path(batch).suffix in IDS:  # needs no tokenizer
        model, tokenizer = GPT.from_pretrained(name), None
    else:
        model, tokenizer = load_checkpoint(name)
    return model.to(device), read_batch(batch, tokenizer, model.config, tokens).to(device)
