"""CTranslate2's GPT-2, which generates on a CPU in float32 and with weights of 8 bits, with our weights.

It runs in a process of its own, because it brings a second OpenMP, whose threads would wait beside PyTorch's.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastgpt2.bench.cases import peers
from fastgpt2.gpt2.model import GPT

LABEL = "CTranslate2"
TYPES = ("float32", "int8")  # what it computes in on a CPU

_generator: Any = None  # in its own process


def why_not() -> str | None:
    """Why it cannot be used here; None where it is installed."""
    return None if peers.installed("ctranslate2") else "ctranslate2 is not installed"


def writer(model: GPT, idx: Tensor, compute_type: str) -> Callable[[int], Tensor]:
    """A function of n that generates n tokens after idx (B, T) greedily: (B, T + n). As many threads as PyTorch has.

    At its first call the model is saved as HuggingFace's, and CTranslate2's own converter reads it.
    """
    started: list[ProcessPoolExecutor] = []
    prompts = [[str(i) for i in row] for row in idx.tolist()]

    def write(n: int) -> Tensor:
        if not started:
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            with tempfile.TemporaryDirectory() as folder:
                with contextlib.redirect_stderr(io.StringIO()):  # it draws progress bars
                    model.to_huggingface().save_pretrained(folder)
                sizes = model.config.vocab_size, torch.get_num_threads()
                pool.submit(_load, folder, compute_type, *sizes).result()
            started.append(pool)
        return torch.cat([idx, torch.tensor(started[0].submit(_generate, prompts, n).result())], dim=1)

    return write


def _load(folder: str, compute_type: str, vocab_size: int, threads: int) -> None:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args: Any, **more: Any) -> Any:
            """The converter stores a vocabulary, and ours are token ids: their own names."""
            names = {str(i): i for i in range(vocab_size)}
            return SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")

    with contextlib.redirect_stderr(io.StringIO()):
        converted = Converter(folder).convert(f"{folder}/ctranslate2")
    global _generator
    _generator = ctranslate2.Generator(converted, device="cpu", compute_type=compute_type, intra_threads=threads)


def _generate(prompts: list[list[str]], n: int) -> list[list[int]]:
    found = _generator.generate_batch(
        prompts, max_length=n, min_length=n, end_token=[], sampling_topk=1, include_prompt_in_result=False
    )
    return [result.sequences_ids[0] for result in found]
