"""One op's description: everything that audit, timings and tests need to know of a file in kernels/.

Every file of ops/ makes one `DESCRIPTION`; `registry.py` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, Case


class Sizes(NamedTuple):
    """Sizes of the audit's cases: about `rows` rows, models of several widths, a vocabulary of V."""

    rows: int
    widths: tuple[int, ...]
    V: int

    def widths_and_dtypes(self) -> Iterator[tuple[int, torch.dtype]]:
        """The narrowest model in every dtype, and the widest in bfloat16."""
        for dtype in (BF16, FP16, FP32):
            yield self.widths[0], dtype
        yield self.widths[-1], BF16


class Size(NamedTuple):
    """Sizes of one model's ops: B sequences of T tokens, width C, a vocabulary of V."""

    B: int
    T: int
    C: int
    V: int
    dtype: torch.dtype


def _no_variants(rows: int) -> Iterator[Case]:
    return iter(())


@dataclass(frozen=True)
class Description:
    """The public functions of one file in kernels/: how to call, check and measure them.

    module: that file. A function is public if the file also has its reference, `<name>_reference`.
    cases: what the audit compiles and counts, and the tests run: the lines of the kernel card. Every `Case` names its
        op, the switch that turns it off, its reference, the same in eager PyTorch, and the least that it costs.
    sized: each function at one size: what `verify` compares and `bench ops` times.
    huggingface: function name -> how HuggingFace computes the same from a case's inputs.
    calls: small calls, one for each option of a function: what tests of out-of-bounds accesses and races run.
    variants: cases at about so many rows with options for which the functions compile other code.
    """

    module: ModuleType
    cases: Callable[[Sizes], Iterator[Case]]
    sized: Callable[[Size], Iterator[Case]]
    huggingface: dict[str, Callable]
    calls: Callable[[], Iterator[Call]]
    variants: Callable[[int], Iterator[Case]] = _no_variants

    def functions(self) -> dict[str, Callable]:
        """The public functions by name."""
        return {
            name.removesuffix("_reference"): getattr(self.module, name.removesuffix("_reference"))
            for name, value in vars(self.module).items()
            if name.endswith("_reference") and value.__module__ == self.module.__name__
        }
