"""One rank of two: torchrun --nproc_per_node=2 graphed_worker.py FOLDER

Graphed models in DistributedDataParallel, with what stands for graphs on CPUs, beside the same models without. Rank 0
leaves FOLDER/found.json.
"""

import copy
import json
import sys
from pathlib import Path

import graph_stand_ins
import torch
import torch.distributed as dist
from tiny_run import settings_in
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.training import step_graphs
from fastgpt2.gpt2.training.graphed import graphs_of
from fastgpt2.gpt2.training.ranks import Ranks
from fastgpt2.gpt2.training.train import TrainConfig, Trainer

OPTIONS = {
    "plain": {},
    "bucket views": dict(gradient_as_bucket_view=True),
    "unused parameters": dict(find_unused_parameters=True),
    "static": dict(static_graph=True),
}


EVENTS: list[str] = []


def steps(ddp: DistributedDataParallel, batches: list) -> list[torch.Tensor]:
    """Gradients of steps of three passes, of which the last one reduces; what happens when, in EVENTS."""
    torch.manual_seed(dist.get_rank())  # dropout's
    found = []
    EVENTS.clear()
    for i, batch in enumerate(batches):
        EVENTS.append(f"pass {i}")
        last = i % 3 == 2
        ddp.require_backward_grad_sync = last or ddp.static_graph  # which cannot go without in its first pass
        (ddp(*batch)[1] / 3).backward()
        if last:
            found += [p.grad.clone() for p in ddp.parameters()]
            ddp.zero_grad(set_to_none=i < 6)
    return found


def compare(options: dict, segments: int | None, compiled: bool = False) -> dict:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=4, n_head=2, n_embd=16, dropout=0.1), kernels="torch")
    rows = slice(dist.get_rank(), None, 2)
    batches = [tuple(torch.randint(50, (2, 4, 8))[:, rows]) for _ in range(9)]

    def reduced(state, bucket):
        EVENTS.append("reduce")
        return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])

    found = []
    for graphs in (False, True):
        twin = copy.deepcopy(model)
        called = torch.compile(twin, backend="aot_eager") if compiled else twin
        ddp = DistributedDataParallel(called, bucket_cap_mb=25 if compiled else 0.004, **options)
        ddp.register_comm_hook(None, reduced)
        if graphs:
            graphed(ddp, *batches[0], segments=segments)
        found.append(steps(ddp, batches))
    last = EVENTS[EVENTS.index("pass 8") :]
    return dict(
        error=max((a - b).abs().max().item() for a, b in zip(*found, strict=True)),
        apart=max((a - b).abs().max().item() for a, b in zip(found[0], found[0][len(found[0]) // 3 :], strict=False)),
        segments=len(graphs_of(ddp).segments),
        last=last,
        replays=EVENTS.count("backward"),
        reduced_early=EVENTS[: EVENTS.index("pass 2")].count("reduce"),
    )


def train(folder: Path, captures: bool) -> list[float]:
    settings = {**settings_in(folder), "n_layer": 2, "dropout": 0.1, "total_batch_tokens": 256, "dtype": "float32"}
    config = TrainConfig(**settings)
    corpus = load_corpus(config.data, config.tokenizer, config.val_fraction, config.block_size)
    torch.manual_seed(0)
    trainer = Trainer(
        config,
        corpus.tokenizer,
        corpus.train,
        corpus.val,
        Ranks(torch.device("cpu"), dist.get_rank(), dist.get_world_size()),
    )
    trainer.captures = captures
    losses = [trainer.step(i).loss for i in (1, 2, 3)]
    assert (graphs_of(trainer.parallel_model) is not None) is captures
    return losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    step_graphs.Recorder = graph_stand_ins.Recorder
    replay = step_graphs.StepGraphs.replay_backward

    def logged(self, *args):
        EVENTS.append("backward")
        replay(self, *args)

    step_graphs.StepGraphs.replay_backward = logged
    found = {name: compare(options, None) for name, options in OPTIONS.items()}
    found["one segment"] = compare({}, 1)
    found["compiled"] = compare({}, None, compiled=True)
    own = folder / str(dist.get_rank())
    own.mkdir()
    found["training"] = [train(own, captures) for captures in (False, True)]
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
