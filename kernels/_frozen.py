"""Every launch of this package is made here."""

from __future__ import annotations

from typing import Any

from ._trace import is_traced, write_down


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or a node of the graph that torch.compile is writing down (_trace.py).

    kernel: a function decorated with `triton.jit`. args, options: its arguments, and launch options such as num_warps.
    """
    if is_traced():
        write_down(kernel, grid, args, options)
    else:
        kernel[grid](*args, **options)
