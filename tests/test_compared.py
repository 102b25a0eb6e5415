"""Our ops, eager PyTorch's and Liger's are counted the same way."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastgpt2.bench.audit import audit, peer_traffic
from fastgpt2.bench.audit.card_table import LABELS
from fastgpt2.bench.cases.registry import sized_cases

CASES = {case.op: case for case in sized_cases(16, 64, torch.float16)}


def test_eager_pytorch_is_counted_operator_by_operator():
    """bias + GELU: the sum is written and read once more than it must be."""
    case = CASES["bias_gelu"]
    found = peer_traffic.count(case, case.eager)
    parameters = 1 / (2 * 16 + 1)
    assert found["forward"] == dict(launches=2, bytes_over_minimum=pytest.approx(2 - parameters, abs=1e-3))
    assert peer_traffic.count(case, case.ours)["forward"] == dict(launches=1, bytes_over_minimum=1.0)


def test_what_a_case_calls_eager_adds_once():
    case = CASES["add_layer_norm"]
    assert peer_traffic.count(case, case.eager)["forward"]["launches"] == 2


def test_a_lookup_reads_its_rows_not_its_table():
    case = CASES["token_position_embedding"]
    assert peer_traffic.count(case, case.eager)["forward"]["bytes_over_minimum"] < 2.5


def test_an_op_without_gradients_has_no_backward():
    case = CASES["decode_attention"]
    assert list(peer_traffic.count(case, case.eager)) == ["forward"]


@pytest.mark.slow
def test_liger_is_counted_where_it_is_installed(tmp_path):
    pytest.importorskip("liger_kernel")
    file = tmp_path / "counts.json"
    command = [sys.executable, "-m", "fastgpt2.bench.audit.peer_traffic", "--json", str(file), "--op", "layer_norm"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    found = {(e["label"], e["direction"]): e for e in json.loads(file.read_text())}
    assert {label for label, _ in found} == set(LABELS)
    assert found["Liger", "forward"]["launches"] == 1
    assert found["Liger", "forward"]["bytes_over_minimum"] == pytest.approx(1.0, abs=0.01)


def test_the_card_shows_them_beside_ours():
    figures = dict(case="x", launches=1, bytes_over_minimum=1.0)
    figures |= {"PyTorch launches": 3, "PyTorch bytes_over_minimum": 1.997}
    card = dict(triton="9", passes={"gelu forward": figures}, kernels={})
    assert "| gelu forward | `x` | 1 | 1.000 |  | 3 launches, 1.997 |  |" in audit.table(card)
