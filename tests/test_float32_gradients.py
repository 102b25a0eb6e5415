"""Gradients of fp32 parameters under autocast are the products' fp32 sums: rounded to 16 bits nowhere."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from numerics import check
from shadow_runs import a_batch, forward, new_model
from test_matmul import widening_products_on_the_cpu
from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.kernels import _device
from fastgpt2.kernels._linear import autocast_linear, gains
from fastgpt2.kernels.mlp import fused_mlp, mlp, mlp_reference

REGIONS = ("attention", "layer_norm", "mlp", "mlp=fused", "attention,layer_norm,mlp")
both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["counted", "by a GPU's product"])
def product(request, device):
    """On a CPU: the operator that stands in for the product that GPUs have, and that product with its signature."""
    if device.type == "cuda" or request.param == "counted":
        yield
        return
    with widening_products_on_the_cpu(), mock.patch.object(_device, "mixed_matmul", lambda device: "addmm"):
        yield


def under_autocast(function, dtype):
    def call(*inputs):
        if inputs[0].dtype == torch.float64:
            return function(*inputs).to(dtype)
        with torch.autocast(inputs[0].device.type, dtype):
            return function(*inputs)

    return call


def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert gains(x, weight)
    return autocast_linear(x, weight, bias, None, None)


def far_better(errors: dict, *names: str) -> None:
    """Eager's error is a rounding to 16 bits; without it an eighth and less is left."""
    for name in names:
        assert errors[f"grad of {name}"].ours < errors[f"grad of {name}"].eager / 8, name


def is_rounded(t: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(t, t.to(dtype).float())


# ----------------------------------------------------------------------------------------------------------- numerics


@both
@pytest.mark.parametrize("shape", [(2, 33, 24), (7, 64), (40,)], ids=str)
def test_linear_layer(shape, dtype, device, product):
    C, K = shape[-1], 56
    x, weight, bias = torch.randn(shape), torch.randn(K, C) / C**0.5, torch.randn(K)
    inputs = [t.to(device) for t in (x.to(dtype), weight, bias)]
    ours, eager = (under_autocast(f, dtype) for f in (layer, F.linear))
    errors = check(ours, eager, *inputs, names=("x", "weight", "bias"))
    if len(shape) > 1:  # otherwise they are no sums
        far_better(errors, "weight", "bias")


@both
@pytest.mark.parametrize("op", [mlp, fused_mlp], ids=["mlp", "fused_mlp"])
def test_mlp(op, dtype, device, product):
    """dout^T act and dpre^T x: act and dpre are rounded, as eager's are, but not the sums over rows."""
    C, H = 64, 96
    x, parameters = torch.randn(130, C).to(dtype), [torch.randn(H, C) / 8, torch.randn(H), torch.randn(C, H) / H**0.5]
    names = ("x", "fc_weight", "fc_bias", "proj_weight")
    inputs = [t.to(device) for t in (x, *parameters)]
    eager, ours = under_autocast(mlp_reference, dtype), under_autocast(op, dtype)
    check(ours, eager, *inputs, names=names)
    own = [t.clone().requires_grad_() for t in inputs]
    ours(*own).float().square().sum().backward()
    assert not any(is_rounded(own[i].grad, dtype) for i in (1, 2, 3))


def test_transposed_and_expanded_gradients(device, product):
    x, weight = torch.randn(6, 9, 24, device=device).bfloat16(), torch.randn(8, 24, device=device)

    def upstream(y):
        return torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape[::-1]).permute(2, 1, 0)

    for gradient in (upstream, lambda y: torch.tensor(0.7, dtype=y.dtype, device=y.device).expand_as(y)):
        ours, eager = (under_autocast(f, torch.bfloat16) for f in (layer, F.linear))
        errors = check(ours, eager, x[:, 2:7], weight, None, names=("x", "weight", "bias"), upstream=gradient)
        far_better(errors, "weight")


def test_a_batch_without_rows(device, product):
    x, weight, bias = torch.zeros(0, 4).bfloat16(), torch.randn(3, 4), torch.randn(3)
    leaves = [t.to(device).requires_grad_() for t in (x, weight, bias)]
    with torch.autocast(device.type, torch.bfloat16):
        layer(*leaves).sum().backward()
    assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    assert not any(t.grad.any() for t in leaves) and leaves[1].grad.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kernels", REGIONS)
def test_regions_of_a_model(kernels, device):
    """Those whose switch is on have gradients that were never rounded; c_attn too if LayerNorm gives it 16 bits."""
    model, pair = new_model(device, kernels, n_embd=32), a_batch(device)
    forward(model, pair).backward()
    block = model.transformer.h[0]
    regions = {
        block.attn.c_attn: "torch" if model.kernels.layer_norm == "torch" else model.kernels.attention,
        block.attn.c_proj: model.kernels.layer_norm,
        block.mlp.c_fc: model.kernels.mlp,
        block.mlp.c_proj: model.kernels.layer_norm if model.kernels.mlp == "torch" else model.kernels.mlp,
    }
    for module, switch in regions.items():
        assert is_rounded(module.weight.grad, torch.bfloat16) == (switch == "torch")
    if all(switch != "torch" for switch in regions.values()):
        assert not any(is_rounded(p.grad, torch.bfloat16) for p in block.parameters())


def test_pytorch_alone_stays_pytorch(device):
    model, pair = new_model(device, "torch"), a_batch(device)
    with mock.patch.object(ops, "autocast_linear", side_effect=AssertionError):
        forward(model, pair).backward()


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_what_is_frozen_has_no_gradient(frozen, device, product):
    tensors = dict(x=torch.randn(5, 8).bfloat16(), weight=torch.randn(4, 8), bias=torch.randn(4))
    tensors = {name: t.to(device).requires_grad_(name != frozen) for name, t in tensors.items()}
    module = nn.Linear(8, 4, device=device)
    module.weight, module.bias = (nn.Parameter(t, t.requires_grad) for t in (tensors["weight"], tensors["bias"]))
    results = []
    for switch in ("torch", "triton"):
        module.zero_grad()
        tensors["x"].grad = None
        with torch.autocast(device.type, torch.bfloat16):
            ops.linear(tensors["x"], module, switch).square().sum().backward()
        results.append([tensors["x"].grad, module.weight.grad, module.bias.grad])
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-5)


def test_gradients_are_added_up(device, product):
    """And hooks of parameters, of both kinds, see them."""
    module, seen = nn.Linear(8, 4, device=device), []
    module.weight.register_hook(lambda grad: seen.append(grad.dtype))
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = torch.randn(5, 8, device=device).bfloat16()
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16):
            ops.linear(x, module, "triton").square().sum().backward()
    assert seen[0] == seen[2] == torch.float32
    torch.testing.assert_close(seen[3], 2 * seen[1], rtol=0, atol=0)


def test_ddp(device):
    """Buckets get the same numbers."""
    model, pair = new_model(device, "attention,layer_norm,mlp"), a_batch(device)
    forward(model, pair).backward()
    alone = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    wrapped = None
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        forward(wrapped, pair).backward()
    finally:
        del wrapped  # before its process group is left: see ddp_worker.py
        torch.distributed.destroy_process_group()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), alone, strict=True))


# ------------------------------------------------------------------------------------------------------ who is left out


def test_only_what_gains(device):
    x, weight = torch.randn(3, 8, device=device).bfloat16(), nn.Parameter(torch.randn(4, 8, device=device))
    assert not gains(x, weight), "outside autocast"
    with torch.autocast(device.type, torch.bfloat16):
        assert gains(x, weight)
        assert not gains(x, nn.Parameter(weight.detach().double()))
        assert not gains(x, nn.Parameter(weight.detach().bfloat16()))
        assert not gains(x.float(), weight) and not gains(x.half(), weight)
        assert not gains(x, weight.detach())
        with torch.no_grad():
            assert not gains(x, weight)
        with torch.autograd.forward_ad.dual_level():
            assert not gains(x, weight)

        class Other(Tensor):
            pass

        assert not gains(x.as_subclass(Other), weight)
        with mock.patch.multiple(_device, INTERPRETED=False, mixed_matmul=lambda device: ""):
            assert not gains(x, weight), "no product that keeps fp32"


def test_torch_func_takes_pytorchs_layer(device):
    module, x = nn.Linear(8, 4, device=device), torch.randn(3, 5, 8, device=device).bfloat16()

    def loss(parameters: dict, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            y = torch.func.functional_call(Region(module), {f"module.{n}": p for n, p in parameters.items()}, (x,))
        return y.float().square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert per_sample["weight"].shape == (3, 4, 8)
    whole = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(per_sample["weight"].sum(0), whole["weight"], rtol=2**-6, atol=2**-4)


class Region(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return ops.linear(x, self.module, "triton")


def test_compiled_code(device):
    region, x = Region(nn.Linear(8, 4, device=device)), torch.randn(5, 8, device=device).bfloat16()
    compiled = torch.compile(region, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (region, compiled):
        region.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            function(x).square().sum().backward()
        grads.append(region.module.weight.grad)
    torch.testing.assert_close(*grads, rtol=2**-7, atol=2**-5)


def test_a_second_derivative_is_refused(device):
    module, x = nn.Linear(8, 4, device=device), torch.randn(5, 8, device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        loss = ops.linear(x, module, "triton").square().sum()
    with pytest.raises(RuntimeError, match="no second derivative.*kernels='torch'"):
        torch.autograd.grad(loss, module.weight, create_graph=True)


def test_deterministic_algorithms(device, product):
    module, x = nn.Linear(8, 4, device=device), torch.randn(5, 8, device=device).bfloat16()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        torch.use_deterministic_algorithms(True)
        with torch.autocast(device.type, torch.bfloat16):
            ops.linear(x, module, "triton").square().sum().backward()
    assert module.weight.grad.isfinite().all()
