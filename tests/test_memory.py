"""Memory of a process on a CPU."""

import platform
import subprocess
import sys

import pytest
import torch

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.data.tokenizer import ByteTokenizer
from fastgpt2.gpt2.training.train_config import TrainConfig
from fastgpt2.gpt2.training.trainer import Trainer

FAULTS = """
import resource, sys, torch
from fastgpt2.gpt2.hardware import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = page_faults()
assert keep_freed_memory()
page_faults()
print(returned, page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """In a process of its own, whose settings are not those of other tests."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept * 10 < returned


def test_training_on_a_cpu_keeps_it(monkeypatch):
    asked = []
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: asked.append(True))
    sizes = dict(n_layer=1, n_head=1, n_embd=16, block_size=8, batch_size=2, total_batch_tokens=16)
    tokens = torch.randint(256, (100,)).numpy()
    Trainer(TrainConfig.from_preset("baby-smoke", device="cpu", **sizes), ByteTokenizer(), tokens, tokens)
    assert asked
