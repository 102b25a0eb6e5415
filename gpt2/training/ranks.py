"""The processes of one run (ranks), their communication, and the parallel model.

    torchrun --standalone --nproc_per_node=8 -m fastgpt2.gpt2 train ...

Without torchrun there is one process, and all communication is skipped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt2.gpt2.model import GPT

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """rank: the number of this process, 0..size - 1; rank 0 writes files. size: the number of processes. device: where
    this process computes."""

    device: torch.device
    rank: int = 0
    size: int = 1
    began: bool = False  # whether `join` created the process group

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Joins the processes that torchrun started, each with the GPU of its local rank. Without torchrun, size is 1.

        Collectives use NCCL between GPUs and gloo between CPUs, or an existing process group. Call `leave` at the end.
        Raises ValueError if several processes are given one GPU by its index.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(torch.device(device))
        place = torch.device(device)
        if place.type == "cuda":
            if place.index is not None:
                raise ValueError(f"device is {device!r}, but each of {size} processes uses another GPU: give 'cuda'")
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        began = not dist.is_initialized()
        if began:
            cuda = place.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
        return cls(place, dist.get_rank(), size, began)

    def leave(self) -> None:
        """Destroys the process group if `join` created it."""
        if self.began:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_reduce_mean(self, values: Tensor) -> list[float]:
        """The mean of every element over the ranks, on each of them. Waits for the device."""
        return [value / self.size for value in self.all_reduce(values)]

    def all_reduce(self, values: Tensor) -> list[float]:
        """The sum of every element over the ranks, on each of them. Waits for the device."""
        values = values.detach().to(self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def all_reduce_max(self, value: int) -> int:
        """The maximum of `value` over the ranks, on each of them. Waits for the device."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def broadcast(self, work: Callable[[], T]) -> T:
        """Calls `work` on rank 0 only and returns its result on every rank. Waits for rank 0.

        If it raises, every rank raises.
        """
        value = self.on_all(work if self.first else lambda: None)
        if self.size == 1:
            return cast(T, value)
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return cast(T, box[0])

    def on_all(self, work: Callable[[], T]) -> T:
        """Calls `work` on every rank and returns this rank's result when all ranks are done.

        If it raises on one rank, every rank raises, because a rank that continued alone would wait for the others
        forever.
        """
        if self.size == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except Exception as problem:
            error = problem
        said = self.gather(None if error is None else str(error) or repr(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RuntimeError(f"rank {rank}: {text}")
        return cast(T, value)

    def gather(self, value: Any) -> list[Any]:
        """The list of every rank's `value`, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def parallelize(model: GPT, ranks: Ranks, parallel: str, compile: bool) -> nn.Module:
    """The module that training steps call instead of `model`. It shares the model's parameters and averages gradients
    over the ranks.

    parallel: with "ddp" every rank holds the whole model. With "fsdp" every rank holds a part of each parameter, of its
        gradient and of the optimizer's state (FSDP2); call this before the optimizer is created.
    """
    if ranks.size > 1 and parallel == "fsdp":
        _shard(model, ranks)
    compiled: Any = torch.compile(model) if compile else model
    if ranks.size > 1 and parallel == "ddp":
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(compiled, device_ids=ids)
    return compiled


def _shard(model: GPT, ranks: Ranks) -> None:
    """Shards the model with FSDP2. A block's parameters are gathered before its forward and before its backward, and
    freed after each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # FSDP2 warns about in-place operations on views whenever a module returns a view. The model makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def set_gradient_sync(module: Any, wanted: bool) -> None:
    """Sets whether the next forward and backward of `module`, made by `parallelize`, average gradients over the ranks.
    Only the last pass of a step needs to. Call this before the forward, in which DDP reads the setting."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(wanted)
