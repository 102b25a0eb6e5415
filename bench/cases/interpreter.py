"""Triton's interpreter in less than half of its time, with the same results.

    with quickened():                    # in a process with TRITON_INTERPRET=1; without it, nothing changes
        y = layer_norm(x, weight)

Two things that the stock interpreter does again and again are done once or in NumPy: at each launch and at each call of
a device function it exchanges the functions of triton.language for interpreted ones, and it checks each sum and product
of int32 for overflow by ten interpreted operations. Tried with Triton 3.7 to 3.9; the interpreters of 3.4 to 3.6 do not
run with the NumPy that was installed then, 2.4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@contextlib.contextmanager
def quickened() -> Iterator[None]:
    """Inside, kernels are interpreted faster. An overflow of int32 is an AssertionError, as it was."""
    if not triton.knobs.runtime.interpret or stock._patch_lang is _nothing_to_exchange:
        yield
        return
    # As for a kernel's module, which imports triton.language, and for Triton's own, which imports its core.
    exchanged: Any = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with (
            mock.patch.object(stock, "_patch_lang", _nothing_to_exchange),
            mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow),
        ):
            yield
    finally:
        if exchanged is not None:  # old versions of Triton never go back
            exchanged.restore()


def _nothing_to_exchange(function: Any) -> Any:
    return SimpleNamespace(restore=lambda: None)


def _check_overflow(semantic: Any, a: Any, b: Any, operation: Any) -> None:
    kind = a.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = EXACT[operation.__name__](a.handle.data, b.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")
