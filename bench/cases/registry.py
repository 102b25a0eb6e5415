"""Every op's description, found in ops/, and the lists made from them that audit, timings and tests read.

A case is one public kernel function at one shape and dtype: its inputs, the same in plain PyTorch, and the least that
it costs. B batch, T time, N rows (B * T), C width, H heads, D head size, V vocabulary.

    for case in all_cases():
        inputs = case.inputs(device)             # random; inputs(device, torch.empty) where values do not matter
        outputs = case.forward(inputs)
        gradients = case.backward(inputs, outputs)

"minimum bytes": every tensor that the pass must read is read once, and every tensor that it must write is written once.
PyTorch's matrix products are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastgpt2.bench.cases.case import BF16, FP32, VOCABULARY, WIDTHS, Case
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.ops.attention import attention_case
from fastgpt2.bench.cases.ops.embedding import embedding_case
from fastgpt2.bench.cases.ops.gelu import gelu_cases
from fastgpt2.bench.cases.ops.layer_norm import layer_norm_cases
from fastgpt2.bench.cases.ops.linear_cross_entropy import loss_case

# By file: ops/gelu.py describes the functions of kernels/gelu.py.
DESCRIPTIONS: dict[str, Description] = {
    file.stem: importlib.import_module(f"fastgpt2.bench.cases.ops.{file.stem}").DESCRIPTION
    for file in sorted(Path(__file__).with_name("ops").glob("*.py"))
}


def all_cases(rows: int = 4096, widths: tuple[int, ...] = WIDTHS, V: int = VOCABULARY) -> Iterator[Case]:
    """All cases at about `rows` rows; attention at sequences of `rows` / 4 tokens, decoding at caches up to 1024."""
    for description in DESCRIPTIONS.values():
        yield from description.cases(Sizes(rows, widths, V))


def sized_cases(T: int, C: int, dtype: torch.dtype, tokens: int = 0, V: int | None = None) -> Iterator[Case]:
    """Every op once, at sequences of T tokens and width C. Attention and embedding get as many sequences as make
    `tokens`, decoding 8 with caches of T tokens, other ops one. V: of the vocabulary, by default GPT-2's."""
    for description in DESCRIPTIONS.values():
        yield from description.sized(Size(max(1, tokens // T), T, C, V or VOCABULARY, dtype))


def step_cases(B: int, T: int, C: int) -> dict[str, Case]:
    """The ops of one training step of GPT-2 under bf16 autocast, parameters in fp32, by name."""
    N = B * T
    _, bias_gelu = gelu_cases(N, C, BF16)
    step = (
        *layer_norm_cases(N, C, BF16, autocast=True),
        bias_gelu,
        attention_case(B, T, C, BF16),
        loss_case(N, C, VOCABULARY, BF16, autocast=True),
        embedding_case(B, T, C, VOCABULARY, FP32),
    )
    return {case.op: case for case in step}


def chosen_operations(wanted: str | None) -> tuple[str, ...]:
    """The functions that `--op` names, separated by commas; all without it. Raises ValueError for an unknown one."""
    names = tuple(wanted.split(",")) if wanted else tuple(operations())
    for name in names:
        if name not in operations():
            raise ValueError(f"--op is {name!r}, allowed are {', '.join(operations())}")
    return names


def operations() -> dict[str, Callable]:
    """Every public kernel function by name."""
    return {name: function for d in DESCRIPTIONS.values() for name, function in d.functions().items()}


def huggingface() -> dict[str, Callable]:
    """How HuggingFace computes each of them from the inputs of a case."""
    return {name: function for d in DESCRIPTIONS.values() for name, function in d.huggingface.items()}
