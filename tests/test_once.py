"""Derivatives that there are none of are refused, and not dropped: second ones, and those of forward mode."""

import pytest
import torch
from calls import CALLS
from torch.autograd import forward_ad

DIFFERENTIABLE = [c for c in CALLS if c.differentiable and c.what in ("plain", "sliced", "mean", "many-rows")]


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=lambda call: call.name)
def test_second_derivatives_are_refused(call, device):
    """Here the upstream gradient is a constant, for which PyTorch's once_differentiable drops them."""
    inputs = call.inputs(torch.float32, device)
    output = call.function(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    floating = [t for t in inputs if t.is_floating_point()]
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(output.sum(), floating, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=lambda call: call.name)
def test_forward_mode_is_refused(call, device):
    inputs = [t.detach() for t in call.inputs(torch.float32, device)]
    i = next(i for i, t in enumerate(inputs) if t.is_floating_point())
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        inputs[i] = forward_ad.make_dual(inputs[i], torch.ones_like(inputs[i]))
        call.function(*inputs)
