"""The processes of one run: who they are, what they tell one another, and a model spread over them.

    torchrun --standalone --nproc_per_node=8 -m fastgpt2.gpt2 train ...

One process that torchrun did not start is a run of its own, and everything here then does nothing.
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
    """rank: of this process, 0..size - 1; the first one writes. device: where this process computes."""

    device: torch.device
    rank: int = 0
    size: int = 1
    began: bool = False  # the process group is this run's own

    @classmethod
    def join(cls, device: str) -> Ranks:
        """This process among those that torchrun started, each with the GPU of its local rank; alone without torchrun.

        Collectives go through NCCL between GPUs and through gloo between CPUs, or through the process group that is
        there already. Call `leave` at the end.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(torch.device(device))
        place = torch.device(device)
        if place.type == "cuda":
            if place.index is not None:
                raise ValueError(f"device is {device!r}, with {size} processes each takes its own: give cuda")
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        began = not dist.is_initialized()
        if began:
            cuda = place.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
        return cls(place, dist.get_rank(), size, began)

    def leave(self) -> None:
        if self.began:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_reduce_mean(self, values: Tensor) -> list[float]:
        """Of every element over the ranks, on each of them. Waits for the device."""
        return [value / self.size for value in self.all_reduce(values)]

    def all_reduce(self, values: Tensor) -> list[float]:
        """Of every element over the ranks, on each of them. Waits for the device."""
        values = values.detach().to(self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def all_reduce_max(self, value: int) -> int:
        """On any rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def broadcast(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; only rank 0 calls it. Waits for rank 0.

        Raises on every rank where it raises.
        """
        value = self.on_all(work if self.first else lambda: None)
        if self.size == 1:
            return cast(T, value)
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return cast(T, box[0])

    def on_all(self, work: Callable[[], T]) -> T:
        """What `work` returns on this rank, once it is done on all of them.

        Raises on every rank where it raises on one: a rank that went on alone would wait for the others for ever.
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
        """What each rank has, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def parallelize(model: GPT, ranks: Ranks, parallel: str, compile: bool) -> nn.Module:
    """What a step calls instead of `model`, whose parameters it shares: averages gradients over the ranks.

    parallel: "ddp": every rank holds the model. "fsdp": every rank holds a part of each parameter, of its gradient and
        of the optimizer's state (FSDP2); call it before the optimizer is made.
    """
    if ranks.size > 1 and parallel == "fsdp":
        _shard(model, ranks)
    compiled: Any = torch.compile(model) if compile else model
    if ranks.size > 1 and parallel == "ddp":
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(compiled, device_ids=ids)
    return compiled


def _shard(model: GPT, ranks: Ranks) -> None:
    """A block's parameters are gathered before its forward and before its backward, and given up after each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The model computes nothing in place on a view, which FSDP2 warns of whenever a module returns one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def set_gradient_sync(module: Any, wanted: bool) -> None:
    """Whether the next forward and backward of what `parallelize` gave average gradients: only a step's last pass does.

    To be set before the forward: DDP decides there.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(wanted)
