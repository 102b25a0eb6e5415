"""Attention's forward by descriptors: numbers, which calls it serves, memory, and the order of its compiled loop."""

import pytest
import torch
from attention_inputs import UNSERVED, compiled_loops, interpreted, packed, rule, tiles, unserved
from interpreter import count_launches, far_apart, red_zones

from fastgpt2.bench.cases.ops.attention import by_tma
from fastgpt2.kernels import _attention_tma, _device, _tuning
from fastgpt2.kernels._attention_tiles import tuning_key
from fastgpt2.kernels._descriptors import describable
from fastgpt2.kernels._trace import traced
from fastgpt2.kernels.attention import causal_attention, causal_attention_fwd

PLAIN, TMA = "_attention_fwd_kernel", "_attention_tma_fwd_kernel"
DTYPES = (torch.float16, torch.bfloat16)
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no descriptors"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


def on(**numbers: int):
    """The kernel switched on, with these block sizes."""
    return tiles(ON=True, **numbers)


def small():
    """Tiles so small that short inputs have every kind: two on the diagonal, several below it."""
    return on(BLOCK_M=32, BLOCK_N=16)


def forward(qkv: torch.Tensor, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_attention_fwd(qkv, H, 0.125, 0.0, None, None, None, False)


def served_by(run) -> str:
    """The name of the first kernel that a call launches."""
    with count_launches() as log:
        run()
    return log[0].name


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 64, 97])
def test_rule_on_small_tiles(device, T, dtype):
    with small():
        rule(packed(2, T, 2, 64, dtype, device), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("BLOCK_N", [64, 128])
@pytest.mark.parametrize("T", [1, 128, 129, 321])
def test_rule_on_the_tables_tiles(device, T, BLOCK_N, dtype):
    with on(BLOCK_M=128, BLOCK_N=BLOCK_N):
        rule(packed(1, T, 1, 64, dtype, device), 1)


@pytest.mark.parametrize("H", [12, 25])
def test_rule_at_gpt2s_widths(device, H):
    with small():
        rule(packed(1, 40, H, 64, torch.bfloat16, device), H)


def test_scale_and_large_scores(device):
    with small():
        rule(20 * packed(2, 50, 2, 64, torch.float16, device), 2, scale=0.5)


@pytest.mark.parametrize("T", [1, 33, 200])
def test_it_is_the_plain_kernel_to_rounding(device, T):
    """The log-sum-exp too, which backward needs."""
    qkv = packed(2, T, 2, 64, torch.float16, device)
    plain, plain_lse = forward(qkv, 2)
    with small():
        out, lse = forward(qkv, 2)
    torch.testing.assert_close(out, plain, rtol=2**-9, atol=2**-10)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-6, atol=1e-5)


def test_runs_are_equal_bit_for_bit(device):
    qkv = packed(2, 70, 2, 64, torch.bfloat16, device)
    with small():
        first = forward(qkv, 2)
        assert all(map(torch.equal, first, forward(qkv, 2)))


# ---------------------------------------------------------------------------------------------- which calls it serves


def test_the_table_has_it_off_everywhere():
    """Nothing was measured. Whoever switches it on after `bench tune` changes this test with the row."""
    rows = {key: found for key, found in _tuning.TABLE.items() if key.op == "attention_tma_fwd"}
    assert rows and not any(row.ON for found in rows.values() for row in found.values())


def test_off_the_plain_kernel_computes(device):
    qkv = packed(1, 40, 2, 64, torch.float16, device)
    assert served_by(lambda: causal_attention(qkv, 2)) == PLAIN
    assert served_by(lambda: by_tma(2, qkv)) == TMA, "the bench's way to switch it on"


def test_on_it_computes_the_plain_case_in_one_launch_and_no_copy(device):
    with small(), count_launches() as log:
        causal_attention(packed(1, 40, 2, 64, torch.bfloat16, device), 2)
        causal_attention(packed(2, 40, 2, 64, torch.bfloat16, device)[1:, 8:], 2)
    assert [launch.name for launch in log] == [TMA, TMA]


@pytest.mark.parametrize("what", [*UNSERVED, "stride", "expanded", "time first", "rows in no grid"])
def test_all_others_go_the_plain_way_and_are_right(device, what):
    H, C3, options = 2, 384, {}
    if what in UNSERVED:
        qkv, H, options = unserved(what, 40, device)
    elif what == "stride":
        qkv = torch.randn(2, 40, C3 + 4).to(device, torch.float16)[..., :C3]
    elif what == "expanded":
        qkv = packed(1, 40, 2, 64, torch.float16, device).expand(2, -1, -1)
    elif what == "time first":
        qkv = torch.randn(40, 2, C3).to(device, torch.float16).transpose(0, 1)
    else:
        qkv = torch.randn(2 * 41 * C3).to(device, torch.float16).as_strided((2, 40, C3), (40 * C3 + 8, C3, 1))
    with small():
        assert served_by(lambda: causal_attention(qkv, H, **options)) == PLAIN
        if not options.get("dropout_p"):
            rule(qkv, H, **options)


def test_a_gpu_without_descriptors_goes_the_plain_way(device, monkeypatch):
    monkeypatch.setattr(_device, "INTERPRETED", False)
    for capability, has in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((9, 4), False)):
        monkeypatch.setattr(_device, "capability", lambda device, capability=capability: capability)
        with on():
            launch = _attention_tma.tma_launch(1, 40, 2, 64, torch.bfloat16, device, 0.125)
        assert (launch is not None) is has, capability


def test_traced_code_goes_the_plain_way(device):
    qkv = packed(1, 40, 2, 64, torch.float16, device)
    assert describable(qkv)
    with traced():
        assert not describable(qkv)


def test_its_row_is_one_that_tests_and_bench_can_replace():
    assert tuning_key("attention_tma_fwd", torch.bfloat16, 64) in _tuning.TABLE


# ---------------------------------------------------------------------------------------------------------- memory


@interpreted
def test_it_reads_strided_rows_and_nothing_around_them(device):
    """NaN around and between the rows: what lies past T is 0 by the descriptor, not what memory holds there."""
    qkv = torch.randn(2, 37, 3 * 128 + 8).to(device, torch.float16)[..., :384].requires_grad_()
    with small():
        plain = causal_attention(qkv, 2)
        with red_zones() as zone:
            assert served_by(lambda: causal_attention(zone(qkv), 2)) == TMA
            assert torch.equal(causal_attention(zone(qkv), 2), plain)
    torch.testing.assert_close(plain, causal_attention(qkv, 2), rtol=2**-9, atol=2**-10)


@interpreted
def test_rows_past_32_bits(device):
    qkv = packed(3, 5, 1, 64, torch.float16, device)
    with small():
        assert torch.equal(causal_attention(far_apart(qkv), 1), causal_attention(qkv, 1))


# --------------------------------------------------------------------------------------------------- compiled code


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> dict:
    return compiled_loops("forward", tmp_path_factory.mktemp("tma"))


def test_the_softmax_of_a_tile_runs_under_a_product(loops):
    """After scores are waited for, nothing is waited for until the next ones: p v of the tile before runs meanwhile."""
    assert loops["ttgir"] == [["product", "wait", "product", "exp2", "exp2"]]


def test_the_machine_code_has_it_in_that_order(loops):
    """In the SASS loop too: exponentials stand between the products that they do not depend on, one wait a step."""
    (sass,) = loops["sass"]
    assert sass.count("wait") == 1
    after = sass[sass.index("wait") + 1 :]
    products = [place for place, what in enumerate(after) if what == "HGMMA"]
    assert "MUFU.EX2" in after[products[0] : products[-1]]


def test_it_reads_by_descriptors_and_spills_nothing(loops):
    assert loops["UTMALDG"] >= 3 and loops["spills"] == 0
