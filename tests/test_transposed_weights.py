"""Weights that are transposes, as those of transformers' Conv1D: their gradients come in the layout of the parameter,
which autograd then keeps as they are. Those of any other layout it copies, in a launch that moves 8 bytes an element.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hf_models import DEVICE, hf_gpt2
from numerics import check
from test_matmul import widening_products_on_the_cpu
from torch import Tensor, nn

from fastgpt2 import hf
from fastgpt2.bench.audit.dispatch import Traffic, count_traffic
from fastgpt2.gpt2 import linear as cpu_linear
from fastgpt2.gpt2 import ops
from fastgpt2.kernels import _device, _matmul
from fastgpt2.kernels.mlp import fused_mlp, mlp

C, H, ROWS = 24, 40, 18
IDS = torch.arange(2 * 16, device=DEVICE).view(2, 16) * 7 % 61
SETTINGS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}
settings = pytest.mark.parametrize("setting", SETTINGS)
layouts = pytest.mark.parametrize("transposed", [False, True], ids=["nn.Linear", "Conv1D"])
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def autocast(setting: str):
    dtype = SETTINGS[setting][1]
    return torch.autocast(DEVICE.type, dtype) if dtype else contextlib.nullcontext()


def parameter(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> nn.Parameter:
    """A contiguous parameter, which stands for a weight (rows, columns) or for its transpose."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5
    return nn.Parameter((weight.t().contiguous() if transposed else weight).to(DEVICE, dtype))


def backward(loss: Tensor, parameters: list[nn.Parameter]) -> Traffic:
    """The traffic of a backward after which every gradient is what autograd was given, not a copy."""
    given: dict[int, int] = {}
    for i, p in enumerate(parameters):
        p.grad = None
        p.register_hook(lambda grad, i=i: given.update({i: grad.data_ptr()}))
    with count_traffic(parameters) as traffic:
        loss.backward()
    assert [given[i] for i in range(len(parameters))] == [p.grad.data_ptr() for p in parameters]
    assert all(p.grad.stride() == p.stride() for p in parameters)
    return traffic


@layouts
@settings
@pytest.mark.parametrize("op", [mlp, fused_mlp], ids=["mlp", "fused_mlp"])
def test_mlp(op, setting, transposed):
    dtype, _ = SETTINGS[setting]
    parameters = [parameter(H, C, transposed, dtype), parameter(C, H, transposed, dtype)]
    x = torch.randn(2, ROWS // 2, C, device=DEVICE, dtype=dtype)

    def loss() -> Tensor:
        fc_weight, proj_weight = (p.t() if transposed else p for p in parameters)
        with autocast(setting):
            return op(x, fc_weight, None, proj_weight).float().square().sum()

    traffic = backward(loss(), parameters)
    assert traffic.calls["clone"] == traffic.calls["copy_"] == 0, traffic
    once = [p.grad.clone() for p in parameters]
    loss().backward()
    for p, grad in zip(parameters, once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad, rtol=0, atol=0)


@layouts
@settings
def test_layer(setting, transposed):
    """By the kernels' road, by PyTorch's and by oneDNN on a CPU."""
    dtype, _ = SETTINGS[setting]
    weight, bias = parameter(H, C, transposed, dtype), nn.Parameter(torch.randn(H, device=DEVICE, dtype=dtype))
    x = torch.randn(2, ROWS, C, device=DEVICE, dtype=torch.bfloat16 if setting == "autocast" else dtype)

    def layer(switch: str) -> Tensor:
        with autocast(setting):
            return ops._linear(x, weight.t() if transposed else weight, bias, switch)

    for switch in ("torch", "triton"):
        backward(layer(switch).float().square().sum(), [weight, bias])


@pytest.mark.parametrize("product", ["counted", "by a GPU's product"])
def test_the_rule_holds_for_transposes(product):
    """And gradients of float32 parameters under autocast are as little rounded as those of others."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.linear(x, weight.t()).bfloat16()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return ops._linear(x, weight.t(), None, "triton")

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.linear(x, weight.t()).bfloat16()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return F.linear(x, weight.t())

    inputs = torch.randn(3, 50, C, device=DEVICE).bfloat16(), torch.randn(C, H, device=DEVICE) / C**0.5
    with contextlib.ExitStack() as stack:
        if product != "counted" and DEVICE.type == "cpu":
            stack.enter_context(widening_products_on_the_cpu())
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(_device, "mixed_matmul", lambda device: "mm")
        errors = check(layer, eager, *inputs, names=("x", "weight"))
    assert errors["grad of weight"].ours < errors["grad of weight"].eager / 8


@pytest.mark.parametrize(
    "weight", [torch.empty(8, 5), torch.empty(5, 8).t(), torch.empty(8, 9)[:, :5], torch.empty(1, 5).t()]
)
def test_the_fake_has_the_same_layout(weight):
    N, K = weight.shape
    grad = _matmul.weight_gradient(torch.randn(3, N), torch.randn(3, K), weight, torch.float32)
    fake = _matmul.weight_gradient_fake(weight, torch.float32)
    assert (fake.shape, fake.stride(), fake.dtype) == (grad.shape, grad.stride(), grad.dtype)


def test_opcheck():
    weights = [torch.randn(C, H, device=DEVICE).t(), torch.randn(H, C, device=DEVICE).t()]
    dout, x, pre = (torch.randn(ROWS, size, device=DEVICE) for size in (C, C, H))
    arguments = dout, x, pre, weights[0], None, weights[1], [True, True, False, True, False], False
    torch.library.opcheck(torch.ops.fastgpt2.mlp_bwd.default, (*arguments, torch.float32, torch.float32))


@pytest.mark.parametrize("with_onednn", [False, True])
@pytest.mark.parametrize("setting", ["float32", "autocast"])
@pytest.mark.parametrize("kernels", ["torch", "triton", "mlp=fused"])
def test_a_model_of_transformers(kernels, setting, with_onednn, monkeypatch):
    monkeypatch.setattr(cpu_linear, "ONEDNN_IS_FASTER", with_onednn)
    model = hf.accelerate(hf_gpt2(n_layer=1).to(DEVICE), kernels)

    def loss() -> Tensor:
        with autocast(setting):
            return model(IDS, labels=IDS).loss

    layers = [
        p for name, p in model.named_parameters() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
    ]
    assert len(layers) == 4
    traffic = backward(loss(), layers)
    assert traffic.calls["clone"] == traffic.calls["copy_"] == 0, traffic
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(p.grad.is_contiguous() for p in model.parameters()), "the tied table's too"
    loss().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name], rtol=0, atol=0)
