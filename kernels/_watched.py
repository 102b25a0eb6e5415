"""What an operator is to those who watch or transform what PyTorch computes: torch.func and the FLOP counter.

vmap calls an operator sample by sample, grad takes its gradient, and of that there is no other. The FLOP counter sees
PyTorch's products inside a launcher by itself, and for kernels with products of their own needs the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def register_flops(packet: Any, flops: Callable[..., int]) -> None:
    """flops: of the operator's arguments, with shapes in the place of tensors."""
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
    """The operator inside of vmap, grad and the other transforms of torch.func, which want the parts separate."""

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
    """The setup_context and backward of an operator that has no gradient."""

    def refuse(ctx, *grads):
        raise RuntimeError(message)

    return lambda ctx, inputs, output: None, refuse


def one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """What `vmap` makes of an operator: a call a sample, the results stacked."""
    calls = [
        operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])
