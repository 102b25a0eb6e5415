"""A kernel case: a public kernel function at one shape and dtype, its inputs, the same in plain PyTorch, and its cost.

The files in ops/ make the cases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (768, 1024, 1280, 1600)  # gpt2, -medium, -large, -xl
VOCABULARY = 50257
HEAD_SIZE = 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"float32": FP32, "bfloat16": BF16, "float16": FP16}

# new(*shape, dtype=None, below=None, mean=0, std=1) makes one input of a case, on the scale of GPT-2's activations.
New = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`op`: a function of fastgpt2.kernels, `toggle`: its switch. `ours`, `reference`, `eager` take the same inputs."""

    op: str
    toggle: str
    shape: str
    dtype: torch.dtype
    make_inputs: Callable[[New], tuple]
    ours: Callable
    reference: Callable  # exact when its inputs are fp64
    eager: Callable  # what a PyTorch user would write
    forward_bytes: int
    backward_bytes: int | None  # None: a function without gradients
    rows: int  # tensors whose number of elements is a larger multiple of this one grow with the batch
    forward_flops: int = 0
    backward_flops: int = 0
    autocast: bool = False  # parameters and residual in fp32, run under autocast to `dtype`
    asynchronous: bool = False  # written so that sm_90 need not wait for each product of matrices right after it

    @property
    def name(self) -> str:
        dtype = "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")
        return f"{self.op}[{self.shape}-{dtype}]"

    def inputs(self, device: torch.device | str = "cpu", fill: Callable[..., Tensor] = torch.randn) -> tuple:
        """Tensors. Floating-point ones require gradients, unless the case's function has none."""

        def new(
            *shape, dtype: torch.dtype | None = None, below: int | None = None, mean: float = 0.0, std: float = 1.0
        ) -> Tensor:
            if below is not None:
                return (torch.arange(math.prod(shape), device=device) * 7919 % below).view(shape)  # scattered, distinct
            values = fill(*shape, device=device)
            if fill is torch.randn:
                values = values.mul_(std).add_(mean)
            return values.to(dtype or self.dtype).requires_grad_(self.backward_bytes is not None)

        return self.make_inputs(new)

    def forward(self, inputs: tuple, function: Callable | None = None) -> tuple[Tensor, ...]:
        """The outputs of `function`, by default ours."""
        device = next(t.device.type for t in inputs if isinstance(t, Tensor))
        with torch.autocast(device, dtype=self.dtype, enabled=self.autocast):
            outputs = (function or self.ours)(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(
        self,
        inputs: tuple,
        outputs: tuple[Tensor, ...],
        upstream: tuple[Tensor, ...] | None = None,
        again: bool = False,
    ) -> tuple:
        """The gradient of every floating-point input; () where the function has none.

        upstream: gradients of the outputs; ones by default. again: whether to keep what the forward saved, so that
        another backward can follow.
        """
        if self.backward_bytes is None:
            return ()
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        upstream = upstream or tuple(torch.ones_like(o) for o in outputs)
        return torch.autograd.grad(outputs, wanted, upstream, retain_graph=again)

    def work(self, direction: str) -> tuple[int, int]:
        """(minimum bytes, FLOPs) of "forward", "backward" or "both"; FLOPs are 0 where there are none, and where
        they cannot be split: our loss computes gradients in its forward, other implementations in their backward."""
        wide = self.backward_bytes or 0
        moved = {"forward": self.forward_bytes, "backward": wide, "both": self.forward_bytes + wide}[direction]
        forward, backward = self.forward_flops, self.backward_flops
        if direction != "both" and self.backward_bytes is not None and forward and not backward:
            return moved, 0
        return moved, {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def asked(case: Case, name: str, **more: Callable) -> Case:
    """A case whose function gets more keyword arguments and so compiles other code. Its costs and references are those
    of the plain case.

    more: the keyword arguments, each as a function of the first input.
    """

    def ours(first: Tensor, *rest):
        return case.ours(first, *rest, **{argument: make(first) for argument, make in more.items()})

    return dataclasses.replace(case, shape=f"{case.shape} {name}".strip(), ours=ours)


def dropout_of(p: float) -> dict[str, Callable]:
    """The keyword arguments of `asked` for dropout."""
    return dict(dropout_p=lambda first: p, seed=lambda first: torch.zeros(1, dtype=torch.int64, device=first.device))
