"""One small call of a public kernel function, with one of its options, for tests of bounds and races.

    inputs = call.inputs(torch.bfloat16, device)
    results = call.results(inputs)                    # outputs, then the gradient of every floating input

Sizes are odd and not multiples of a tile in any dimension, so that masks matter. Rows made by `sliced` have gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class New:
    """Makes the inputs of a call, the same ones every time, in its dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def sliced(self, *shape: int) -> Tensor:
        """Normal numbers in rows with a gap of 5 elements between them."""
        return self(*shape[:-1], shape[-1] + 5)[..., : shape[-1]]

    def below(self, limit: int, *shape: int) -> Tensor:
        """int64 from 0 to limit - 1."""
        return torch.randint(limit, shape, generator=self.generator).to(self.device)

    def values(self, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Call:
    """`function` takes the tensors that `make` returns. `op` names the public function that it calls."""

    op: str
    what: str
    make: Callable[[New], tuple[Tensor, ...]]
    function: Callable
    differentiable: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}-{self.what}"

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors. Floating-point ones require gradients, if the function has any."""
        made = self.make(New(dtype, device))
        return tuple(t.requires_grad_(t.is_floating_point() and self.differentiable) for t in made)

    def results(self, inputs: tuple[Tensor, ...], move: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        """The outputs, then the gradients that exist. move: applied to the gradients of the outputs."""
        outputs = self.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not self.differentiable:
            return list(outputs)
        generator = torch.Generator().manual_seed(2)
        upstream = [move(torch.randn(o.shape, generator=generator).to(o.device, o.dtype)) for o in outputs]
        floating = [t for t in inputs if t.is_floating_point()]
        gradients = torch.autograd.grad(outputs, floating, upstream, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]
