"""Kernels that begin while the one before ends: in the compiled code, what is read before the wait and what after.

The interpreter never takes these lines, so that the code is compiled, in a process of its own, and read.
"""

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, torch
from fastgpt2.bench.audit.compiled import recording
from fastgpt2.kernels.decode_attention import decode_attention
from fastgpt2.kernels.decode_linear import decode_linear

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)

found = {}
for architecture in ("80", "90"):
    with recording(architecture) as launches:
        for rows, overlap, weight in ((1, True, empty(64, 256)), (1, False, empty(64, 256)), (2, True, empty(64, 256)),
                                      (1, True, empty(256, 64).t())):
            decode_linear(empty(rows, 256), weight, empty(64), residual=empty(rows, 64), overlap=overlap)
        for rows in (1, 2):
            decode_attention(empty(rows, 1, 96), empty(2, rows, 2, 512, 16), empty(rows, dtype=torch.int32), 2)
    found[architecture] = [
        (launch.name, launch.kernel.asm["ptx"], bool(getattr(launch.kernel.metadata, "launch_pdl", False)))
        for launch in launches
    ]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parts(ptx: str) -> tuple[str, str]:
    """The code before and after the wait."""
    before, after = ptx.split("griddepcontrol.wait;")
    return before, after


def test_one_row_asks_for_parameters_before_the_wait_and_for_the_rest_after(compiled):
    name, ptx, early = compiled["90"][0]
    assert name == "_decode_linear_kernel" and early
    before, after = parts(ptx)
    assert before.count("griddepcontrol.launch_dependents;") == 1
    assert "prefetch.global.L2" in before and "ld.global" in before  # the weight and the bias
    assert "ld.global" in after  # x and the residual
    assert "st.global" in after and "st.global" not in before


@pytest.mark.parametrize("place, why", [(1, "not asked for"), (2, "two rows"), (3, "a copy of the weight was made")])
def test_others_wait_for_all(compiled, place, why):
    name, ptx, early = compiled["90"][place]
    assert name == "_decode_linear_kernel" and not early, why
    assert "griddepcontrol" not in ptx


def test_attention_over_the_cache_waits_before_it_reads_anything(compiled):
    launches = compiled["90"][4:]
    assert [name for name, *_ in launches] == ["_decode_attention_kernel", "_decode_merge_kernel"] * 2
    for _, ptx, early in launches[:2]:
        before, _ = parts(ptx)
        assert early and "ld.global" not in before and "st.global" not in before
    for _, ptx, early in launches[2:]:  # two rows
        assert not early and "griddepcontrol" not in ptx


def test_older_gpus_know_nothing_of_it(compiled):
    for _, ptx, early in compiled["80"]:
        assert not early and "griddepcontrol" not in ptx
