"""The registry of kernel cases: complete, and each case computes what it says."""

import ast
from pathlib import Path

import pytest
import torch
from numerics import compare

import fastgpt2.kernels.gelu
from fastgpt2.bench.cases.registry import cases

ROWS = 64
SMALL = [case for case in cases(ROWS) if case.dtype == torch.float32]


def test_every_public_kernel_function_has_a_case():
    folder = Path(fastgpt2.kernels.gelu.__file__).parent
    functions = {
        node.name for file in folder.glob("*.py") for node in ast.parse(file.read_text()).body if hasattr(node, "name")
    }
    public = {name.removesuffix("_reference") for name in functions if name.endswith("_reference")}
    assert public and public <= functions
    assert {case.op for case in cases()} == public


def test_names_are_unique():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_case_computes_what_it_says(case, device):
    """Ours against the eager and the reference function of the case, forward and backward."""
    inputs = case.inputs(device)
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)
    outputs = {name: case.forward(inputs, getattr(case, name)) for name in ("ours", "eager")}
    outputs["reference"] = case.forward(wide, case.reference)
    assert case.forward_bytes >= sum(o.nbytes for o in outputs["ours"])
    upstream = tuple(torch.randn_like(o) for o in outputs["ours"])
    results = {}
    for name, out in outputs.items():
        mine = wide if name == "reference" else inputs
        gradients = case.backward(mine, out, tuple(g.to(o.dtype) for g, o in zip(upstream, out, strict=True)))
        results[name] = tuple(o.detach() for o in out) + gradients
    for ours, eager, truth in zip(*(results[name] for name in ("ours", "eager", "reference")), strict=True):
        compare(ours, eager, truth)


def test_a_case_without_gradients_asks_for_none(device):
    case = next(case for case in SMALL if case.backward_bytes is None)
    inputs = case.inputs(device)
    assert not any(t.requires_grad for t in inputs)
    assert case.backward(inputs, case.forward(inputs)) == ()
