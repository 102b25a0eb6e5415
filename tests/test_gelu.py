"""GELU and bias + GELU against fp64, in every dtype, at awkward widths, strides and magnitudes."""

import pytest
import torch
from interpreter import count_launches
from numerics import check

from fastgpt2.kernels import _tuning
from fastgpt2.kernels.gelu import bias_gelu, bias_gelu_reference, gelu, gelu_reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 127, 257, 768, 3072, 4096, 5120, 6400)


def eager_bias_gelu(x, bias):
    return gelu_reference(x + bias.to(x.dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_gelu(C, dtype, device):
    check(gelu, gelu_reference, (2 * torch.randn(2, 3, C, device=device)).to(dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_bias_gelu(C, dtype, device):
    """The bias is fp32, as a parameter under autocast; its gradient too."""
    x, bias = (2 * torch.randn(2, 3, C, device=device)).to(dtype), torch.randn(C, device=device)
    check(bias_gelu, bias_gelu_reference, x, bias, eager=eager_bias_gelu, names=("x", "bias"))


@pytest.mark.parametrize("N, C", [(1, 300), (67, 13), (131, 101)])
def test_primes_and_partial_sums_over_several_programs(N, C, device):
    check(bias_gelu, bias_gelu_reference, torch.randn(N, C, device=device), torch.randn(C, device=device))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_magnitude(dtype, device):
    """Both tails to where they vanish, and what overflows when it is squared or cubed."""
    x = torch.cat([torch.linspace(-12, 12, 400), torch.tensor([0.0, 1e-30, -1e-30, 50.0, -50.0, 1e4, -1e4, 6e4, -6e4])])
    check(gelu, gelu_reference, x.to(device, dtype)[:, None], rows=dtype == torch.float32)


def test_the_left_tail_keeps_its_relative_accuracy(device):
    x = torch.linspace(-10, -3, 200, device=device)
    truth = x.double() * torch.sigmoid(2 * 0.7978845608028654 * (x.double() + 0.044715 * x.double() ** 3))
    torch.testing.assert_close(gelu(x).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter: infinities are what is tested
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_and_not_finite(dtype, device):
    x = torch.tensor([1e20, -1e20, 3e38, -3e38], device=device).to(dtype).requires_grad_()
    y = gelu(x)
    y.sum().backward()
    assert torch.equal(y.detach(), x.detach().clamp(min=0))
    assert x.grad.tolist() == [1, 0, 1, 0]
    assert gelu(torch.tensor([float("nan")], device=device)).isnan().all()
    assert gelu(torch.tensor([float("inf")], device=device)).item() == float("inf")


def strided(device) -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6, 80, device=device)
    return {
        "slice of a wider row": base[..., 8:40],
        "every other row": base[:, ::2, :33],
        "transposed rows": base.transpose(0, 1)[..., :40],
        "strided columns": base[..., ::2],
        "expanded rows": base[:1, :1, :37].expand(3, 5, 37),
        "expanded columns": base[..., :1].expand(4, 6, 16),
        "one row": base[0, 0],
        "one column": base[..., 3:4],
    }


@pytest.mark.parametrize("what", strided(torch.device("cpu")))
def test_strides(what, device):
    x = strided(device)[what]
    check(gelu, gelu_reference, x)
    check(bias_gelu, bias_gelu_reference, x, torch.randn(x.shape[-1], device=device))


@pytest.mark.parametrize("shape", ["scalar", "row", "column", "transposed"])
def test_strides_of_gradients(shape, device):
    def upstream(y):
        like = dict(dtype=y.dtype, device=y.device)
        return {
            "scalar": torch.tensor(0.7, **like).expand_as(y),
            "row": torch.linspace(-1, 1, y.shape[1], **like).expand_as(y),
            "column": torch.linspace(-1, 1, y.shape[0], **like)[:, None].expand_as(y),
            "transposed": torch.linspace(-1, 1, y.numel(), **like).view(y.shape[::-1]).t(),
        }[shape]

    x, bias = torch.randn(9, 129, device=device), torch.randn(129, device=device)
    check(gelu, gelu_reference, x, upstream=upstream)
    check(bias_gelu, bias_gelu_reference, x, bias, upstream=upstream)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (3, 0)])
def test_empty(shape, device):
    x, bias = torch.empty(shape, device=device).requires_grad_(), torch.randn(shape[-1], device=device).requires_grad_()
    for y, inputs in ((gelu(x), (x,)), (bias_gelu(x, bias), (x, bias))):
        grads = torch.autograd.grad(y.sum(), inputs)
        assert y.shape == shape and [g.shape for g in grads] == [t.shape for t in inputs]
        assert not any(g.any() for g in grads)


def test_zero_dimensions(device):
    x = torch.tensor(-0.3, device=device).requires_grad_()
    y = gelu(x)
    y.backward()
    assert y.shape == x.grad.shape == ()
    torch.testing.assert_close(y, gelu_reference(x))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted, device):
    inputs = torch.randn(70, 20, device=device), torch.randn(20, device=device)

    def gradient(*needed):
        own = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        bias_gelu(*own).square().sum().backward()
        return own[wanted].grad

    assert torch.equal(gradient(wanted), gradient(0, 1))


def test_gradcheck(device):
    x = torch.randn(3, 5, dtype=torch.float64, device=device).requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))
    torch.testing.assert_close(bias_gelu(x, bias), bias_gelu_reference(x, bias), rtol=1e-13, atol=1e-13)


def test_opcheck(device):
    x, bias = torch.randn(3, 12, device=device).requires_grad_(), torch.randn(12, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt2.gelu_fwd.default, (x, None))
    torch.library.opcheck(torch.ops.fastgpt2.gelu_fwd.default, (x, bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    bias = torch.randn(24, device=device).requires_grad_()

    def step(x):
        return gelu(bias_gelu(x, bias) * 2)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (3, 5) if dynamic else (3,):
        x = torch.randn(N, 24, device=device).requires_grad_()
        results = []
        for function in (step, compiled):
            out = function(x)
            results.append([out, *torch.autograd.grad(out.sum(), (x, bias))])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_repeated_runs_are_bitwise_equal(device):
    x, bias = torch.randn(150, 33, device=device).requires_grad_(), torch.randn(33, device=device).requires_grad_()

    def run():
        return torch.autograd.grad(bias_gelu(x, bias).square().sum(), (x, bias))

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("with_bias", [False, True])
def test_launches_and_kept_tensors(with_bias, device):
    inputs = [t.requires_grad_() for t in (torch.randn(70, 48, device=device), torch.randn(48, device=device))]
    inputs, kept = inputs[: 1 + with_bias], []
    with (
        count_launches() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = (bias_gelu if with_bias else gelu)(*inputs)
    with count_launches() as backward:
        torch.autograd.grad(y.sum(), inputs)
    assert (len(forward), len(backward)) == (1, 1 + with_bias)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]


FEW = {"gelu_fwd": {}, "gelu_bwd": {"PROGRAMS_PER_SM": 1}, "column_sum": {}}


def test_rows_are_shared_among_programs(device, monkeypatch):
    """More programs than the machine of the tests would start, and a last one with few rows: the same numbers."""
    x, bias = torch.randn(300, 36, device=device).requires_grad_(), torch.randn(36, device=device).requires_grad_()

    def run():
        return torch.autograd.grad(bias_gelu(x, bias).square().sum(), (x, bias))

    many = run()
    config = _tuning.config
    monkeypatch.setattr(_tuning, "config", lambda key, *args: config(key, *args) | FEW[key.op])
    for a, b in zip(many, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: gelu(x.long()), TypeError, ("gelu", "x", "int64", "float16", "mlp='torch'")),
        (lambda x: bias_gelu(x, x[0].bool()), TypeError, ("bias_gelu", "bias", "bool")),
        (lambda x: bias_gelu(x, x), ValueError, ("bias", "(3, 8)", "(8,)", "mlp='torch'")),
        (lambda x: bias_gelu(x, x[0, :1]), ValueError, ("bias", "(1,)", "(8,)")),
    ],
)
def test_errors_name_the_argument(call, error, words, device):
    with pytest.raises(error) as caught:
        call(torch.ones(3, 8, device=device))
    assert all(word in str(caught.value) for word in words), caught.value
