"""Writes figures of attention's gradient on sm_90, by the table's row and by each design: attention_designs.py FILE.

The designs are what `bench tune` tries besides. A process of its own, because it compiles what tests interpret.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from fastgpt2.bench.audit.compiled import recording
from fastgpt2.bench.cases.ops.attention import attention_case
from fastgpt2.bench.cases.rows import overridden
from fastgpt2.bench.timing.tune import DESIGNS
from fastgpt2.kernels import _tuning
from fastgpt2.kernels._attention_tiles import tuning_key

case, found = attention_case(4, 1024, 768, torch.bfloat16), []
key, cpu = tuning_key("attention_bwd", torch.bfloat16, 64), torch.device("cpu")
for design in ({}, *DESIGNS["attention_bwd"]):
    inputs = case.inputs(fill=torch.empty)
    with recording("90") as launches, overridden({key: _tuning.config(key, cpu) | design}):
        case.backward(inputs, case.forward(inputs))
    (launch,) = (launch for launch in launches if launch.name == "_attention_bwd_kernel")
    found.append({"design": design, **dataclasses.asdict(launch.figures())})
Path(sys.argv[1]).write_text(json.dumps(found))
