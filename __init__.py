"""fastgpt2: GPT-2 in PyTorch with Triton kernels for attention, LayerNorm, GELU and the loss, each behind a switch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt2.gpt2 import hf
    from fastgpt2.gpt2.config import GPTConfig
    from fastgpt2.gpt2.model import GPT
    from fastgpt2.gpt2.ops import Kernels
    from fastgpt2.gpt2.training.graphed import graphed

__all__ = ["GPT", "GPTConfig", "Kernels", "graphed", "hf"]
__version__ = "0.1.0"
_HOMES = {
    "GPT": "gpt2.model",
    "GPTConfig": "gpt2.config",
    "Kernels": "gpt2.ops",
    "graphed": "gpt2.training.graphed",
    "hf": "gpt2.hf",
}


def __getattr__(name: str):
    """Imports PyTorch when a name is asked for: the command line is there at once, also for Ctrl-C."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return home if name == "hf" else getattr(home, name)  # hf is a module itself


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
