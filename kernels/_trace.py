"""Launches that are written down, not made: how torch.compile comes to see them (_op.py)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _Thread(threading.local):
    traced = False  # in a thread that has not said anything


_thread = _Thread()


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Inside, launches of this thread become nodes of the graph that PyTorch is writing down."""
    before = is_traced()
    _thread.traced = True
    try:
        yield
    finally:
        _thread.traced = before


def is_traced() -> bool:
    """Whether launches are written down. Tensors are fake then, and sizes may be symbols."""
    return _thread.traced


def write_down(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    """Adds `kernel[grid](*args, **options)` to the graph."""
    options.pop("enable_fp_fusion", None)  # Inductor would drop it in silence: it compiles with Triton's default
    torch.library.wrap_triton(kernel)[grid](*args, **options)
