"""Memory of a process on a CPU."""

import platform
import subprocess
import sys

import pytest

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
