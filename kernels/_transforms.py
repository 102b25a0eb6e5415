"""Operators inside of the transforms of torch.func: vmap calls them sample by sample, grad takes their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """What `vmap` makes of an operator: a call a sample, the results stacked."""
    calls = [
        operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])
