"""`fastgpt2 verify --model NAME --weights int8`: what weights of 8 bits change in a model's logits and its loss.

Rounded weights are no kernel that the rule of error_rule.py could hold: they compute another model. So their error is
stated beside the errors that float32 and bfloat16 make with the same text, and what it does to the perplexity.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.bench.report.tables import print_whole
from fastgpt2.bench.verify.error_rule import root_mean_square, token_losses
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.output import plain_console
from fastgpt2.gpt2.packed import quantize_int8

TOKENS = 512  # of --batch: nothing is interpreted here


class WeightErrors(NamedTuple):
    """Against the float64 model with the weights as they were read.

    error: of the logits, their root mean square relative to that of the true ones. loss: nats a token. same: share of
    positions where the likeliest next token is the true one.
    """

    name: str
    error: float
    loss: float
    same: float


@torch.no_grad()
def weight_errors(model: GPT, idx: Tensor) -> Iterator[WeightErrors]:
    """Of float64, float32, bfloat16 and 8 bits. model: on a CPU. idx: (B, T + 1) int64."""
    x, targets = idx[:, :-1], idx[:, 1:]
    truth: Tensor | None = None
    roads: dict[str, Callable[[], GPT]] = {
        "float64": lambda: copy.deepcopy(model).double(),
        "float32": lambda: copy.deepcopy(model).float(),
        "bfloat16": lambda: copy.deepcopy(model).bfloat16(),
        "int8": lambda: quantize_int8(copy.deepcopy(model).float()),
    }
    for name, make in roads.items():
        logits = make().eval()(x, targets)[0]
        assert logits is not None
        truth = logits if truth is None else truth
        error = root_mean_square(logits.double() - truth) / root_mean_square(truth)
        same = (logits.argmax(-1) == truth.argmax(-1)).double().mean().item()
        yield WeightErrors(name, error, token_losses(logits, targets).double().mean().item(), same)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def show(found: list[WeightErrors]) -> None:
    """Prints the table and, last, the error of 8 bits in a sentence."""
    from rich.table import Table

    console = plain_console()
    table = Table("computed in", box=None)
    for title in ("error of the logits", "loss", "perplexity", "same next token"):
        table.add_column(title, justify="right")
    for row in found:
        table.add_row(row.name, f"{row.error:.1e}", f"{row.loss:.5f}", f"{perplexity(row.loss):.3f}", f"{row.same:.1%}")
    print_whole(console, table)
    by_name = {row.name: row for row in found}
    eight, eager, exact = by_name["int8"], by_name["bfloat16"], by_name["float64"]
    console.print(
        f"\nWeights of 8 bits change the logits by {eight.error:.1e} of their size, {eight.error / eager.error:.2f} "
        f"times eager bfloat16's error, and the perplexity by {perplexity(eight.loss - exact.loss) - 1:+.2%}.",
        highlight=False,
    )
