"""LayerNorm and its riders against fp64, in every dtype, at awkward widths, strides and magnitudes."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import count_launches
from numerics import check

from fastgpt2.bench.timing.tune import DESIGNS
from fastgpt2.kernels import _device, _tuning
from fastgpt2.kernels.layer_norm import ROW_BYTES, add_layer_norm, add_layer_norm_reference, layer_norm

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 127, 129, 768, 1024, 1280, 1600)
GPT2_WIDTHS = (768, 1024, 1280, 1600)
EPS = 1e-5


def eager_layer_norm(x, w, b=None, eps=EPS):
    """PyTorch's own in the dtype of x, which is what runs without the kernel."""
    return F.layer_norm(x, x.shape[-1:], w.to(x.dtype), None if b is None else b.to(x.dtype), eps)


def truth_layer_norm(x, w, b=None, eps=EPS):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def eager_add_layer_norm(x, residual, w, b, x_bias):
    total = residual + (x + x_bias.to(x.dtype))
    return total, eager_layer_norm(total, w, b)


def truth_add_layer_norm(x, residual, w, b, x_bias):
    return add_layer_norm_reference(x, residual, w, b, EPS, x_bias=x_bias)


def our_add_layer_norm(x, residual, w, b, x_bias):
    return add_layer_norm(x, residual, w, b, EPS, x_bias=x_bias)


def cancelling(C: int) -> float:
    """With one column the gradient is 0: terms of 1 / sqrt(eps) cancel, up to a fused multiply-add's rounding."""
    return EPS**-0.5 if C == 1 else 0.0


def columns(C: int, count: int, dtype: torch.dtype, device) -> list[torch.Tensor]:
    return [torch.randn(C, device=device).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_layer_norm(C, dtype, device):
    x = torch.randn(2, 3, C, device=device).to(dtype)
    inputs = (x, *columns(C, 2, torch.float32, device))
    check(layer_norm, truth_layer_norm, *inputs, eager=eager_layer_norm, cancelling=cancelling(C))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_add_layer_norm(C, dtype, device):
    x, residual = torch.randn(2, 2, 3, C, device=device).to(dtype)
    names = ("x", "residual", "weight", "bias", "x_bias")
    inputs = (x, residual, *columns(C, 3, dtype, device))
    check(our_add_layer_norm, truth_add_layer_norm, *inputs, eager=eager_add_layer_norm, names=names)


@pytest.mark.parametrize("N, C", [(1, 768), (2, 1), (67, 13), (131, 101)])
def test_primes_and_partial_sums_over_several_programs(N, C, device):
    x, residual = torch.randn(2, N, C, device=device)
    check(our_add_layer_norm, truth_add_layer_norm, x, residual, *columns(C, 3, torch.float32, device))


@pytest.mark.parametrize("x_dtype, residual_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(x_dtype, residual_dtype, device):
    """The sum has the dtype of PyTorch's; every gradient that of its tensor."""
    x, residual = torch.randn(5, 96, device=device).to(x_dtype), torch.randn(5, 96, device=device).to(residual_dtype)
    check(our_add_layer_norm, truth_add_layer_norm, x, residual, *columns(96, 3, torch.float32, device))


@pytest.mark.parametrize("C", GPT2_WIDTHS)
@pytest.mark.parametrize("mean", [1e4, -300.0])
def test_large_mean(C, mean, device):
    x = torch.randn(6, C, device=device) + mean
    check(layer_norm, truth_layer_norm, x, *columns(C, 2, torch.float32, device), rows=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_equal_values_in_a_row(dtype, device):
    """The variance is 0: y is the bias, and eps alone keeps the gradient finite."""
    x = torch.tensor([0.0, 1.0, -3.0, 0.1], device=device).to(dtype)[:, None].repeat(1, 768)
    w, b = columns(768, 2, torch.float32, device)
    y = layer_norm(x, w, b)
    assert torch.equal(y[:3], b.to(dtype).expand(3, 768))
    check(layer_norm, truth_layer_norm, x[:3], w, b, eager=eager_layer_norm)
    x.requires_grad_()
    layer_norm(x, w, b).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_one_huge_element(dtype, device):
    x = torch.randn(4, 768, device=device)
    x[1, 300], x[2, 767], x[3, 0] = 6e4, -6e4, 1e3
    check(layer_norm, truth_layer_norm, x.to(dtype), *columns(768, 2, torch.float32, device), eager=eager_layer_norm)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-2])
def test_eps(eps, device):
    x = 0.1 * torch.randn(3, 64, device=device)
    check(
        lambda x, w: layer_norm(x, w, eps=eps), lambda x, w: truth_layer_norm(x, w, eps=eps),
        x, *columns(64, 1, torch.float32, device),
    )  # fmt: skip


def test_y_is_layer_norm_of_the_stored_sum(device):
    """Bit for bit: whoever keeps only the sum can make y again."""
    x, residual = torch.randn(2, 9, 768, device=device).bfloat16()
    w, b, x_bias = columns(768, 3, torch.float32, device)
    total, y = add_layer_norm(x, residual, w, b, x_bias=x_bias)
    assert torch.equal(y, layer_norm(total, w, b))
    assert torch.equal(total, (residual.float() + (x.float() + x_bias)).bfloat16())


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
    residual = torch.randn(x.shape, device=device)
    w, b, x_bias = columns(x.shape[-1], 3, torch.float32, device)
    terms = cancelling(x.shape[-1])
    check(layer_norm, truth_layer_norm, x, w, b, cancelling=terms)
    check(our_add_layer_norm, truth_add_layer_norm, x, residual, w, b, x_bias, cancelling=terms)
    check(our_add_layer_norm, truth_add_layer_norm, residual, x, w, b, x_bias, cancelling=terms)


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

    x, residual = torch.randn(2, 9, 129, device=device)
    inputs = (x, residual, *columns(129, 3, torch.float32, device))
    check(our_add_layer_norm, truth_add_layer_norm, *inputs, upstream=upstream)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (0, 0, 1)])
def test_empty_batch(shape, device):
    x, residual = torch.empty(2, *shape, device=device).requires_grad_().unbind()
    parameters = [p.requires_grad_() for p in columns(shape[-1], 3, torch.float32, device)]
    total, y = our_add_layer_norm(x, residual, *parameters)
    assert total.shape == y.shape == shape
    grads = torch.autograd.grad(y.sum() + total.sum(), (x, residual, *parameters))
    assert [g.shape for g in grads] == [t.shape for t in (x, residual, *parameters)]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted, device):
    """Frozen parameters and inputs: the gradient that is left is the one it is among all."""
    x, residual = torch.randn(2, 70, 20, device=device)
    inputs = (x, residual, *columns(20, 3, torch.float32, device))

    def gradient(*needed):
        own = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        total, y = our_add_layer_norm(*own)
        ((y * y).sum() + total.sin().sum()).backward()
        return own[wanted].grad

    assert torch.equal(gradient(wanted), gradient(*range(5)))


@pytest.mark.parametrize("used", ["total", "y"])
def test_one_output_alone(used, device):
    x, residual = torch.randn(2, 5, 40, device=device)
    inputs = (x, residual, *columns(40, 3, torch.float32, device))

    def pick(outputs):
        return outputs[0 if used == "total" else 1]

    def upstream(y):
        return torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)

    check(
        lambda *t: pick(our_add_layer_norm(*t)), lambda *t: pick(truth_add_layer_norm(*t)), *inputs, upstream=upstream
    )


def test_gradcheck(device):
    x, residual = torch.randn(2, 2, 3, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in (x, residual, *columns(3, 3, torch.float64, device))]
    assert torch.autograd.gradcheck(our_add_layer_norm, inputs)
    assert torch.autograd.gradcheck(layer_norm, (x, *inputs[2:4]))
    seed = torch.tensor(3, device=device)
    assert torch.autograd.gradcheck(lambda *t: add_layer_norm(*t, dropout_p=0.4, seed=seed), inputs[:4])


def test_float64_keeps_its_precision(device):
    x, residual = torch.randn(2, 3, 129, dtype=torch.float64, device=device)
    w, b, x_bias = columns(129, 3, torch.float64, device)
    for ours, truth in zip(
        our_add_layer_norm(x, residual, w, b, x_bias), truth_add_layer_norm(x, residual, w, b, x_bias), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------- autocast, operators, the machine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """The sum stays as wide as the stream, y comes in the dtype that the next projection reads."""
    x, residual = torch.randn(5, 96, device=device, dtype=dtype), torch.randn(5, 96, device=device)
    w, b, x_bias = [p.requires_grad_() for p in columns(96, 3, torch.float32, device)]
    with torch.autocast(device.type, dtype):
        total, y = add_layer_norm(x, residual, w, b, x_bias=x_bias)
        assert (total.dtype, y.dtype) == (torch.float32, dtype)
        assert layer_norm(residual, w, b).dtype == dtype
        assert layer_norm(residual.double(), w, b).dtype == torch.float64
    y.float().square().sum().backward()
    assert w.grad.dtype == b.grad.dtype == x_bias.grad.dtype == torch.float32
    torch.testing.assert_close(y, layer_norm(total, w, b).to(dtype))


def test_opcheck(device):
    x, residual = torch.randn(2, 4, 12, device=device)
    w, b, x_bias = [p.requires_grad_() for p in columns(12, 3, torch.float32, device)]
    x, residual = x.requires_grad_(), residual.requires_grad_()
    seed = torch.tensor(1, device=device)
    op = torch.ops.fastgpt2.layer_norm_fwd.default
    torch.library.opcheck(op, (x, None, w, b, None, None, EPS, 0.0, x.dtype))
    torch.library.opcheck(op, (x, residual, w, None, x_bias, seed, EPS, 0.3, torch.float16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    w, b, x_bias = [p.requires_grad_() for p in columns(24, 3, torch.float32, device)]

    def step(x, residual):
        total, y = add_layer_norm(x, residual, w, b, x_bias=x_bias)
        return layer_norm(y, w) * total

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (3, 5) if dynamic else (3,):
        results = []
        for function in (step, compiled):
            generator = torch.Generator(device).manual_seed(N)
            x, residual = (torch.randn(N, 24, device=device, generator=generator).requires_grad_() for _ in range(2))
            out = function(x, residual)
            results.append([out, *torch.autograd.grad(out.sum(), (x, residual, w, b, x_bias))])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_repeated_runs_are_bitwise_equal(device):
    x, residual = torch.randn(2, 150, 33, device=device)
    inputs = [t.requires_grad_() for t in (x, residual, *columns(33, 3, torch.float32, device))]

    def run():
        total, y = add_layer_norm(*inputs[:4], x_bias=inputs[4], dropout_p=0.2, seed=torch.tensor(9, device=device))
        return torch.autograd.grad((y * y).sum() + total.sum(), inputs)

    assert all(map(torch.equal, run(), run()))


def test_launches_and_kept_tensors(device):
    x, residual = torch.randn(2, 70, 48, device=device)
    parameters = [p.requires_grad_() for p in columns(48, 3, torch.float32, device)]
    x, residual = x.requires_grad_(), residual.requires_grad_()
    kept = []
    with (
        count_launches() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        total, y = our_add_layer_norm(x, residual, *parameters)
    with count_launches() as backward:
        dx, dresidual, *_ = torch.autograd.grad(y.sum() + total.sum(), (x, residual, *parameters))
    assert dx.data_ptr() == dresidual.data_ptr(), "one tensor serves both gradients"
    assert (len(forward), len(backward)) == (1, 2)
    assert sorted(t.numel() for t in kept) == [48, 2 * 70, 70 * 48]
    total, y = our_add_layer_norm(x, residual, *(p.detach() for p in parameters))
    with count_launches() as backward:
        torch.autograd.grad(y.sum() + total.sum(), (x, residual))
    assert len(backward) == 1, "no parameter wants a gradient: there is nothing to sum"


def test_rows_are_shared_among_programs(device, monkeypatch):
    """More programs than the machine of the tests would start, and a last one with few rows: the same numbers."""
    x, residual = torch.randn(2, 300, 36, device=device)
    inputs = [t.requires_grad_() for t in (x, residual, *columns(36, 3, torch.float32, device))]

    def run():
        total, y = our_add_layer_norm(*inputs)
        return [total, y, *torch.autograd.grad((y * y).sum() + total.sum(), inputs)]

    few = run()
    monkeypatch.setattr(_device, "sm_count", lambda device: 13)
    for a, b in zip(few, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("design", DESIGNS["layer_norm_bwd"], ids=str)
@pytest.mark.parametrize("x_dtype, residual_dtype", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_designs_of_the_tuner(design, x_dtype, residual_dtype, device, monkeypatch):
    """Rows in a pipeline, whose tiles have a shape of their own for each dtype, and a last program with few rows."""
    config, used = _tuning.config, []

    def changed(key, *args):
        used.append(key.op)
        return config(key, *args) | (design if key.op == "layer_norm_bwd" else {})

    monkeypatch.setattr(_tuning, "config", changed)
    x, residual = (torch.randn(67, 768, device=device).to(t) for t in (x_dtype, residual_dtype))
    inputs = (x, residual, *columns(768, 3, torch.float32 if x_dtype != residual_dtype else x_dtype, device))
    check(our_add_layer_norm, truth_add_layer_norm, *inputs, eager=eager_add_layer_norm)
    assert "layer_norm_bwd" in used


@pytest.mark.parametrize("design", DESIGNS["layer_norm_bwd"], ids=str)
def test_designs_under_autocast(design, device, monkeypatch):
    """The gradient of y in bf16 beside a sum in fp32: as by the table's configuration, but for the order of sums."""
    x, residual = torch.randn(67, 768, device=device).bfloat16(), torch.randn(67, 768, device=device)
    inputs = [t.requires_grad_() for t in (x, residual, *columns(768, 3, torch.float32, device))]

    def gradients():
        with torch.autocast(device.type, torch.bfloat16):
            total, y = our_add_layer_norm(*inputs)
        assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        return torch.autograd.grad(y.float().square().sum() + total.sum(), inputs)

    expected, config = gradients(), _tuning.config
    changed = lambda key, *a: config(key, *a) | (design if key.op == "layer_norm_bwd" else {})  # noqa: E731
    monkeypatch.setattr(_tuning, "config", changed)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_every_variant_of_the_table(row_bytes, device):
    """The widest row of each, and one column more than the one before it holds."""
    narrower = max([b for b in ROW_BYTES if b < row_bytes], default=0)
    for C in (row_bytes // 4, narrower // 4 + 1):
        x, residual = torch.randn(2, 1, C, device=device)
        check(our_add_layer_norm, truth_add_layer_norm, x, residual, *columns(C, 3, torch.float32, device))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(3, 8, dtype=torch.int64)), TypeError, ("add_layer_norm", "x", "int64", "bfloat16")),
        (dict(weight=torch.ones(8, dtype=torch.int32)), TypeError, ("weight", "int32", "layer_norm='torch'")),
        (dict(weight=torch.ones(7)), ValueError, ("weight", "(7,)", "(8,)", "layer_norm='torch'")),
        (dict(bias=torch.ones(1, 8)), ValueError, ("bias", "(1, 8)")),
        (dict(x_bias=torch.ones(9)), ValueError, ("x_bias", "(9,)")),
        (dict(residual=torch.ones(1, 8)), ValueError, ("residual", "(1, 8)", "(3, 8)")),
        (dict(x=torch.ones(3, 0), residual=torch.ones(3, 0)), ValueError, ("(3, 0)", "1 to 16384")),
        (dict(x=torch.ones(1, 16385), residual=torch.ones(1, 16385)), ValueError, ("16385", "1 to 16384", "float32")),
        (dict(x=torch.tensor(1.0), residual=torch.tensor(1.0)), ValueError, ("x", "()")),
        (dict(dropout_p=1.0), ValueError, ("dropout_p", "1.0", "[0, 1)")),
        (dict(dropout_p=-0.1), ValueError, ("dropout_p", "-0.1")),
        (dict(dropout_p=0.1, seed=torch.ones(2, dtype=torch.int64)), ValueError, ("seed", "(2,)", "int64")),
        (dict(dropout_p=0.1, seed=torch.tensor(1.0)), ValueError, ("seed", "float32")),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_errors_name_the_argument(change, error, words, device):
    arguments = dict(x=torch.ones(3, 8), residual=torch.ones(3, 8), weight=torch.ones(8)) | change
    with pytest.raises(error) as caught:
        add_layer_norm(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    assert all(word in str(caught.value) for word in words), caught.value
