"""Every launch of this package is made here."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`.

    kernel: a function decorated with `triton.jit`. args, options: its arguments, and launch options such as num_warps.
    """
    kernel[grid](*args, **options)
