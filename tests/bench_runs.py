"""Runs of `bench train` and `bench race` that take seconds on a CPU: what its tests share."""

import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import config

# As far as `bench` sees of nanoGPT's model.py.
NANOGPT_LIKE = """
import dataclasses
import fastgpt2

@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(fastgpt2.GPT):
    def __init__(self, config):
        super().__init__(fastgpt2.GPTConfig(**dataclasses.asdict(config)), kernels="torch")
        self.transformer.h[0].attn.flash = True
"""
TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64)


def make_small(monkeypatch) -> None:
    """A size that is fast, verify that is green, and compilation that does nothing."""
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    monkeypatch.setattr(gate, "verified", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: model)


def run(folder, *more) -> int:
    options = "train --device cpu --size tiny --batch 2 --block 16 --seconds 0.01 --dtype float32".split()
    return bench.main([*options, "--out", str(folder), *more])


def read(folder) -> Results:
    (file,) = folder.iterdir()
    return Results.load(file)
