"""CTranslate2's GPT-2, which generates on a CPU in float32 and with weights of 8 bits, with our weights."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastgpt2.bench.cases import peers
from fastgpt2.gpt2.model import GPT

LABEL = "CTranslate2"
TYPES = ("float32", "int8")  # what it computes in on a CPU


def why_not() -> str | None:
    """Why it cannot be used here; None where it can."""
    if not peers.installed("ctranslate2"):
        return "ctranslate2 is not installed"
    try:
        import ctranslate2  # noqa: F401
    except Exception as error:  # a package built for another system raises errors of any class
        return f"ctranslate2 cannot be imported: {peers.first_line(error)}"
    return None


def writer(model: GPT, idx: Tensor, compute_type: str) -> Callable[[int], Tensor]:
    """A function of n that generates n tokens after idx (B, T) greedily: (B, T + n). As many threads as PyTorch has.

    The model is saved as HuggingFace's and converted by CTranslate2's own converter.
    """
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args: Any, **more: Any) -> Any:
            """The converter stores a vocabulary, and ours are token ids: their own names."""
            names = {str(i): i for i in range(model.config.vocab_size)}
            return SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # it draws progress bars
        model.to_huggingface().save_pretrained(f"{folder}/huggingface")
        converted = Converter(f"{folder}/huggingface").convert(f"{folder}/ctranslate2")
        threads = torch.get_num_threads()
        generator = ctranslate2.Generator(converted, device="cpu", compute_type=compute_type, intra_threads=threads)
    prompts = [[str(i) for i in row] for row in idx.tolist()]

    def write(n: int) -> Tensor:
        found = generator.generate_batch(
            prompts, max_length=n, min_length=n, end_token=[], sampling_topk=1, include_prompt_in_result=False
        )
        return torch.cat([idx, torch.tensor([result.sequences_ids[0] for result in found])], dim=1)

    return write
