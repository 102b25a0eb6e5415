"""`pytest bench`: the cases of `bench ops --quick` under pytest-benchmark, with its tables, files and comparisons.

pytest bench --benchmark-group-by=param:case -k layer_norm
"""

from __future__ import annotations

import pytest
import torch

from fastgpt2.bench.cases.peers import PEERS, first_line
from fastgpt2.bench.timing import ops
from fastgpt2.gpt2.training.train_config import find_device

DEVICE = find_device("auto")
SCOPE = ops.Scope.of(DEVICE, quick=True)
CASES = {case.name: case for case, _, _ in ops.chosen_cases(SCOPE, None)}


def variants() -> list:
    """(case, implementation, direction) of everything that runs on this machine."""
    every = []
    for name, case in CASES.items():
        found, _ = ops.functions(case, DEVICE, SCOPE.compiled)
        directions = ops.DIRECTIONS if case.backward_bytes is not None else ops.DIRECTIONS[:1]
        every += [pytest.param(name, label, d, id=f"{name}-{label}-{d}") for label in found for d in directions]
    return every


@pytest.mark.parametrize(("case", "label", "direction"), variants())
def test_op(benchmark, case: str, label: str, direction: str) -> None:
    found, inputs = ops.functions(CASES[case], DEVICE, SCOPE.compiled)[0], CASES[case].inputs(DEVICE)

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    try:
        computed, expected = (ops.values(CASES[case], inputs, found[name]) for name in (label, ops.PYTORCH))
        call = ops.calls(CASES[case], inputs, found[label])[direction]
        for _ in range(2):  # some backwards can run only once
            finished()
    except Exception as error:  # errors of libraries have no common class
        if label not in PEERS:
            raise
        pytest.skip(f"{label}: {first_line(error)}")
    assert ops.differs(computed, expected) <= ops.AGREEMENT[SCOPE.dtype], "its results differ from PyTorch's"
    benchmark(finished)
