"""Writes what the inner loops of attention's kernels with descriptors do on sm_90: python tma_loop.py DIRECTION FILE.

DIRECTION: forward or backward. A process of its own, because it compiles what tests interpret.
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


def ttgir_loops(text: str) -> list[list[str]]:
    """The lines of each loop with products."""
    loops = re.findall(r"scf\.for .*?scf\.yield", text, re.DOTALL)
    return [loop.splitlines() for loop in loops if "warp_group_dot" in loop]


def sass_loops(lines: list[str]) -> list[list[str]]:
    """The lines from a label to the jump back to it, of each innermost loop with products and exponentials."""
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append(range(labels[jump[1]], i))
    innermost = [x for x in loops if not any(y != x and y.start >= x.start and y.stop <= x.stop for y in loops)]
    texts = [lines[x.start : x.stop] for x in innermost]
    return [text for text in texts if {"HGMMA", "MUFU.EX2"} <= set(found(text, SASS))]


direction, file = sys.argv[1:]
with recording("90") as launches:
    qkv = torch.empty(4, 1024, 3 * 768, dtype=torch.bfloat16, requires_grad=True)
    out = by_tma(12, qkv)
    if direction == "backward":
        out.backward(torch.empty_like(out))
code = launches[-1].kernel.asm
with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(code["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    sass = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout.splitlines()
result = dict(
    kernel=launches[-1].name,
    ttgir=[found(loop, TTGIR) for loop in ttgir_loops(code["ttgir"])],
    sass=[found(loop, SASS) for loop in sass_loops(sass)],
    UTMALDG=sum("UTMALDG" in line for line in sass),
    spills=asm.machine_code(code["cubin"]).spills,
)
Path(file).write_text(json.dumps(result))
