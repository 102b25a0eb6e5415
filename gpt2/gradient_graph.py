"""Forward and backward of a training step as one CUDA graph: one launch from Python in place of hundreds.

    graph = GradientGraph(gradients, model.parameters(), idx, targets)
    loss = graph(idx, targets)                 # every p.grad is this batch's gradient
    loss = graph(idx, targets, add=True)       # and here it is added to those before it

Where Python takes longer to launch a step's kernels than the GPU takes to run them, a replay takes as long as the GPU.
The arithmetic is the same. Source: PyTorch's notes on CUDA graphs, "Whole-network capture".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # passes that compile, and allocate what a capture may not


class GradientGraph:
    """Its inputs keep their shapes, and its gradients are always in the same memory: give `p.grad` up, not its storage.

    `pool_bytes`: GPU memory that the graph holds while it lives, activations included.
    """

    def __init__(self, gradients: Callable[..., Tensor], parameters: Iterable[nn.Parameter], *inputs: Tensor):
        """gradients: of tensors like `inputs`, adds the gradients of a loss to `parameters` and returns the loss,
        detached. Waits for no device and reads nothing else that changes, but for random numbers, which go on.

        Leaves no gradients, and random numbers where they were, also where it raises RuntimeError: for what cannot be
        captured, or does not fit into memory.
        """
        self.gradients, self.parameters = gradients, list(parameters)
        self.inputs = [t.clone() for t in inputs]
        self.device = self.parameters[0].device
        before = torch.cuda.get_rng_state(self.device)
        try:
            self._warm_up()
            self._forget_gradients()  # so that the graph writes gradients, not adds to them
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved(self.device)
            self._first, self._first_loss = _capture(self._work, self.device)
            self.pool_bytes = torch.cuda.memory_reserved(self.device) - reserved
            self._grads = [p.grad for p in self.parameters]
        finally:
            self._forget_gradients()
            torch.cuda.set_rng_state(before, self.device)
        self._add: Any = None

    def __call__(self, *inputs: Tensor, add: bool = False) -> Tensor:
        """-> the loss. add: to the gradients of the call before, which are still there."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        for p, grad in zip(self.parameters, self._grads, strict=True):
            p.grad = grad
        if add and self._add is None:
            before = torch.cuda.get_rng_state(self.device)
            self._add = _capture(self._work, self.device, self._first.pool())
            torch.cuda.set_rng_state(before, self.device)
        graph, loss = self._add if add else (self._first, self._first_loss)
        with torch.cuda.device(self.device):
            graph.replay()
        return loss.clone()

    def _warm_up(self) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._work()
            torch.cuda.current_stream().wait_stream(side)

    def _work(self) -> Tensor:
        return self.gradients(*self.inputs)

    def _forget_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def _capture(work: Callable[[], Tensor], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """(a graph of `work`, what it returns whenever the graph is replayed)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
        out = work()
    return graph, out
