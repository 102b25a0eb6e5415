"""Attention's gradient by descriptors: numbers, which calls it serves, memory, and the order of its compiled loops."""

import itertools

import pytest
import torch
from attention_inputs import UNSERVED, compiled_loops, interpreted, packed, rule, tiles, unserved
from interpreter import count_launches, far_apart, red_zones

from fastgpt2.bench.cases.ops.attention import by_tma
from fastgpt2.kernels import _attention_tma_backward, _device, _tuning
from fastgpt2.kernels._attention_tiles import tuning_key
from fastgpt2.kernels.attention import causal_attention, causal_attention_fwd
from fastgpt2.kernels.attention_backward import causal_attention_bwd

OPTIONS = (0.125, 0.0, None, None, None, False)  # scale, and all others off
DELTA, PLAIN, TMA = "_attention_delta_kernel", "_attention_bwd_kernel", "_attention_tma_bwd_kernel"
pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no descriptors"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


def on(BLOCK: int = 32, STEP: int = 16):
    """The kernel switched on. By default tiles are so small that short inputs have every kind."""
    return tiles(ON=True, BLOCK=BLOCK, STEP=STEP, BLOCK_M=32, BLOCK_N=16)


def backward(dout: torch.Tensor, qkv: torch.Tensor, H: int) -> torch.Tensor:
    return causal_attention_bwd(dout, qkv, *causal_attention_fwd(qkv, H, *OPTIONS), H, *OPTIONS)[0]


def launched_by(run) -> list[str]:
    with count_launches() as log:
        run()
    return [launch.name for launch in log if "_fwd_" not in launch.name]


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "T, dtype",
    [*((T, torch.bfloat16) for T in (1, 15, 16, 31, 32, 33, 64, 97)), *((T, torch.float16) for T in (17, 80))],
    ids=str,
)
def test_rule_on_small_tiles(device, T, dtype):
    with on():
        assert TMA in launched_by(lambda: rule(packed(2, T, 2, 64, dtype, device), 2))


@pytest.mark.parametrize("BLOCK, STEP, T", [(128, 64, 1), (128, 64, 200), (128, 64, 321), (64, 64, 130), (64, 16, 70)])
def test_rule_on_the_tables_tiles(device, BLOCK, STEP, T):
    with on(BLOCK, STEP):
        rule(packed(1, T, 1, 64, torch.float16, device), 1)


def test_rule_with_three_heads_and_rows_and_another_scale(device):
    with on():
        rule(packed(3, 40, 3, 64, torch.bfloat16, device), 3, scale=0.3)


def test_large_scores(device):
    with on():
        rule(20 * packed(2, 50, 2, 64, torch.float16, device), 2, scale=0.5)


@pytest.mark.parametrize("T", [1, 33, 200])
def test_it_is_the_plain_kernel_to_rounding(device, T):
    qkv, dout = packed(2, T, 2, 64, torch.float16, device), torch.randn(2, T, 128).to(device, torch.float16)
    plain = backward(dout, qkv, 2)
    with on():
        dqkv = backward(dout, qkv, 2)
    torch.testing.assert_close(dqkv, plain, rtol=2**-9, atol=2**-9 * plain.abs().max().item())


def test_runs_are_equal_bit_for_bit(device):
    qkv, dout = packed(2, 70, 2, 64, torch.bfloat16, device), torch.randn(2, 70, 128).to(device, torch.bfloat16)
    with on():
        assert torch.equal(backward(dout, qkv, 2), backward(dout, qkv, 2))


@pytest.mark.parametrize("upstream", ["wider rows", "a part", "expanded", "time first", "address"])
def test_strided_gradients_of_the_output(device, upstream):
    """Those that a descriptor can hold are read as they are, the others by the plain kernel."""
    qkv = packed(2, 40, 2, 64, torch.float16, device)

    def strided(out: torch.Tensor) -> torch.Tensor:
        random = torch.randn(3, 48, 192).to(device, out.dtype)
        if upstream == "wider rows":
            return random[1:, :40, 64:]
        if upstream == "a part":
            return random[::2, 8:, :128]
        if upstream == "expanded":
            return random[:1, :40, :128].expand(2, -1, -1)
        if upstream == "time first":
            return random.reshape(72, 3, 128)[:40, :2].transpose(0, 1)
        return random[:2, :40, 4:132]

    wanted = TMA if upstream in ("wider rows", "a part") else PLAIN
    with on():
        assert wanted in launched_by(lambda: rule(qkv, 2, upstream=strided))


# ---------------------------------------------------------------------------------------------- which calls it serves


def test_the_table_has_it_off_everywhere():
    """Nothing was measured. Whoever switches it on after `bench tune` changes this test with the row."""
    rows = {key: found for key, found in _tuning.TABLE.items() if key.op == "attention_tma_bwd"}
    assert rows and not any(row.ON for found in rows.values() for row in found.values())
    assert tuning_key("attention_tma_bwd", torch.bfloat16, 64) in rows


def gradient_launches(attention, qkv: torch.Tensor) -> list[str]:
    x = qkv.requires_grad_()
    out = attention(x)
    return launched_by(lambda: torch.autograd.grad(out, x, torch.ones_like(out)))


def test_two_launches_and_no_copy_when_it_is_on(device):
    qkv = packed(2, 40, 2, 64, torch.float16, device)
    assert gradient_launches(lambda x: causal_attention(x, 2), qkv) == [DELTA, PLAIN], "the table has it off"
    with on():
        assert gradient_launches(lambda x: causal_attention(x, 2), qkv) == [DELTA, TMA]
        assert gradient_launches(lambda x: causal_attention(x, 2), qkv.detach()[1:, 8:]) == [DELTA, TMA]
    assert gradient_launches(lambda x: by_tma(2, x), qkv) == [DELTA, TMA], "the bench's way to switch it on"


@pytest.mark.parametrize("what", UNSERVED)
def test_all_others_go_the_plain_way(device, what):
    qkv, H, options = unserved(what, 24, device)
    with on():
        assert gradient_launches(lambda x: causal_attention(x, H, **options), qkv) == [DELTA, PLAIN]


def test_traced_code_goes_the_plain_way(device, monkeypatch):
    qkv = packed(2, 24, 2, 64, torch.float16, device)
    monkeypatch.setattr("fastgpt2.kernels._descriptors.is_traced", lambda: True)
    with on():
        assert gradient_launches(lambda x: causal_attention(x, 2), qkv) == [DELTA, PLAIN]


def test_a_gpu_without_descriptors_goes_the_plain_way(device, monkeypatch):
    monkeypatch.setattr(_device, "INTERPRETED", False)
    for capability, has in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((9, 4), False)):
        monkeypatch.setattr(_device, "capability", lambda device, capability=capability: capability)
        with on():
            launch = _attention_tma_backward.tma_bwd_launch(1, 40, 2, 64, torch.bfloat16, device, 0.125)
        assert (launch is not None) is has, capability


# ---------------------------------------------------------------------------------------------------------- memory


@interpreted
def test_it_touches_strided_rows_and_nothing_around_them(device):
    """NaN around and between the rows: what lies past T is 0 by the descriptors, not what memory holds there."""
    qkv = torch.randn(2, 37, 392).to(device, torch.float16)[..., :384]
    dout = torch.randn(2, 37, 136).to(device, torch.float16)[..., :128]
    out, lse = causal_attention_fwd(qkv, 2, *OPTIONS)
    with on():
        plain, _ = causal_attention_bwd(dout, qkv, out, lse, 2, *OPTIONS)
        with red_zones() as zone:
            inside = [zone(x) for x in (dout, qkv, out, lse)]
            assert launched_by(lambda: causal_attention_bwd(*inside, 2, *OPTIONS)) == [DELTA, TMA]
            assert torch.equal(causal_attention_bwd(*inside, 2, *OPTIONS)[0], plain)


@interpreted
def test_rows_past_32_bits(device):
    qkv, dout = packed(3, 5, 1, 64, torch.float16, device), torch.randn(3, 5, 64).to(device, torch.float16)
    with on():
        assert torch.equal(backward(far_apart(dout), far_apart(qkv), 1), backward(dout, qkv, 1))


# --------------------------------------------------------------------------------------------------- compiled code


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> dict:
    return compiled_loops("backward", tmp_path_factory.mktemp("tma"))


def test_products_run_under_the_arithmetic(loops):
    """dk of the step before after the scores, under p; dv after dp, under ds. dq of the step before under p and ds."""
    dkv = ["product", "wait", "product", "exp2", "product", "wait", "product"]
    dq = ["product", "wait", "product", "wait", "product", "exp2"]
    assert loops["kernel"] == TMA and loops["ttgir"] == [dkv, dq]


def test_the_machine_code_has_them_in_that_order(loops):
    """The assembler keeps products asynchronous: two waits a step, none after each product."""
    dkv, dq = loops["sass"]
    runs = [what for what, _ in itertools.groupby(dkv)]
    assert runs == ["HGMMA", "wait", "HGMMA", "MUFU.EX2", "HGMMA", "wait", "HGMMA"]
    assert dq.count("wait") == 2
    after = dq[len(dq) - dq[::-1].index("wait") :]
    products = [place for place, what in enumerate(after) if what == "HGMMA"]
    assert "MUFU.EX2" in after[products[0] : products[-1]]


def test_it_reads_by_descriptors_and_spills_nothing(loops):
    assert loops["UTMALDG"] >= 7 and loops["spills"] == 0


def test_the_bias_gets_the_sum_of_what_it_computes(device):
    """c_attn's bias: this kernel leaves the sums of its tiles out."""
    qkv, dout = packed(2, 40, 2, 64, torch.float16, device), torch.randn(2, 40, 128).to(device, torch.float16)
    out, lse = causal_attention_fwd(qkv, 2, *OPTIONS)
    with on():
        dqkv, dbias = causal_attention_bwd(dout, qkv, out, lse, 2, *OPTIONS, torch.float32)
    torch.testing.assert_close(dbias, dqkv.double().sum((0, 1)).float(), rtol=1e-6, atol=1e-6)
