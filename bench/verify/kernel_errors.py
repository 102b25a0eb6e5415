"""Errors of one case of the registry against float64, compared with those of eager PyTorch and HuggingFace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.registry import huggingface, operations
from fastgpt2.bench.verify.error_rule import Row, compare, mean_size, token_losses


def errors_of_case(case: Case, device: torch.device, with_hf: bool) -> Iterator[Row]:
    """A row for each output and for the gradient of each floating-point input."""
    torch.manual_seed(0)
    inputs = case.inputs(device)

    def run(function: Callable, wide: bool = False) -> list[Tensor]:
        own = tuple(_copy(t, wide) for t in inputs)  # decoding writes into its cache
        outputs = case.forward(own, function)
        generator = torch.Generator().manual_seed(1)
        upstream = (torch.randn(o.shape, generator=generator).to(o.device, case.dtype).to(o.dtype) for o in outputs)
        return [*(o.detach() for o in outputs), *case.backward(own, outputs, tuple(upstream))]

    truth, eager, ours = run(case.reference, wide=True), run(case.eager), run(case.ours)
    hf = run(huggingface()[case.op]) if with_hf else [None] * len(truth)
    arguments = inspect.signature(operations()[case.op]).parameters
    gradients = [f"d {name}" for name, t in zip(arguments, inputs, strict=False) if t.requires_grad]
    outputs = len(truth) - len(gradients)
    names = [f"output {i}" if outputs > 1 else "output" for i in range(outputs)] + gradients
    expected = 0.0
    if case.op == "linear_cross_entropy":  # a mean of losses, in which errors may cancel
        exact, rounded = (_losses(*(_copy(t, wide) for t in inputs)) for wide in (True, False))
        expected = mean_size(rounded - exact) / mean_size(exact)
    for name, a, e, h, t in zip(names, ours, eager, hf, truth, strict=True):
        allowed = expected if name == "output" else 0.0
        yield compare(case.op, case.toggle, name, a, e, h, t, expected=allowed)


def _copy(t: Tensor, wide: bool) -> Tensor:
    t = t.detach().clone().requires_grad_(t.requires_grad)
    return t.detach().double().requires_grad_(t.requires_grad) if wide and t.is_floating_point() else t


def _losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_losses(F.linear(x, weight)[None], targets[None]).detach()
