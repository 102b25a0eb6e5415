"""`bench ops` reads the registry: every op has rows, the work is the case's, what computes something else is out."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import peers, registry
from fastgpt2.bench.cases.registry import operations, sized_cases
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import ops, peaks, timing
from fastgpt2.bench.verify import gate
from fastgpt2.kernels.gelu import gelu_reference

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = ops.Scope(shapes=((16, 64),), tokens=32, dtype=torch.float32, compiled=False, budget_s=0.0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small shapes, a small vocabulary, known peaks, verify green."""
    monkeypatch.setattr(ops.Scope, "of", classmethod(lambda cls, device, quick: SMALL))
    monkeypatch.setattr(registry, "VOCABULARY", 96)
    monkeypatch.setattr(peaks, "copy_bytes_per_s", lambda device: 1e9)
    monkeypatch.setattr(peaks, "matmul_flops_per_s", lambda device, dtype: 1e12)
    monkeypatch.setattr(gate, "verified", lambda device: True)


def run(folder, *more) -> Results:
    assert bench.main(["ops", "--device", "cpu", "--out", str(folder), *more]) == 0
    (file,) = folder.iterdir()
    return Results.load(file)


def test_every_op_has_rows_in_every_direction(tmp_path, capsys):
    results = run(tmp_path)
    found = {(row["op"], row["direction"]) for row in results.rows if row["label"] == ops.PYTORCH}
    listed = list(sized_cases(16, 64, torch.float32))
    without = {case.op for case in listed if case.backward_bytes is None}
    assert {case.op for case in listed} == set(operations())
    every = {(op, d) for op in operations() for d in ops.DIRECTIONS if op not in without or d == "forward"}
    assert found == every and without == {"adamw", "decode_attention", "decode_linear"}
    out = capsys.readouterr().out
    assert all(row["name"].split(" ")[0] in out for row in results.rows)
    assert "left out: Triton: " in out and "left out: torch.compile: " in out
    assert json.loads(out.strip().splitlines()[-1])["kind"] == "ops"


def test_peers_without_a_gpu_say_why(tmp_path):
    results = run(tmp_path, "--op", "linear_cross_entropy,causal_attention")
    left_out = {entry["name"]: entry["why"] for entry in results.left_out}
    assert left_out["Liger"] in ("it needs a GPU", "liger_kernel is not installed")
    assert left_out["flash-attn"] in ("it needs a GPU", "flash_attn is not installed")
    has_it = hasattr(torch.nn, "LinearCrossEntropyOptions")
    assert ("F.linear_cross_entropy" in {row["label"] for row in results.rows}) == has_it
    assert left_out["SDPA by cuDNN"] == "it needs a GPU"


def test_compiled_code_is_timed_in_every_direction(tmp_path, monkeypatch):
    """A LayerNorm's compiled backward would else overwrite what its forward saved, and not run again."""
    monkeypatch.setattr(ops.Scope, "of", classmethod(lambda *_: dataclasses.replace(SMALL, compiled=True)))
    results = run(tmp_path, "--op", "layer_norm")
    assert not [entry for entry in results.left_out if ops.COMPILED in entry["name"]]
    assert [row["direction"] for row in results.rows if row["label"] == ops.COMPILED] == list(ops.DIRECTIONS)


def test_figures_follow_from_the_case(tmp_path):
    (case,) = (c for c in sized_cases(16, 64, torch.float32, 32) if c.op == "mlp")
    rows = {row["direction"]: row for row in run(tmp_path, "--op", "mlp").rows}
    both = rows["both"]
    seconds = both["time_ms"]["median"] * 1e-3
    assert both["minimum_bytes"] == case.forward_bytes + case.backward_bytes
    assert both["gb_per_s"] == pytest.approx(both["minimum_bytes"] / seconds * 1e-9)
    assert both["tflop_per_s"] == pytest.approx(3 * case.forward_flops / seconds * 1e-12)
    assert both["fraction"] == pytest.approx(max(both["gb_per_s"], both["tflop_per_s"]))


def test_products_that_nobody_can_tell_apart_have_no_rate():
    """Our loss makes gradients in the forward, others in the backward: only both together compare."""
    (case,) = (c for c in sized_cases(16, 64, torch.float32) if c.op == "linear_cross_entropy")
    assert [case.work(d)[1] for d in ops.DIRECTIONS] == [0, 0, 6 * 16 * 64 * 96]


def test_a_variant_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    def other(op, device):
        return {"wrong": lambda x: torch.relu(x), "right": lambda x: gelu_reference(x)}, {}

    monkeypatch.setattr(ops, "peers", other)
    results = run(tmp_path, "--op", "gelu")
    assert {row["label"] for row in results.rows} == {ops.PYTORCH, "right"}
    assert ["off PyTorch's" in e["why"] for e in results.left_out if e["name"].startswith("wrong")] == [True]


def test_a_variant_without_memory_is_left_out(tmp_path, monkeypatch):
    def peak(call, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "peak_bytes", peak)
    results = run(tmp_path, "--op", "gelu")
    assert not results.rows and "out of memory" in {entry["why"] for entry in results.left_out}


def test_a_peer_that_cannot_be_imported_is_left_out(monkeypatch):
    def broken():
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("torch", "torch", {"gelu": broken}, capability=(0, 0)))
    found, missing = peers.peers("gelu", CPU)
    assert not found and missing == {"broken": "torch cannot be imported: undefined symbol: _ZN3c10"}


def test_a_red_verify_prints_no_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "verified", lambda device: False)
    assert bench.main(["ops", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "GB/s" not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_an_unknown_op_is_named(tmp_path):
    with pytest.raises(ValueError, match="--op is 'gelo', allowed are .*causal_attention"):
        run(tmp_path, "--op", "gelo")


def test_shapes_can_be_chosen(tmp_path):
    rows = run(tmp_path, "--op", "layer_norm", "--shape", "8x64,16x128").rows
    assert {(row["T"], row["C"]) for row in rows} == {(8, 64), (16, 128)}
    for wrong in ("16", "16x", "0x64", "16x65", "16x64,"):
        with pytest.raises(ValueError, match="--shape is .*such as 1024x768"):
            run(tmp_path, "--shape", wrong)


@pytest.mark.parametrize("again", [True, False])
def test_backward_can_be_timed_again(again, device):
    """Ours keeps what it saved when asked to, and gives the same gradients."""
    for case in sized_cases(16, 64, torch.float32):
        if case.backward_bytes is not None:
            inputs = case.inputs(device)
            outputs = case.forward(inputs)
            first = case.backward(inputs, outputs, again=True)
            second = case.backward(inputs, outputs, again=again)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case.op


def test_measured_peaks_are_of_this_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(peaks.COPIED_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(peaks.MATRIX, "cpu", 64)
    assert 1e7 < peaks.copy_bytes_per_s(CPU) < 1e13
    assert 1e7 < peaks.matmul_flops_per_s(CPU, torch.float32) < 1e14


def test_pytest_bench_measures_the_registry():
    # PyTorch's F.linear_cross_entropy takes 5 s a call with GPT-2's vocabulary on a core.
    small = "import sys, pytest; from fastgpt2.bench.cases import registry; registry.VOCABULARY = 96; "
    some = "gelu and forward or F.linear and not forward"
    options = ["bench", "-q", "-rs", "-k", some, "--benchmark-max-time=0.01"]
    command = [sys.executable, "-c", small + "sys.exit(pytest.main(sys.argv[1:]))", *options]
    # Not a part of the run that starts it: in a worker of xdist, or with --dist, pytest-benchmark measures nothing.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gelu[256x3072-float32]-PyTorch-forward" in done.stdout and "Median" in done.stdout
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "-F.linear_cross_entropy-both" in done.stdout and "1 skipped" in done.stdout
        assert "SKIPPED [1]" in done.stdout and "F.linear_cross_entropy: " in done.stdout
