"""One op's description: all that the project has to know of a file in kernels/, in one place.

Every file of ops/ makes one `DESCRIPTION`; `registry.py` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import Case


class Sizes(NamedTuple):
    """What the audit's cases are made for: about `rows` rows, models of some widths, a vocabulary of V."""

    rows: int
    widths: tuple[int, ...]
    V: int


class Size(NamedTuple):
    """One model's: B sequences of T tokens, width C, a vocabulary of V."""

    B: int
    T: int
    C: int
    V: int
    dtype: torch.dtype


def _no_variants(rows: int) -> Iterator[Case]:
    return iter(())


@dataclass(frozen=True)
class Description:
    """What is known of the public functions of one file in kernels/.

    module: that file. A function is public where it has its truth beside it, `<name>_reference`.
    cases: what the audit compiles and counts and the tests run: the kernel card's lines. Every `Case` names its op, the
        switch that turns it off, its reference, eager PyTorch beside it and what it costs at least.
    sized: each function at one size: what `verify` compares and `bench ops` times.
    huggingface: function name -> how HuggingFace computes the same from a case's inputs.
    calls: small calls, one for each thing that can be switched in a function: what the guards run.
    variants: at about so many rows, what else the functions can be asked for and compile other code for.
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
