"""Compiled code on every architecture, held to its gates and to the committed kernel card, with no GPU.

Everything is compiled in processes of their own (bench/audit/); this one only reads what they found. The first half
shows on kernels with one fault each that the instrument sees it.
"""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.bench.__main__ import main as bench
from fastgpt2.bench.audit import asm, audit
from fastgpt2.bench.audit.cases_to_compile import cases_to_compile
from fastgpt2.bench.audit.compiled import ROWS_TO_COMPILE
from fastgpt2.bench.cases.registry import all_cases

HERE = Path(__file__).parent


def compile_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("examples") / "figures.json"
    command = [sys.executable, str(HERE / "compiled_examples.py"), str(file)]
    subprocess.run(command, env=compile_environment(), check=True)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def result(made_once) -> audit.Audit:
    """The audit of all kernels."""
    file = made_once("audit.pickle", lambda file: file.write_bytes(pickle.dumps(audit.run(jobs=2))))
    return pickle.loads(file.read_bytes())


# -------------------------------------------------------------------------------------------------- the instrument


def test_a_good_kernel_is_good(examples):
    for architecture in ("80", "90", "gfx942"):
        good = examples[f"good {architecture}"]
        assert (good["spills"], good["narrow"], good["vector_share"]) == (0, [], 1.0)
        assert good["atomics"] in (0, None)
        assert good["registers"] > 0


@pytest.mark.parametrize(
    "name, figure, seen",
    [
        ("int32_offsets", "narrow", lambda narrow: narrow == ["x_ptr"]),
        ("int32_pointer", "narrow", lambda narrow: narrow == ["x_ptr"]),
        ("atomic", "atomics", lambda count: count > 0),
        ("block_of_tickets", "atomics", lambda count: count > 0),
        ("narrow_accesses", "vector_share", lambda share: share < audit.VECTOR_SHARE),
        ("spill", "spills", lambda count: count > 0),
        ("spill", "stack", lambda size: size > 0),
    ],
)
def test_each_fault_is_seen(examples, name, figure, seen):
    assert seen(examples[f"{name} 80"][figure])


def test_tickets_are_not_data(examples):
    """Nor are values of one name in two regions the same value."""
    assert (examples["tickets 80"]["atomics"], examples["tickets 80"]["narrow"]) == (0, ["x_ptr"])


def test_tensor_cores_are_named(examples):
    assert [examples[f"dot {architecture}"]["tensor_core"] for architecture in ("80", "90")] == ["HMMA", "HGMMA"]
    assert examples["good 80"]["tensor_core"] == ""
    counts = [(examples[name]["hgmma"], examples[name]["waits"]) for name in ("dot 80", "good 90", "dot gfx942")]
    assert counts == [(None, None)] * 3
    assert examples["dot 90"]["hgmma"] >= examples["dot 90"]["waits"] > 0
    for architecture in (
        "80",
        "90",
    ):  # one product of two has to do without them, and is seen though the other has them
        counts = [
            (examples[f"{name} {architecture}"]["dots"], examples[f"{name} {architecture}"]["plain_dots"])
            for name in ("dot", "plain_dot")
        ]
        assert counts == [(1, 0), (2, 1)]


def test_occupancy_is_the_tightest_limit():
    assert asm.occupancy("80", registers=32, shared=0, warps=4) == 1.0
    assert asm.occupancy("80", registers=64, shared=0, warps=4) == 0.5
    assert asm.occupancy("80", registers=32, shared=40 * 1024, warps=4) == 4 * 4 / 64
    assert asm.occupancy("86", registers=32, shared=0, warps=1) == 16 / 48


def test_widths_are_weighted_with_the_bytes_that_ran():
    widths = {"a.py:1": {128: 1}, "a.py:2": {32: 4}, "a.py:3": {128: 1, 64: 2}}
    assert asm.vector_share(widths, {"a.py:1": 90, "a.py:2": 10}) == 0.9
    assert asm.vector_share(widths, {"a.py:3": 10}) == 0.5
    assert asm.vector_share(widths, {"a.py:1": 50, "a.py:9": 50}) == 0.5  # a line that the code does not have


GOOD = dict(
    case="op[1]", op="op", itemsize=2, direction="forward", kernel="k", architecture="80", num_warps=4, num_stages=2,
    registers=32, shared=0, stack=0, spills=0, dots=1, plain_dots=0, tensor_core="HMMA", narrow=[], atomics=0,
    occupancy=1.0, bytes=100, vector_share=1.0, hgmma=None, waits=None, asynchronous=False,
)  # fmt: skip
HOPPER = dict(architecture="90", tensor_core="HGMMA", hgmma=60)
PASSES = {("op", "forward"): dict(case="op[1]", launches=1, bytes_over_minimum=1.0)}


@pytest.mark.parametrize(
    "fault, message",
    [
        (dict(spills=3), "3 spills"),
        (dict(stack=8), "8 bytes of stack"),
        (dict(shared=170000), "170000 bytes of shared memory, a block has 166912"),
        (dict(atomics=1), "1 atomics"),
        (dict(tensor_core=""), "1 of 1 products of matrices without tensor cores"),
        (dict(dots=3, plain_dots=2), "2 of 3 products of matrices without tensor cores"),
        (HOPPER | dict(waits=60, asynchronous=True), "60 waits for 60 asynchronous products"),
        (dict(narrow=["x_ptr"]), "int32 offsets into x_ptr"),
        (dict(vector_share=0.9), "90.0% of bytes in 128-bit accesses"),
    ],
)
def test_each_gate_can_fail(fault, message):
    assert audit.Audit("3.9.0", [GOOD], PASSES).failures() == []
    (failure,) = audit.Audit("3.9.0", [GOOD | fault], PASSES).failures()
    assert failure.startswith("op[1] forward") and message in failure


def test_waits_are_held_where_the_case_is_written_for_few_and_shown_everywhere():
    for known in (dict(waits=60, asynchronous=False), dict(waits=59, asynchronous=True)):
        found = audit.Audit("3.9.0", [GOOD | HOPPER | known], PASSES)
        assert found.failures() == [] and f", HGMMA 60/{known['waits']} |" in audit.table(found.card())
    (worse,) = audit.Audit("3.9.0", [GOOD | HOPPER | dict(waits=60)], PASSES).worse_than(found.card())
    assert worse.endswith("on 90: waits was 59, is 60")


def test_what_got_worse_is_named():
    before = audit.Audit("3.9.0", [GOOD], PASSES).card()
    worse = dict(registers=33, shared=16, spills=1, occupancy=0.9, vector_share=0.98, tensor_core="")
    passes = {("op", "forward"): dict(case="op[1]", launches=2, bytes_over_minimum=1.1)}
    after = audit.Audit("3.9.0", [GOOD | worse], passes)
    assert len(after.worse_than(before)) == len(worse) + 2
    better = {"tensor_core": after.launches[0]["tensor_core"]}  # another instruction is neither: it has to be looked at
    assert audit.Audit("3.9.0", [GOOD | better], PASSES).worse_than(after.card()) == []
    (missing,) = audit.Audit("3.9.0", [GOOD | dict(occupancy=None)], PASSES).worse_than(before)
    assert "occupancy was 1.0, is missing" in missing
    assert dataclasses.replace(after, triton="3.8.0").worse_than(before) == []


def test_a_card_is_written_again_for_some_functions_alone():
    passes = {"gelu forward": 1, "bias_gelu forward": 2}
    kernels = {
        "gelu[8x8-float32] forward k": 1,
        "gelu[4x8-float32] forward k": 1,
        "bias_gelu[8x8-float32] forward k": 2,
    }
    card = {
        "triton": "3.9.0",
        "passes": passes,
        "kernels": kernels,
        "Liger's kernels": {"layer_norm[8x8] forward k": 3},
    }
    found = {
        "triton": "3.9.0",
        "passes": {"gelu forward": 4, "mlp forward": 5},
        "kernels": {"gelu[8x8-float32] forward k": 4},
    }
    after = audit.merged(card, found, ["gelu", "mlp"])
    assert after["passes"] == {"gelu forward": 4, "bias_gelu forward": 2, "mlp forward": 5}
    assert list(after["passes"]) == ["gelu forward", "bias_gelu forward", "mlp forward"], "an op keeps its place"
    assert after["kernels"] == {"gelu[8x8-float32] forward k": 4, "bias_gelu[8x8-float32] forward k": 2}
    assert after["Liger's kernels"] == card["Liger's kernels"] and card["passes"]["gelu forward"] == 1
    with pytest.raises(ValueError, match="of Triton 3.9.0 and this one is 3.8.0: leave --op out"):
        audit.merged(card, found | {"triton": "3.8.0"}, ["gelu"])


def test_a_process_that_fails_is_a_failure(monkeypatch):
    monkeypatch.setattr(audit, "ARCHITECTURES", ("80",))
    result = audit.run(("no such architecture",), ("no such op",), jobs=2)
    assert result.launches == [] and result.failures() == []  # nothing to compile: no op of that name
    result = audit.run(("no such architecture",), ("gelu",), jobs=2)
    assert any("no such architecture" in failure for failure in result.failures())


def test_another_triton_can_compile(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('the other Triton')")
    options = ("--arch", "80", "--op", "gelu")
    found, error = audit._process("compiled", tmp_path / "figures.json", options, triton=tmp_path)
    assert found is None and "the other Triton" in error
    with pytest.raises(ValueError, match="--triton is .* holds no package triton"):
        bench(["audit", "--triton", str(tmp_path / "triton")])


# ------------------------------------------------------------------------------------------------------ the kernels


def test_every_case_is_compiled_for_every_architecture(result):
    assert result.errors == ()
    compiled = {(launch["case"].split("[")[0], launch["architecture"]) for launch in result.launches}
    ops = {case.op for case in all_cases()}
    assert compiled == {(op, architecture) for op in ops for architecture in audit.ARCHITECTURES}
    assert {op for op, _ in result.passes} == ops
    written_for_it = {case.name for case in cases_to_compile(ROWS_TO_COMPILE) if case.asynchronous}
    assert {launch["case"] for launch in result.launches if launch["asynchronous"]} == written_for_it
    assert len(written_for_it) == 2, "attention by descriptors, and with dq from the diagonal on"


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
def test_gates_hold(result, architecture):
    failures = [failure for failure in result.failures() if f"on {architecture}:" in failure]
    assert not failures, "\n".join(failures)


def test_nothing_is_worse_than_the_card(result):
    worse = result.worse_than(audit.committed())
    assert not worse, "worse than bench/results/kernel_card.json:\n" + "\n".join(worse)


def test_card_names_the_kernels_that_there_are(result):
    card, mine = audit.committed(), result.card()
    if card["triton"] == mine["triton"]:
        missing = {name.split("[")[0] for name in set(card["kernels"]) ^ set(mine["kernels"])}
        assert not missing, f"run: fastgpt2 bench audit --write --op {','.join(sorted(missing))}"
        assert set(card["passes"]) == set(mine["passes"])
