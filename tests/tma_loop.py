"""Writes what the inner loop of attention's kernel with descriptors does on sm_90: python tma_loop.py FILE.

A process of its own, because it compiles what tests interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from fastgpt2.bench.audit import asm
from fastgpt2.bench.audit.compiled import recording
from fastgpt2.bench.cases.ops.attention import by_tma

TTGIR = {"ttng.warp_group_dot ": "product", "ttng.warp_group_dot_wait ": "wait", "math.exp2 ": "exp2"}
SASS = {"HGMMA": "HGMMA", "WARPGROUP.DEPBAR": "wait", "MUFU.EX2": "MUFU.EX2"}


def found(lines: list[str], names: dict[str, str]) -> list[str]:
    return [what for line in lines for text, what in names.items() if text in line]


def ttgir_loop(text: str) -> list[str]:
    """The lines of the only loop with products."""
    loops = re.findall(r"scf\.for .*?scf\.yield", text, re.DOTALL)
    (loop,) = [loop for loop in loops if "warp_group_dot" in loop]
    return loop.splitlines()


def sass_loop(lines: list[str]) -> list[str]:
    """The lines from a label to the jump back to it, of the shortest loop with products and exponentials."""
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append(lines[labels[jump[1]] : i])
    return min((loop for loop in loops if {"HGMMA", "MUFU.EX2"} <= set(found(loop, SASS))), key=len)


with recording("90") as launches:
    by_tma(12, torch.empty(4, 1024, 3 * 768, dtype=torch.bfloat16))
code = launches[0].kernel.asm
with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(code["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    sass = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout.splitlines()
result = dict(
    ttgir=found(ttgir_loop(code["ttgir"]), TTGIR),
    sass=found(sass_loop(sass), SASS),
    UTMALDG=sum("UTMALDG" in line for line in sass),
    spills=asm.machine_code(code["cubin"]).spills,
)
Path(sys.argv[1]).write_text(json.dumps(result))
