"""A few rows' linear layer with LayerNorm, GELU and sum in one launch: numbers, layouts, operator, bad input."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import DTYPES, interpreted
from hypothesis import given
from hypothesis import strategies as st
from interpreter import count_launches, far_apart, grid_order, red_zones
from numerics import check

from fastgpt2.kernels import _device
from fastgpt2.kernels.decode_linear import decode_linear, decode_linear_reference

# What GPT-2 asks for: c_attn, the projections, c_fc, the head; then all and nothing of it.
PARTS = {
    "norm": ("bias", "norm_weight", "norm_bias"),
    "residual": ("bias", "residual"),
    "norm-gelu": ("bias", "norm_weight", "norm_bias", "gelu"),
    "head": (),
    "all": ("bias", "norm_weight", "norm_bias", "gelu", "residual"),
    "no-biases": ("norm_weight", "gelu", "residual"),
}


def inputs_of(M, K, N, parts, dtype, device, mean=0.0):
    """-> the tensors by name, of the scale that GPT-2's have, and whether GELU is asked for."""
    shapes = dict(x=(M, K), weight=(N, K), bias=(N,), norm_weight=(K,), norm_bias=(K,), residual=(M, N))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items() if name in ("x", "weight", *parts)}
    tensors["x"] += mean
    tensors["weight"] *= K**-0.5
    return {name: t.to(device, dtype) for name, t in tensors.items()}, "gelu" in parts


def rule(tensors, gelu, **options):
    names = tuple(tensors)

    def named(function):
        def run(*args):
            given = dict(zip(names, args, strict=True))
            return function(given.pop("x"), given.pop("weight"), given.pop("bias", None), gelu=gelu, **given)

        return run

    # Eager PyTorch rounds after every op, so do we after two of them.
    check(
        named(decode_linear),
        named(decode_linear_reference),
        *tensors.values(),
        names=names,
        grads=False,
        roundings=2,
        **options,
    )


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("M", (1, 3, 17))
def test_rule(device, M, parts, dtype):
    """A row alone, and both numbers of rows that a program takes, not filled; widths past the end of a tile."""
    for K, N in ((40, 24), (257, 19)):
        rule(*inputs_of(M, K, N, PARTS[parts], dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", (768, 1024, 1280, 1600))
def test_rule_at_gpt2_widths(device, C, dtype):
    """Some columns of c_attn and of the MLP's second projection, as many as show every tile."""
    for M, K, parts in ((1, C, "norm"), (8, C, "norm-gelu"), (1, 4 * C, "residual"), (2, 4 * C, "residual")):
        rule(*inputs_of(M, K, 17, PARTS[parts], dtype, device))


@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (1, 17, 5), (2, 1, 3), (33, 16, 16), (40, 33, 65), (1, 1025, 9)])
def test_odd_shapes(device, M, K, N):
    for parts in ("all", "head"):
        rule(*inputs_of(M, K, N, PARTS[parts], torch.float32, device), cancelling=1.0)


@pytest.mark.parametrize("M", (1, 3))
def test_double_precision(device, M):
    """Nothing on the way is rounded to float32."""
    tensors, gelu = inputs_of(M, 300, 20, PARTS["all"], torch.float64, device)
    args = tensors.pop("x"), tensors.pop("weight"), tensors.pop("bias")
    ours = decode_linear(*args, gelu=gelu, **tensors)
    torch.testing.assert_close(ours, decode_linear_reference(*args, gelu=gelu, **tensors), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("M", (1, 2))
@pytest.mark.parametrize("row", ("large mean", "equal values", "one huge element", "nearly equal values"))
def test_hard_rows_of_a_layer_norm(device, row, M, dtype):
    for K in (300, 1100):  # in one tile, over several
        tensors, gelu = inputs_of(M, K, 8, PARTS["norm"], dtype, device)
        if row == "large mean":
            tensors["x"] += 100.0
        elif row == "one huge element":
            tensors["x"][:, K // 2] = 1e4
        else:
            tensors["x"][:] = 3.0
            tensors["x"][:, K - 1] += 0.01 * (row == "nearly equal values")
        rule(tensors, gelu, rows=True, cancelling=1.0)


@pytest.mark.parametrize("M", (1, 2))
def test_roundings_are_those_of_the_separate_ops(device, M):
    """In 16 bits a token's numbers are those of a pass over all: h and the product are rounded where it rounds them."""
    tensors, _ = inputs_of(M, 64, 1024, PARTS["all"], torch.float16, device)
    x, w, b = tensors["x"], tensors["weight"], tensors["bias"].float()
    h = F.layer_norm(x.float(), (64,), tensors["norm_weight"].float(), tensors["norm_bias"].float()).half()
    p = (h.double() @ w.double().T).half().float()
    act = F.gelu(p + b, approximate="tanh") + tensors["residual"].float()
    ours = decode_linear(x, w, tensors["bias"], gelu=True, **{k: tensors[k] for k in PARTS["norm"][1:] + ("residual",)})
    assert (ours == act.half()).float().mean() > 0.995  # a product on the edge of two numbers may go to either


def test_mixed_dtypes(device):
    """Parameters of the norm, the bias and the residual stream in float32; the result is the stream's."""
    tensors, gelu = inputs_of(2, 40, 24, PARTS["all"], torch.float32, device)
    tensors = {k: t.half() if k in ("x", "weight") else t for k, t in tensors.items()}
    args = {k: tensors[k] for k in ("x", "weight", "bias")}
    more = {k: t for k, t in tensors.items() if k not in args}
    ours = decode_linear(*args.values(), gelu=gelu, **more)
    truth = decode_linear_reference(
        *(t.double() for t in args.values()), gelu=gelu, **{k: t.double() for k, t in more.items()}
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, atol=4e-3, rtol=2e-3)


@given(data=st.data())
def test_fuzz(device, data):
    M, K, N = (data.draw(st.integers(1, most), name) for name, most in (("M", 35), ("K", 300), ("N", 70)))
    parts = data.draw(st.sampled_from(sorted(PARTS)), "parts")
    dtype = data.draw(st.sampled_from((*DTYPES, torch.float64)), "dtype")
    multiprocessors = data.draw(st.integers(1, 10), "multiprocessors")
    torch.manual_seed(data.draw(st.integers(0, 9), "seed"))
    mean = data.draw(st.sampled_from((0.0, 5.0)), "mean")
    with mock.patch.object(_device, "sm_count", lambda device: multiprocessors):
        rule(*inputs_of(M, K, N, PARTS[parts], dtype, device, mean), cancelling=1.0)


# --------------------------------------------------------------------------------------------- layouts and launches


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 1, 40), (40,), (0, 40), (2, 0, 40)], ids=str)
def test_leading_dimensions(device, shape):
    x, w = torch.randn(shape, device=device), torch.randn(24, 40, device=device)
    residual = torch.randn(*shape[:-1], 24, device=device)
    ours = decode_linear(x, w, residual=residual)
    torch.testing.assert_close(ours, residual + x @ w.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("M", (1, 3))
def test_strides(device, M):
    tensors, gelu = inputs_of(M, 40, 24, PARTS["all"], torch.float32, device)

    def strided(t):
        wide = torch.randn(*t.shape[:-1], 2 * t.shape[-1] + 3, device=device)
        yield wide[..., : t.shape[-1]]
        yield wide[..., 1 : 2 * t.shape[-1] : 2]
        yield wide[..., :1].expand(t.shape)
        if t.dim() == 2:
            yield torch.randn(t.shape[::-1], device=device).t()
            yield torch.randn(1, t.shape[1], device=device).expand(t.shape)

    for name, t in tensors.items():
        for other in strided(t):
            rule({**tensors, name: other}, gelu, cancelling=1.0)


@pytest.mark.parametrize("M", (1, 3))
def test_same_bits_every_time_for_every_order_and_inside_its_memory(device, M):
    tensors, gelu = inputs_of(M, 72, 50, PARTS["all"], torch.float16, device)
    args = tensors.pop("x"), tensors.pop("weight"), tensors.pop("bias")
    first = decode_linear(*args, gelu=gelu, **tensors)
    assert torch.equal(decode_linear(*args, gelu=gelu, **tensors), first)
    assert torch.equal(decode_linear(*args, gelu=gelu, overlap=True, **tensors), first)
    with red_zones() as zone:
        within = decode_linear(*map(zone, args), gelu=gelu, **{k: zone(t) for k, t in tensors.items()})
    assert torch.equal(within, first)
    if _device.INTERPRETED:
        with grid_order("reversed"):
            assert torch.equal(decode_linear(*args, gelu=gelu, **tensors), first)


@interpreted
@pytest.mark.parametrize("what", ("x", "weight", "residual"))
def test_offsets_have_64_bits(device, what):
    tensors, _ = inputs_of(3, 16, 3, PARTS["residual"], torch.bfloat16, device)
    expected = decode_linear(**tensors)
    assert torch.equal(decode_linear(**{**tensors, what: far_apart(tensors[what])}), expected)


@interpreted
def test_one_launch_for_every_number_of_rows(device):
    for M, N, programs in ((1, 70, (18, 1)), (1, 9, (3, 1)), (16, 70, (3, 1)), (32, 70, (3, 1)), (70, 16, (2, 3))):
        tensors, gelu = inputs_of(M, 24, N, PARTS["all"], torch.float32, device)
        with mock.patch.object(_device, "sm_count", lambda device: 2), count_launches() as log:
            rule(tensors, gelu)
        assert [(launch.name, launch.grid[:2]) for launch in log] == [("_decode_linear_kernel", programs)]


@interpreted
@pytest.mark.parametrize("M", (1, 16))
def test_weights_are_read_once(device, M):
    K, N = 256, 64
    tensors, _ = inputs_of(M, K, N, PARTS["norm"], torch.bfloat16, device)
    with mock.patch.object(_device, "sm_count", lambda device: 4), count_launches() as log:
        decode_linear(**tensors)
    (launch,) = log
    assert launch.bytes_read == sum(t.nbytes for t in tensors.values())
    assert launch.bytes_written == 2 * M * N


# ---------------------------------------------------------------------------------------------------- the operator


def test_opcheck(device):
    for M, parts in itertools.product((1, 2), ("all", "head")):
        tensors, gelu = inputs_of(M, 24, 16, PARTS[parts], torch.float32, device)
        columns = (tensors.get(name) for name in ("bias", "norm_weight", "norm_bias"))
        args = tensors["x"], tensors["weight"], *columns, 1e-5, gelu, tensors.get("residual"), True
        torch.library.opcheck(torch.ops.fastgpt2.decode_linear_fwd.default, args)


def test_compiled_whole(device):
    tensors, gelu = inputs_of(2, 24, 16, PARTS["all"], torch.float32, device)

    def step(x, **rest):
        return decode_linear(2 * x, gelu=gelu, **rest) + 1

    expected = step(**tensors)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**tensors), expected)


@pytest.mark.parametrize("name", ("x", "weight", "bias", "norm_weight", "norm_bias", "residual"))
def test_gradients_are_refused_where_they_would_be_lost(device, name):
    tensors, gelu = inputs_of(2, 24, 16, PARTS["all"], torch.float32, device)
    expected = decode_linear(**tensors, gelu=gelu)
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} is a tensor that requires grad, allowed is a call under torch.no_gr"):
        decode_linear(**tensors, gelu=gelu)
    with torch.no_grad():
        assert torch.equal(decode_linear(**tensors, gelu=gelu), expected)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(x=(2, 25)), ValueError, r"shapes \(2, 25\) and \(16, 24\), expected \(..., K\) and \(N, K\)"),
        (dict(x=()), ValueError, "expected"),
        (dict(weight=(16, 24, 1)), ValueError, "expected"),
        (dict(x=(2, 0), weight=(16, 0), norm_weight=(0,), norm_bias=(0,)), ValueError, "K at least 1"),
        (dict(bias=(24,)), ValueError, r"bias has shape \(24,\), expected \(16,\)"),
        (dict(norm_weight=(16,)), ValueError, r"norm_weight has shape \(16,\), expected \(24,\)"),
        (dict(norm_bias=(1, 24)), ValueError, r"norm_bias has shape \(1, 24\), expected \(24,\)"),
        (dict(residual=(16,)), ValueError, r"residual has shape \(16,\), expected \(2, 16\)"),
        (dict(norm_weight=None), ValueError, "norm_bias is given without norm_weight"),
        (dict(weight=torch.float16), TypeError, "weight is torch.float16, expected x's torch.float32"),
        (dict(bias=torch.int32), TypeError, "bias is torch.int32, allowed are"),
    ],
    ids=str,
)
def test_bad_input(device, wrong, error, message):
    tensors, gelu = inputs_of(2, 24, 16, PARTS["all"], torch.float32, device)
    for name, change in wrong.items():
        if change is None:
            del tensors[name]
        elif isinstance(change, torch.dtype):
            tensors[name] = tensors[name].to(change)
        else:
            tensors[name] = torch.zeros(change, device=device)
    with pytest.raises(error, match=f"{message}.*layer_norm='torch' or mlp='torch'"):
        decode_linear(**tensors, gelu=gelu)
