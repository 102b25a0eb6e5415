"""The MLP as one autograd unit against fp64, and what it keeps, launches and casts."""

import pytest
import torch
from interpreter import count_launches
from numerics import check

from fastgpt2.kernels.mlp import fused_mlp, mlp, mlp_reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
both = pytest.mark.parametrize("op", [mlp, fused_mlp], ids=["mlp", "fused_mlp"])
NAMES = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")


def tensors(*shape: int, H: int, O: int | None = None, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:  # noqa: E741
    """x of `shape`, then the parameters, at the scale that keeps activations near 1."""
    C, O = shape[-1], O or shape[-1]  # noqa: E741
    made = (
        torch.randn(shape),
        torch.randn(H, C) / C**0.5,
        torch.randn(H),
        torch.randn(O, H) / H**0.5,
        torch.randn(O),
    )
    return [t.to(device, dtype) for t in made]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("C", [1, 7, 64, 129])
def test_mlp(C, dtype, device):
    check(mlp, mlp_reference, *tensors(2, 5, C, H=4 * C, dtype=dtype, device=device), names=NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
def test_gpt2_widths(C, dtype, device):
    check(mlp, mlp_reference, *tensors(3, C, H=4 * C, dtype=dtype, device=device), names=NAMES)


def test_partial_sums_over_several_programs(device):
    check(mlp, mlp_reference, *tensors(131, 13, H=37, O=17, device=device), names=NAMES)


@both
@pytest.mark.parametrize("missing", [("fc_bias",), ("proj_bias",), ("fc_bias", "proj_bias")], ids="+".join)
def test_without_biases(op, missing, device):
    x, fc_weight, fc_bias, proj_weight, proj_bias = tensors(7, 12, H=40, device=device)
    fc_bias, proj_bias = (None if n in missing else b for n, b in (("fc_bias", fc_bias), ("proj_bias", proj_bias)))
    check(op, mlp_reference, x, fc_weight, fc_bias, proj_weight, proj_bias, names=NAMES)


@pytest.mark.parametrize("what", ["sliced", "transposed", "expanded", "one row"])
def test_strides(what, device):
    base = torch.randn(4, 6, 40, device=device)
    x = {
        "sliced": base[..., 3:27],
        "transposed": base.transpose(0, 1)[..., :24],
        "expanded": base[:1, :1, :24].expand(4, 6, 24),
        "one row": base[0, 0, :24],
    }[what]
    check(mlp, mlp_reference, x, *tensors(1, 24, H=96, device=device)[1:], names=NAMES)


def strided_gradient(shape: str):
    """A gradient of the result (N, C) with the strides that `shape` names."""

    def upstream(y):
        like = dict(dtype=y.dtype, device=y.device)
        return {
            "scalar": torch.tensor(0.7, **like).expand_as(y),
            "row": torch.linspace(-1, 1, y.shape[1], **like).expand_as(y),
            "transposed": torch.linspace(-1, 1, y.numel(), **like).view(y.shape[::-1]).t(),
        }[shape]

    return upstream


@pytest.mark.parametrize("shape", ["scalar", "row", "transposed"])
def test_strides_of_gradients(shape, device):
    check(mlp, mlp_reference, *tensors(9, 24, H=96, device=device), names=NAMES, upstream=strided_gradient(shape))


@both
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_empty_batch(op, shape, device):
    inputs = [t.requires_grad_() for t in tensors(*shape, H=96, device=device)]
    y = op(*inputs)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert y.shape == shape and [g.shape for g in grads] == [t.shape for t in inputs]
    assert not any(g.any() for g in grads)


@both
@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(op, wanted, device):
    inputs = tensors(70, 12, H=40, device=device)

    def gradient(*needed):
        own = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        op(*own).square().sum().backward()
        return own[wanted].grad

    torch.testing.assert_close(gradient(wanted), gradient(*range(5)), rtol=0, atol=0)


@both
def test_gradcheck(op, device):
    inputs = [t.requires_grad_() for t in tensors(3, 4, H=7, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(op, inputs)
    torch.testing.assert_close(op(*inputs), mlp_reference(*inputs), rtol=1e-13, atol=1e-13)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", ["autocast's", "float32"])
def test_autocast(op, dtype, x_dtype, device):
    """The rule under autocast: eager casts the same tensors, and fp32 weights get fp32 gradients."""
    x, *parameters = tensors(2, 5, 64, H=256, device=device)
    x = x.to(dtype) if x_dtype == "autocast's" else x

    def autocast(function):
        def call(*inputs):
            if inputs[0].dtype == torch.float64:
                return function(*inputs).to(dtype)
            with torch.autocast(device.type, dtype):
                return function(*inputs)

        return call

    check(autocast(op), autocast(mlp_reference), x, *parameters, names=NAMES)


def test_float64_under_autocast(device):
    inputs = tensors(2, 8, H=16, dtype=torch.float64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert mlp(*inputs).dtype == torch.float64


def test_opcheck(device):
    inputs = [t.requires_grad_() for t in tensors(2, 3, 4, H=16, device=device)]
    torch.library.opcheck(torch.ops.fastgpt2.mlp_fwd.default, (*inputs, True, False))
    torch.library.opcheck(torch.ops.fastgpt2.mlp_fwd.default, (*inputs[:2], None, inputs[3], None, True, False))


@both
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_fullgraph(op, autocast, dynamic, device):
    parameters = [t.requires_grad_() for t in tensors(1, 8, H=32, device=device)[1:]]
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (3, 5) if dynamic else (3,):
        x = torch.randn(2, N, 8, device=device).requires_grad_()
        results = []
        for function in (op, compiled):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                out = function(x, *parameters)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, *parameters))])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_repeated_runs_are_bitwise_equal(device):
    inputs = [t.requires_grad_() for t in tensors(150, 12, H=40, device=device)]

    def run():
        return torch.autograd.grad(mlp(*inputs).square().sum(), inputs)

    assert all(map(torch.equal, run(), run()))


def test_launches_and_kept_tensors(device):
    """Kept are x, the pre-activation and the weights: no activation."""
    inputs, kept = [t.requires_grad_() for t in tensors(70, 12, H=40, device=device)], []
    with (
        count_launches() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = mlp(*inputs)
    with count_launches() as backward:
        torch.autograd.grad(y.sum(), inputs)
    assert (len(forward), len(backward)) == (1, 2)
    own = {t.data_ptr() for t in inputs}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(70, 40)]


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(3, 8).long()), TypeError, ("mlp", "x", "int64", "mlp='torch'")),
        (dict(x=torch.ones(3, 9)), ValueError, ("mlp", "x", "(3, 9)", "fc_weight, 8", "mlp='torch'")),
        (dict(fc_bias=torch.ones(8)), ValueError, ("fc_bias", "(8,)", "(16,)")),
        (dict(proj_weight=torch.ones(8, 17)), ValueError, ("proj_weight", "(8, 17)", "(8, 16)")),
        (dict(proj_bias=torch.ones(16)), ValueError, ("proj_bias", "(16,)", "(8,)")),
        (dict(fc_weight=torch.ones(16, 8).half()), ValueError, ("fc_weight", "float16", "float32", "mlp='torch'")),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_errors_name_the_argument(change, error, words, device):
    arguments = dict(zip(NAMES, tensors(3, 8, H=16), strict=True)) | change
    with pytest.raises(error) as caught:
        mlp(**{k: v.to(device) for k, v in arguments.items()})
    assert all(word in str(caught.value) for word in words), caught.value
