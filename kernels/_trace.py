"""Recording launches in torch.compile's graph instead of making them (see _op.py)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _Thread(threading.local):
    traced = False  # the value in a new thread


thread = _Thread()  # read directly where each call counts


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Inside, launches of this thread become nodes of the graph that PyTorch is tracing."""
    before = is_traced()
    thread.traced = True
    try:
        yield
    finally:
        thread.traced = before


def is_traced() -> bool:
    """Whether launches are recorded in a graph. Tensors are then fake, and sizes may be symbolic."""
    return thread.traced


def write_down(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    """Adds `kernel[grid](*args, **options)` to the graph."""
    options.pop("enable_fp_fusion", None)  # Inductor ignores it and compiles with Triton's default
    torch.library.wrap_triton(kernel)[grid](*args, **options)
