"""Linear layers on a CPU: oneDNN's numbers are PyTorch's, and what it does not take goes to PyTorch."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from numerics import check

from fastgpt2.gpt2 import linear as module
from fastgpt2.gpt2.hardware import cpu_vendor
from fastgpt2.gpt2.linear import MIN_ROWS, linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


def operands(*shape: int, N: int = 24, bias: bool = True) -> list[torch.Tensor]:
    x, weight = torch.randn(*shape), torch.randn(N, shape[-1])
    return [x, weight, torch.randn(N)] if bias else [x, weight]


@pytest.fixture
def products(monkeypatch) -> list:
    """Shapes of what oneDNN multiplies, as on a CPU where it is the faster one."""
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(module, "FASTER_BACKWARD", True)
    seen: list = []
    product = module._product

    def counted(x, *rest):
        seen.append(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr(module, "_product", counted)
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(16, 1), (17, 7), (2, 9, 33), (3, 1, 16, 40), (128, 384)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_rule(shape, bias, products):
    check(linear, F.linear, *operands(*shape, bias=bias))
    rows = math.prod(shape[:-1])
    assert products == [shape, (rows, 24)], "forward and the gradient of x"


@needs_onednn
def test_without_avx512_the_backward_is_pytorchs(products, monkeypatch):
    monkeypatch.setattr(module, "FASTER_BACKWARD", False)
    check(linear, F.linear, *operands(2, 9, 33))
    assert products == [(2, 9, 33)], "the forward alone"


def test_elsewhere_it_is_pytorchs(products, monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", False)
    x, weight, bias = operands(20, 32)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias)) and not products


def test_the_maker_of_the_cpu(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon by AuthenticAMD\n")
    assert cpu_vendor(file) == "GenuineIntel"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu_vendor(file) == cpu_vendor(tmp_path / "none") == ""


@needs_onednn
def test_strides(products):
    x, weight, bias = operands(4, 8, 40)
    check(linear, F.linear, x.transpose(0, 1)[..., 3:35], weight[:, :32], bias)
    check(linear, F.linear, x[:1, :1, :].expand(4, 8, 40), weight, bias, upstream=lambda y: torch.ones(()).expand_as(y))
    assert len(products) == 4


@needs_onednn
@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted, products):
    inputs = operands(20, 32)

    def gradient(function, needed):
        own = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        function(*own).square().sum().backward()
        return own[wanted].grad

    torch.testing.assert_close(gradient(linear, [wanted]), gradient(F.linear, range(3)), rtol=1e-4, atol=1e-3)
    assert len(products) == (2 if wanted == 0 else 1)


@needs_onednn
def test_the_gradient_has_a_gradient():
    inputs = [t.requires_grad_() for t in operands(20, 8)]

    def twice(function):
        (first,) = torch.autograd.grad(function(*inputs).tanh().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[:2])

    for ours, theirs in zip(twice(linear), twice(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("what", ["few rows", "none", "float64", "bfloat16", "autocast", "functorch", "without oneDNN"])
def test_the_rest_is_pytorchs(what, products):
    rows = {"few rows": MIN_ROWS - 1, "none": 0}.get(what, 20)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(what, torch.float32)
    inputs = [t.to(dtype) for t in operands(rows, 16)]
    function = torch.func.vmap(linear, in_dims=(0, None, None)) if what == "functorch" else linear
    if what == "functorch":
        inputs[0] = inputs[0].expand(2, rows, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        with mock.patch.object(torch.backends.mkldnn, "is_available", lambda: what != "without oneDNN"):
            y, expected = function(*inputs), F.linear(*inputs)
    assert products == [] and torch.equal(y, expected)


def test_a_model_trains_through_it(products):
    from fastgpt2 import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=16, vocab_size=37, n_layer=1, n_head=2, n_embd=32), kernels="torch")
    idx, targets = torch.randint(37, (2, 2, 16))
    model(idx, targets)[1].backward()
    if torch.backends.mkldnn.is_available():
        assert len(products) == 10, "four linear layers and the head, forward and backward"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
