"""One rank of the test of DistributedDataParallel: python ddp_worker.py RANK RANKS FOLDER

Takes its rows of FOLDER/batch.pt through FOLDER/model.pt wrapped in DDP; leaves its gradients in FOLDER/grads_RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import GPT, GPTConfig


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["config"]), kernels="triton")  # its own random weights: DDP spreads those of rank 0
    if rank == 0:
        model.load_state_dict(saved["weights"])
    wrapped = DistributedDataParallel(model)
    idx, targets = (t.chunk(ranks)[rank] for t in torch.load(folder / "batch.pt", weights_only=True))
    wrapped(idx, targets)[1].backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"grads_{rank}.pt")
    # Freed after its process group is left, DDP may wait for a thread that waits for Python (pytorch issue 56297).
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
