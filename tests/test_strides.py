"""Every tensor of every operator, gradients included, is right with any strides: vectors above all, of which kernels
read consecutive elements. The interpreter reads NaN where a kernel reads between a strided tensor's numbers.
"""

import pytest
import torch
from calls import CALLS
from interpreter import red_zones
from strides import STRIDES, strided

from fastgpt2.bench.cases.call import Call
from fastgpt2.gpt2.linear import linear

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def results(call: Call, inputs: tuple, move=lambda t: t) -> list[torch.Tensor]:
    leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
    return call.results(leaves, move)


@pytest.mark.parametrize("how", STRIDES[1:])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_one_strided_tensor_at_a_time(call, how, device):
    inputs = call.inputs(torch.float32, device)
    for i, x in enumerate(inputs):
        if (call.op, i) == ("decode_attention", 1) and how != "offset":
            continue  # the cache, which is written to: refused by name (test_decode_operator.py)
        if how == "expanded" and not x.is_floating_point():
            continue  # document starts have to rise
        moved = strided(x.detach(), how).requires_grad_(x.requires_grad)
        plain = moved.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)
        with red_zones() as zone:
            ours = results(call, (*inputs[:i], zone(moved), *inputs[i + 1 :]))
        for a, b in zip(ours, results(call, (*inputs[:i], plain, *inputs[i + 1 :])), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, i=i: f"input {i}: {text}")


@pytest.mark.parametrize("how", STRIDES[1:])
@pytest.mark.parametrize("call", [c for c in CALLS if c.differentiable], ids=lambda call: call.name)
def test_strided_upstream_gradients(call, how, device):
    inputs = call.inputs(torch.float32, device)
    ours = results(call, inputs, lambda t: strided(t, how))
    plain = results(call, inputs, lambda t: strided(t, how).clone(memory_format=torch.contiguous_format))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", STRIDES[1:])
def test_linear_on_a_cpu(how, grad):
    """oneDNN reads a bias as if it were contiguous."""
    operands = torch.randn(16, 8), torch.randn(5, 8), torch.randn(5)
    for i in range(3):
        moved = [strided(t, how) if i == j else t for j, t in enumerate(operands)]
        plain = [t.clone(memory_format=torch.contiguous_format) for t in moved]
        with torch.set_grad_enabled(grad):
            ours = linear(*[t.requires_grad_(grad) for t in moved])
            torch.testing.assert_close(ours, torch.nn.functional.linear(*plain))
