"""Attention's gradient with dq from the diagonal on (AttentionBwd.DIAGONAL_FIRST): numbers, which calls have that
order, and what it makes of the code for Hopper."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import DTYPES, offsets, packed, rule, tiles
from torch import Tensor

from fastgpt2.bench.audit import audit
from fastgpt2.bench.cases.ops.attention import diagonal_first
from fastgpt2.bench.timing.tune import DESIGNS
from fastgpt2.kernels import _tuning
from fastgpt2.kernels.attention import causal_attention

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
# Several tiles on the diagonal for each tile of keys and of queries, and several below it.
SMALL = dict(DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16)


def on(**numbers: int):
    """The order switched on, by default with tiles so small that short inputs have every kind."""
    return tiles(DIAGONAL_FIRST=True, **(numbers or SMALL))


def gradients(qkv: Tensor, H: int, **options) -> tuple[Tensor, Tensor]:
    """dq and dkv, rounded alike in both orders."""
    x = qkv.detach().requires_grad_()
    y = causal_attention(x, H, **options)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    dqkv = torch.autograd.grad(y, x, upstream)[0]
    C = qkv.shape[2] // 3
    return dqkv[..., :C], dqkv[..., C:]


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 15, 3, 16), (1, 16, 1, 64), (2, 33, 2, 48), (1, 97, 2, 48), (2, 65, 1, 17)], ids=str
)
def test_rule_on_small_tiles(device, shape, dtype):
    with on():
        rule(packed(*shape, dtype, device), shape[2])


@pytest.mark.parametrize("T", [1, 63, 130, 321])
@pytest.mark.parametrize("design", [d for d in DESIGNS["attention_bwd"] if d.get("DIAGONAL_FIRST")], ids=str)
def test_rule_on_the_tiles_that_are_tried(device, design, T):
    with tiles(**design):
        rule(packed(1, T, 1, 64, torch.bfloat16, device), 1)


def test_wide_heads(device):
    with on():
        rule(packed(1, 50, 2, 128, torch.float16, device), 2, scale=0.3)


@pytest.mark.parametrize("T", [1, 32, 33, 97])
@pytest.mark.parametrize("options", [{}, dict(dropout_p=0.3)], ids=str)
def test_it_is_the_other_order_of_the_same_sums(device, options, T):
    """dk and dv are added up in the order that they have anyway. Dropout's mask does not depend on the order."""
    if options:
        options = options | dict(seed=torch.tensor([5], device=device))
    qkv = packed(2, T, 2, 48, torch.float32, device)
    with tiles(**SMALL):
        dq, dkv = gradients(qkv, 2, **options)
    with on():
        other_dq, other_dkv = gradients(qkv, 2, **options)
    assert torch.equal(other_dkv, dkv)
    torch.testing.assert_close(other_dq, dq, rtol=1e-5, atol=1e-6 * dq.abs().max().item())
    assert torch.equal(other_dq, dq) is (T <= 32), "one tile of queries has a diagonal only"


@pytest.mark.parametrize("what", ["window", "documents", "documents, dropout"])
def test_bounded_calls_keep_their_order(device, what):
    """Tokens outside all documents, and tiles whose diagonal nobody needs."""
    options: dict = dict(window=17) if what == "window" else dict(cu_seqlens=offsets(device, 40, 70, 71, 147))
    if "dropout" in what:
        options |= dict(dropout_p=0.3, seed=torch.tensor([5], device=device))
    qkv = packed(2, 75, 2, 16, torch.float32, device)
    with tiles(**SMALL):
        expected = gradients(qkv, 2, **options)
    with on():
        found = gradients(qkv, 2, **options)
    assert all(map(torch.equal, found, expected))


# ----------------------------------------------------------------------------------------------- when it is computed


def test_the_table_has_it_off_everywhere():
    """Nothing was measured. Whoever switches it on after `bench tune` changes this test with the row."""
    rows = [row for table in (_tuning.TABLE, *_tuning.BEFORE_TRITON.values()) for key, found in table.items()
            if key.op == "attention_bwd" for row in found.values()]  # fmt: skip
    assert rows and not any(row.DIAGONAL_FIRST for row in rows)


def test_the_audits_case_has_it_on(device):
    qkv = packed(1, 150, 1, 64, torch.float32, device).requires_grad_()
    by_default, by_case = (
        torch.autograd.grad(function(qkv).square().sum(), qkv)[0]
        for function in (lambda x: causal_attention(x, 1), lambda x: diagonal_first(1, x))
    )
    with tiles(DIAGONAL_FIRST=True):
        expected = torch.autograd.grad(causal_attention(qkv, 1).square().sum(), qkv)[0]
    assert torch.equal(by_case, expected) and not torch.equal(by_case, by_default)


# --------------------------------------------------------------------------------------------------- compiled code


@pytest.fixture(scope="module")
def on_hopper(tmp_path_factory) -> list[dict]:
    """Figures on sm_90 of the table's row and of each of DESIGNS, by a process that compiles."""
    file = tmp_path_factory.mktemp("designs") / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("attention_designs.py")), str(file)]
    subprocess.run(command, env=environment, check=True)
    return json.loads(file.read_text())


def test_designs_do_not_wait_for_each_product_and_spill_nothing(on_hopper):
    present, *designs = on_hopper
    assert present["waits"] == present["hgmma"] > 0, "the table's row is serialised: if not, the documentation is wrong"
    assert [figures["design"] for figures in designs] == list(DESIGNS["attention_bwd"])
    for figures in designs:
        assert figures["spills"] == figures["stack"] == 0 and 0 < 3 * figures["waits"] < figures["hgmma"], figures


def test_the_card_says_what_is_serialised():
    """As its legend does: gradients for heads of up to 64 without bounds, but not in this order or by descriptors."""
    found = audit.committed()["kernels"]
    counted = {name: figures["90"] for name, figures in found.items() if "waits" in figures.get("90", {})}
    waiting = {name for name, figures in counted.items() if figures["waits"] >= figures["hgmma"]}
    named = {name for name in counted if re.search(r"x(48|64)( bias)?-.* _attention_bwd_kernel", name)}
    assert waiting == named and named
    assert sum("_attention_tma_" in name for name in counted) == 2
    assert sum("diagonal first" in name and "_attention_bwd_kernel" in name for name in counted) == 1
