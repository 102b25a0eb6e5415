"""How operators appear to torch.func and to PyTorch's FLOP counter.

Under vmap an operator is called once for each sample; grad uses its gradient, and there is no second derivative. The
FLOP counter sees PyTorch's matrix products inside a launcher, but products inside a kernel only through the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def register_flops(packet: Any, flops: Callable[..., int]) -> None:
    """Registers the FLOP formula of an operator. flops: called with the operator's arguments, shapes in the place of
    tensors."""
    formula = flop_counter.register_flop_formula(packet)
    formula(lambda *shapes, out_shape=None, **_: flops(*shapes))


def flops_are_counted() -> bool:
    return any(type(mode).__module__ == flop_counter.__name__ for mode in _get_current_dispatch_mode_stack())


def transformed_function(
    name: str,
    operator: Callable[..., Any],
    setup: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """The operator as a Function for vmap, grad and other transforms of torch.func, which require a separate
    setup_context."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    Transformed.__name__ = name
    return Transformed


def refusing(message: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """setup_context and backward of an operator without a gradient: backward raises RuntimeError(message)."""

    def refuse(ctx, *grads):
        raise RuntimeError(message)

    return lambda ctx, inputs, output: None, refuse


def one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """The vmap rule of an operator: calls it for each sample and stacks the results."""
    calls = [
        operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])
