"""The MLP with GELU in its products: against fp64 by both ways of loading, and what it writes, launches and refuses.

What it has in common with `mlp` is in test_mlp.py.
"""

from unittest import mock

import pytest
import torch
from interpreter import count_launches
from numerics import check
from test_mlp import NAMES, strided_gradient, tensors
from torch.utils.checkpoint import checkpoint

from fastgpt2.bench.timing.tune import overridden
from fastgpt2.kernels import _device, _gelu_product, _tuning
from fastgpt2.kernels._configurations import GeluProduct, Key, Mlp
from fastgpt2.kernels.mlp import fused_mlp, mlp, mlp_reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
SMALL = GeluProduct(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP_M=4, PIECES=2, num_warps=4, num_stages=2)


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request, monkeypatch, device):
    """How tiles are loaded."""
    wanted = request.param == "descriptors"
    if wanted and device.type == "cuda" and not _device.has_tensor_descriptors(device):
        pytest.skip("this GPU has no tensor descriptors")
    monkeypatch.setattr(_device, "has_tensor_descriptors", lambda device: wanted)
    return request.param


@pytest.fixture
def small_tiles():
    """Tiles so small that tensors of a test have many, in groups of which the last is not full."""
    rows = {Key(f"gelu_product_{d}", bits=bits): SMALL._asdict() for d in ("fwd", "bwd") for bits in (16, 32, 64)}
    with overridden(rows):
        yield


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape, H", [((2, 5, 7), 28), ((131, 64), 256), ((67, 24), 104)])
def test_fused_mlp(shape, H, dtype, loads, device):
    check(fused_mlp, mlp_reference, *tensors(*shape, H=H, dtype=dtype, device=device), names=NAMES)


def test_gpt2_width(loads, device):
    """Wider models: test_guards.py."""
    check(fused_mlp, mlp_reference, *tensors(3, 768, H=3072, dtype=torch.bfloat16, device=device), names=NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("N, C, H, O", [(83, 24, 104, 40), (81, 17, 67, 9), (16, 16, 32, 16)])
def test_many_tiles(N, C, H, O, dtype, loads, small_tiles, device):  # noqa: E741
    check(fused_mlp, mlp_reference, *tensors(N, C, H=H, O=O, dtype=dtype, device=device), names=NAMES)


@pytest.mark.parametrize("what", ["sliced", "transposed", "expanded", "one row", "Conv1D", "every other column"])
def test_strides(what, loads, device):
    """Conv1D: weights (in, out), as views (out, in)."""
    half = dict(dtype=torch.float16, device=device)
    x, *parameters = tensors(4, 6, 24, H=96, **half)
    base = torch.randn(4, 6, 40, **half)
    if what in ("Conv1D", "every other column"):
        for i in (0, 2):
            rows, columns = parameters[i].shape
            wide = torch.empty(rows, 2 * columns, **half)
            wide[:, ::2] = parameters[i]
            parameters[i] = parameters[i].t().contiguous().t() if what == "Conv1D" else wide[:, ::2]
    else:
        x = {
            "sliced": base[..., 3:27],
            "transposed": base.transpose(0, 1)[..., :24],
            "expanded": base[:1, :1, :24].expand(4, 6, 24),
            "one row": base[0, 0, :24],
        }[what]
    check(fused_mlp, mlp_reference, x, *parameters, names=NAMES)


@pytest.mark.parametrize("shape", ["scalar", "row", "transposed"])
def test_strides_of_gradients(shape, loads, device):
    inputs = tensors(9, 24, H=96, dtype=torch.float16, device=device)
    check(fused_mlp, mlp_reference, *inputs, names=NAMES, upstream=strided_gradient(shape))


def test_descriptors_are_used_where_they_can_hold_both_matrices(device):
    half = dict(dtype=torch.float16, device=device)
    a, b = torch.zeros(32, 64, **half), torch.zeros(64, 48, **half)
    apart = torch.zeros(32 * 64 + 1, **half)[1:].view(32, 64)  # begins 2 bytes after a multiple of 16

    def used(a, b, has=True):
        with mock.patch.object(_device, "has_tensor_descriptors", lambda device: has):
            return _gelu_product._prepared("gelu_product_fwd", a, b)[2]

    assert used(a, b) and used(a, torch.zeros(48, 64, **half).t()) and used(torch.zeros(32, 72, **half)[:, :64], b)
    assert not used(a, b, has=False), "the architecture has none"
    assert not used(a.float(), b.float()), "only 16-bit elements"
    assert not used(torch.zeros(32, 65, **half)[:, :64], b), "rows that start at odd addresses"
    assert not used(a, torch.zeros(64, 47, **half)) and not used(apart, b)
    assert not used(a[:1].expand(32, 64), b), "rows at one address"


def test_rounds_where_a_pass_of_its_own_does(device):
    """So the pre-activation that is kept and the activation are those of `mlp`, but for sums in another order."""
    x, fc_weight, fc_bias, *_ = tensors(40, 64, H=96, dtype=torch.bfloat16, device=device)
    act, pre = _gelu_product.gelu_product_fwd(x, fc_weight.t(), fc_bias, True)
    torch.testing.assert_close(act, mlp_of(pre, fc_bias), rtol=2**-7, atol=1e-30)


def mlp_of(pre, bias):
    wide = pre.float() + bias.float()
    return torch.nn.functional.gelu(wide.double(), approximate="tanh").to(pre.dtype)


def test_opcheck(device):
    inputs = [t.requires_grad_() for t in tensors(2, 3, 4, H=16, device=device)]
    for keep_pre in (True, False):
        own = inputs if keep_pre else [t.detach() for t in inputs]
        torch.library.opcheck(torch.ops.fastgpt2.mlp_fwd.default, (*own, keep_pre, True))
    bwd = (torch.randn(6, 4, device=device), inputs[0].detach(), torch.randn(2, 3, 16, device=device))
    bwd += tuple(t.detach() for t in inputs[1:4])
    torch.library.opcheck(torch.ops.fastgpt2.mlp_bwd.default, (*bwd, [True] * 5, True, *(torch.float32,) * 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device):
    inputs = [t.requires_grad_() for t in tensors(9, 12, H=40, device=device)]

    def gradients(function):
        return torch.autograd.grad(function(*inputs).square().sum(), inputs)

    if reentrant:  # it supports .backward() alone
        checkpoint(fused_mlp, *inputs, use_reentrant=True).square().sum().backward()
        again = [t.grad for t in inputs]
    else:
        again = gradients(lambda *t: checkpoint(fused_mlp, *t, use_reentrant=False))
    assert all(map(torch.equal, gradients(fused_mlp), again))


def test_functional_gradients(device):
    inputs = tuple(tensors(3, 5, 8, H=32, device=device))

    def loss(x, *parameters):
        return fused_mlp(x, *parameters).square().sum()

    one = torch.func.grad(loss, argnums=tuple(range(5)))(*inputs)
    many = torch.func.vmap(torch.func.grad(loss, argnums=(1, 3)), in_dims=(0, *(None,) * 4))(*inputs)
    own = [t.clone().requires_grad_() for t in inputs]
    for got, expected in zip(one, torch.autograd.grad(loss(*own), own), strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(many, (one[1], one[3]), strict=True):
        torch.testing.assert_close(got.sum(0), expected)


def test_second_derivatives_are_refused(device):
    inputs = [t.requires_grad_() for t in tensors(3, 4, H=8, device=device)]
    with pytest.raises(RuntimeError, match="no second derivative.*mlp='torch'"):
        torch.autograd.grad(fused_mlp(*inputs).sum(), inputs, create_graph=True)


def test_repeated_runs_are_bitwise_equal(loads, small_tiles, device):
    inputs = [t.requires_grad_() for t in tensors(150, 16, H=40, dtype=torch.float16, device=device)]

    def run():
        return torch.autograd.grad(fused_mlp(*inputs).square().sum(), inputs)

    assert all(map(torch.equal, run(), run()))


def test_launches_bytes_and_kept_tensors(device):
    """One launch forward and two backward. Kept are x, the pre-activation and the weights; without gradients, the
    pre-activation is not written."""
    N, C, H = 96, 16, 64
    inputs, kept = [t.requires_grad_() for t in tensors(N, C, H=H, dtype=torch.float16, device=device)], []
    with (
        count_launches() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = fused_mlp(*inputs)
    with count_launches() as backward:
        torch.autograd.grad(y.sum(), inputs)
    with count_launches() as alone, torch.no_grad():
        fused_mlp(*inputs)
    names = [[launch.name for launch in log] for log in (forward, backward, alone)]
    assert names == [["_gelu_product_kernel"], ["_gelu_product_kernel", "_column_sum_kernel"], ["_gelu_product_kernel"]]
    own = {t.data_ptr() for t in inputs}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(N, H)]
    if device.type == "cuda":
        return
    x, weight, bias, pre = 2 * N * C, 2 * C * H, 2 * H, 2 * N * H
    assert (forward[0].bytes_read, forward[0].bytes_written) == (x + weight + bias, 2 * pre)
    assert (alone[0].bytes_read, alone[0].bytes_written) == (x + weight + bias, pre)
    assert (backward[0].bytes_read, backward[0].bytes_written) == (x + weight + bias + pre, 2 * pre + 4 * H)


@pytest.mark.parametrize("forward, backward", [(True, False), (False, True), (False, False)])
def test_the_table_decides_for_mlp(forward, backward, device):
    inputs = [t.requires_grad_() for t in tensors(20, 16, H=64, dtype=torch.float16, device=device)]
    rows = {Key("mlp_fwd", bits=16): Mlp(forward)._asdict(), Key("mlp_bwd", bits=16): Mlp(backward)._asdict()}
    with overridden(rows):
        with count_launches() as first:
            y = mlp(*inputs)
        with count_launches() as second:
            torch.autograd.grad(y.sum(), inputs)
    product = "_gelu_product_kernel"
    assert [launch.name for launch in first] == [product if forward else "_gelu_fwd_kernel"]
    assert second[0].name == (product if backward else "_gelu_bwd_kernel")


def test_no_architecture_is_fused_before_it_was_measured():
    """An entry that is True belongs to an architecture in TUNED: `fastgpt2 bench tune` wrote it."""
    for key, rows in _tuning.TABLE.items():
        if key.op in ("mlp_fwd", "mlp_bwd"):
            assert {a for a, row in rows.items() if row.FUSED} <= _tuning.TUNED.keys(), key


def test_errors_name_the_switch(device):
    with pytest.raises(TypeError, match="mlp: x is torch.int64.*mlp='torch'"):
        fused_mlp(torch.ones(3, 8, device=device).long(), *tensors(1, 8, H=16, device=device)[1:])
