"""The test support itself: each guard is shown to catch the mistake that it is there for."""

import interpreter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from interpreter import OutOfBounds, count_launches, grid_order, red_zones
from numerics import check

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="about the interpreter")


@triton.jit
def _scale_kernel(
    x_ptr, y_ptr, N, factor, UPCAST: tl.constexpr, MASK: tl.constexpr, OTHER: tl.constexpr, B: tl.constexpr
):
    offs = tl.program_id(0) * B + tl.arange(0, B)
    mask = offs < N if MASK else offs < N + 1
    if OTHER:
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + offs, mask=mask)
    if UPCAST:
        x = x.to(tl.float32)
    y = x * factor if OTHER else x * factor + tl.sum(x, 0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def scale(x, factor=2.0, upcast=True, mask=True, other=True, block=32):
    y = torch.empty_like(x)
    _scale_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), factor, upcast, mask, other, block)
    return y


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, B: tl.constexpr):
    offs = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(c_ptr + offs, c.to(c_ptr.dtype.element_ty))


def dot(a, b, precision="ieee"):
    c = torch.empty_like(a)
    _dot_kernel[(1,)](a, b, c, precision, a.shape[0])
    return c


@triton.jit
def _neighbour_kernel(x_ptr, y_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(x_ptr + pid) + tl.load(y_ptr + pid - 1, mask=pid > 0, other=0.0))


# ------------------------------------------------------------------------------------------------- the interpreter


@interpreted
def test_bfloat16_rounds_to_nearest_even():
    x = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    x[:4] = torch.tensor([1 + 3 / 512, float("inf"), float("-inf"), 1 + 1 / 256])
    bits = interpreter.bfloat16_bits(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(interpreter.bfloat16_values(bits), x.bfloat16().float().numpy())
    assert np.isnan(interpreter.bfloat16_values(interpreter.bfloat16_bits(np.array([np.nan], np.float32))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_kernels_compute_in_every_dtype(dtype, device):
    x = torch.randn(100, device=device).to(dtype)
    assert torch.equal(scale(x, 3.0), (x.float() * 3.0).to(dtype))


@interpreted
def test_bfloat16_arithmetic_without_upcast_is_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to float32"):
        scale(torch.randn(100, dtype=torch.bfloat16), upcast=False)
    scale(torch.randn(100, dtype=torch.float16), upcast=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dot_multiplies_values(dtype, device):
    a, b = (torch.randn(16, 16, device=device).to(dtype) for _ in range(2))
    check(dot, torch.matmul, a, b, grads=False)


def test_dot_in_tf32_is_seen_as_inexact(device):
    a, b = torch.randn(16, 16, device=device), torch.randn(16, 16, device=device)
    with pytest.raises(AssertionError, match="max error"):
        check(lambda a, b: dot(a, b, "tf32"), torch.matmul, a, b, grads=False)


@interpreted
def test_masked_load_without_other_is_nan():
    assert scale(torch.ones(31), other=False, block=32).isnan().all()
    assert scale(torch.ones(32), other=False, block=32).isfinite().all()


@interpreted
def test_order_of_programs_is_changed():
    def prefix_sum(x):
        y = torch.zeros_like(x)
        _neighbour_kernel[(x.numel(),)](x, y)
        return y

    x = torch.ones(16)
    assert torch.equal(prefix_sum(x), x.cumsum(0))
    for order in ("reversed", "shuffled"):
        with grid_order(order):
            assert not torch.equal(prefix_sum(x), x.cumsum(0))
            assert torch.equal(scale(x, block=4), 2 * x)
    with pytest.raises(ValueError, match="sideways"), grid_order("sideways"):
        pass


def test_launches_are_counted(device):
    x = torch.randn(1000, device=device)
    with count_launches() as log:
        scale(scale(x), block=512)
    assert [launch.name for launch in log] == ["_scale_kernel"] * 2
    if triton.knobs.runtime.interpret:
        assert [launch.grid for launch in log] == [(32, 1, 1), (2, 1, 1)]


@interpreted
def test_bytes_count_each_sector_once():
    x = torch.zeros(1024).bfloat16()
    assert x.data_ptr() % 32 == 0
    with count_launches() as log:
        scale(x)
        dot(torch.ones(16, 16), torch.ones(16, 16))
        scale(x[:17].clone())
    assert [(launch.bytes_read, launch.bytes_written) for launch in log] == [(2048, 2048), (2048, 1024), (64, 64)]


def test_fresh_memory_is_poisoned(device):
    for fresh in (torch.empty(3, device=device), torch.empty_like(torch.ones(3, device=device).bfloat16())):
        assert fresh.isnan().all()


def test_canary_is_hit_by_a_write_out_of_bounds(device):
    with red_zones() as zone:
        assert torch.equal(scale(zone(torch.ones(33, device=device))), torch.full((33,), 2.0, device=device))
    with pytest.raises(OutOfBounds, match=r"empty_like\(33,\)"), red_zones() as zone:
        scale(zone(torch.ones(33, device=device)), mask=False)


def test_canary_is_hit_in_backward(device):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return scale(dy.contiguous(), mask=False)

    x = torch.ones(33, device=device, requires_grad=True)
    with pytest.raises(OutOfBounds, match=r"empty_like\(33,\)"), red_zones():
        torch.autograd.grad(Overflow.apply(x).sum(), x)


def test_zone_is_read_as_nan_and_keeps_strides(device):
    with red_zones() as zone:
        x = zone(torch.ones(4, 8, device=device)[:, :6])
        assert x.stride() == (8, 1)
        assert x.as_strided((48,), (1,), x.storage_offset() - 8).isnan().sum() == 8 + 3 * 2 + 2 + 8
        assert zone(torch.ones(1, device=device).expand(5)).stride() == (0,)
        assert zone(torch.ones(2, device=device, requires_grad=True)).requires_grad


# ---------------------------------------------------------------------------------------------------- the 2x rule


def gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_rule_passes_what_is_right(dtype):
    errors = check(gelu, gelu, torch.randn(64, 32).to(dtype), names=("x",))
    assert set(errors) == {"output", "grad of x"}
    assert all(error.ratio <= 1 for error in errors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_rule_catches_a_slightly_wrong_result(dtype):
    x = torch.randn(64, 32).to(dtype)
    worse = 1 + 4 * max(torch.finfo(dtype).eps, 2e-5 if dtype != torch.float64 else 1e-12)
    with pytest.raises(AssertionError, match="output: (max|rms) error"):
        check(lambda x: (gelu(x.double()) * worse).to(dtype), gelu, x)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, (dy * x)[1:].sum(0)


def test_the_rule_catches_a_wrong_gradient_and_names_it():
    x, w = torch.randn(64, 32), torch.randn(32)
    with pytest.raises(AssertionError, match="^grad of w: max error .* farthest at "):
        check(WrongGradient.apply, torch.mul, x, w, names=("x", "w"))
    check(WrongGradient.apply, torch.mul, x, w, names=("x", "w"), grads=("x",))
    check(WrongGradient.apply, torch.mul, x, w, names=("x", "w"), grads=False)


def test_the_rule_catches_one_wrong_row_beside_a_huge_one():
    x = torch.randn(8, 32)
    x[0, 0] = 1e6

    def slightly_off(x):
        y = gelu(x)
        return torch.cat([y[:3], y[3:4] * 1.001, y[4:]])

    check(slightly_off, gelu, x, grads=False)
    with pytest.raises(AssertionError, match=r"farthest at \(3, "):
        check(slightly_off, gelu, x, grads=False, rows=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: x * float("nan"), "not finite, first at"),
        (lambda x: x.double(), "float64, eager gives torch.float32"),
        (lambda x: x[1:], "shape"),
        (lambda x: (x, x), "floating outputs"),
        (lambda x: torch.cat([x[:-1], torch.full_like(x[:1], float("inf"))]), r"first at \(7, 0\)"),
    ],
)
def test_the_rule_catches_nan_dtype_shape_and_count(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong, lambda x: x.clone(), torch.randn(8, 32), grads=False)


def test_upstream_gradients_and_layouts_reach_ours():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.stride())
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            seen.append(dy.stride())
            return dy * 2

    x = torch.randn(4, 16)[:, ::2]
    check(Probe.apply, lambda x: x * 2, x, upstream=lambda y: torch.ones((), dtype=y.dtype).expand_as(y))
    assert seen == [(16, 2), (0, 0)]


def test_integers_and_empty_batches_pass_through():
    idx, w = torch.tensor([1, 0, 2]), torch.randn(3, 4)
    errors = check(lambda i, w: w[i], lambda i, w: w[i], idx, w, names=("idx", "w"))
    assert set(errors) == {"output", "grad of w"}
    check(gelu, gelu, torch.randn(0, 4))
