"""Launches of kernels that read tensors through descriptors, by the Tensor Memory Accelerator (TMA) of sm_90 and newer.

A descriptor holds the address, sizes and strides of a tensor. One instruction copies a block of it to shared memory,
without registers, pointers and masks; elements outside the tensor are 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._frozen import Launch
from ._trace import is_traced


def describable(x: Tensor) -> bool:
    """Whether a descriptor can hold x (B, T, C): rows that follow each other, address and strides of whole 16 bytes.

    False while torch.compile traces, because its graph holds pointers.
    """
    if is_traced():
        return False
    (_, T, C), (b, t, one) = x.shape, x.stride()
    return (
        one == 1 and t >= C and b >= T * t and b % t == 0 and t * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    )


class DescribedLaunch(Launch):
    """As `Launch`, for a kernel whose first arguments are descriptors with blocks of the shapes `blocks`.

    Triton makes every launch, because a descriptor contains its tensor's address.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], blocks: tuple[tuple[int, ...], ...], *numbers: Any, **options: Any
    ):
        super().__init__(kernel, grid, *numbers, **options)
        self.blocks = blocks

    def __call__(self, *tensors: Tensor | None) -> None:
        """tensors: one for each descriptor and pointer argument."""
        n = len(self.blocks)
        described = [TensorDescriptor.from_tensor(t, list(b)) for t, b in zip(tensors[:n], self.blocks, strict=True)]
        self.kernel[self.grid](*described, *tensors[n:], *self.numbers, **self.options)
