"""The descriptions of ops (bench/cases/ops/): complete, and each case computes what it says."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from numerics import compare

import fastgpt2.kernels.gelu
from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.registry import DESCRIPTIONS, all_cases
from fastgpt2.gpt2.ops import Kernels

ROWS = 64
SMALL = [case for case in all_cases(ROWS, V=5003) if case.dtype == torch.float32]  # a vocabulary as odd as GPT-2's
KERNELS = Path(fastgpt2.kernels.gelu.__file__).parent
TESTS = Path(__file__).parent


def public(file: Path) -> set[str]:
    """The functions of a file in kernels/ that have a truth beside them."""
    names = {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
    return {name.removesuffix("_reference") for name in names if name.endswith("_reference")}


def missing(file: str, functions: set[str], description: Description | None) -> list[str]:
    """What has to be added for the `functions` of kernels/<file>.py, one line an entry."""
    where = f"bench/cases/ops/{file}.py"
    if description is None:
        return [f"{where} is missing: it describes {', '.join(sorted(functions))} of kernels/{file}.py"]
    given = {
        "cases": {case.op for case in description.cases(Sizes(ROWS, (768,), 97))},
        "sized": {case.op for case in description.sized(Size(1, 8, 64, 97, torch.float32))},
        "huggingface": set(description.huggingface),
        "calls": {call.op for call in description.calls()},
    }
    found = [f"{where}: `{entry}` lacks {op}" for entry, ops in given.items() for op in sorted(functions - ops)]
    found += [f"{where}: `{entry}` has {op}, which kernels/{file}.py does not define"
              for entry, ops in given.items() for op in sorted(ops - functions)]  # fmt: skip
    for case in description.cases(Sizes(ROWS, (768,), 97)):
        if case.toggle not in (*Kernels.names(), "optimizer"):  # the last is no op of the model
            found.append(f"{where}: {case.op} has the toggle {case.toggle!r}, Kernels has {', '.join(Kernels.names())}")
    if not (TESTS / f"test_{file}.py").is_file():
        found.append(f"tests/test_{file}.py is missing")
    return found


def test_every_kernel_file_is_described():
    files = {file.stem: functions for file in sorted(KERNELS.glob("*.py")) if (functions := public(file))}
    assert len(files) > 5
    lines = [line for file, names in files.items() for line in missing(file, names, DESCRIPTIONS.get(file))]
    lines += [f"bench/cases/ops/{file}.py describes no file of kernels/" for file in DESCRIPTIONS.keys() - files.keys()]
    assert not lines, "\n".join(lines)


def test_what_is_missing_is_named():
    whole = DESCRIPTIONS["gelu"]
    both = {"gelu", "bias_gelu"}
    assert missing("gelu", both, whole) == []
    (line,) = missing("rms_norm", {"rms_norm"}, None)
    assert line == "bench/cases/ops/rms_norm.py is missing: it describes rms_norm of kernels/rms_norm.py"
    for entry, part in (
        ("cases", lambda sizes: (c for c in whole.cases(sizes) if c.op == "gelu")),
        ("sized", lambda size: (c for c in whole.sized(size) if c.op == "gelu")),
        ("huggingface", {"gelu": torch.relu}),
        ("calls", lambda: iter([Call("gelu", "plain", lambda new: (new(3),), torch.relu)])),
    ):
        lines = missing("gelu", both, dataclasses.replace(whole, **{entry: part}))
        assert lines == [f"bench/cases/ops/gelu.py: `{entry}` lacks bias_gelu"]
    assert len(missing("gelu", {"gelu"}, whole)) == 4, "what is described and is not there"
    renamed = dataclasses.replace(
        whole, cases=lambda sizes: (dataclasses.replace(c, toggle="norm") for c in whole.cases(sizes))
    )
    lines = missing("gelu", both, renamed)
    assert lines and all("toggle 'norm', Kernels has attention" in line for line in lines)
    assert missing("no_such_op", both, whole)[-1] == "tests/test_no_such_op.py is missing"


def test_names_are_unique():
    names = [case.name for case in all_cases()]
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
