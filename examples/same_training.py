"""Trains one small model four times with different implementations and plots the losses.

    TRITON_INTERPRET=1 python examples/same_training.py      # takes minutes; on a GPU, without the variable, seconds

PyTorch's kernels, Triton's kernels and HuggingFace's GPT2LMHeadModel start from the same weights and see the same
batches, so their losses differ only by rounding, which training amplifies. A run of PyTorch's kernels with another seed
is plotted for scale.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F

from fastgpt2 import GPT
from fastgpt2.gpt2.data.corpus import Corpus, load_corpus
from fastgpt2.gpt2.data.windows import Windows
from fastgpt2.gpt2.training.optim import adamw
from fastgpt2.gpt2.training.train import TrainConfig, Trainer

CONFIG = TrainConfig(
    steps=200, batch_size=1, block_size=32, n_layer=2, n_head=2, n_embd=64, dropout=0.0, lr=3e-3, min_lr=3e-4,
    warmup=20, dtype="float32",
)  # fmt: skip
SEED_NAME = "PyTorch kernels, another seed"


def ours(corpus: Corpus, kernels: str, seed: int = CONFIG.seed) -> list[float]:
    """The losses of the steps that `fastgpt2 train` makes."""
    config = TrainConfig(**{**vars(CONFIG), "kernels": kernels, "seed": seed}).on_this_machine()
    torch.manual_seed(seed)
    trainer = Trainer(config, corpus.tokenizer, corpus.train, corpus.val)
    return [trainer.step(step).loss for step in range(1, config.steps + 1)]


def huggingface(corpus: Corpus) -> list[float]:
    """The losses of the same steps with transformers' model in a plain loop."""
    config = CONFIG.on_this_machine()
    torch.manual_seed(config.seed)
    start = GPT(config.model_config(corpus.tokenizer.vocab_size)).to(config.device)
    rates = Trainer(config, corpus.tokenizer, corpus.train, corpus.val).learning_rate
    model = start.to_huggingface()
    optimizer = adamw(model, config.weight_decay, config.lr, (0.9, config.beta2), start.lm_head.weight.device.type)
    windows = Windows(corpus.train, config.block_size, config.seed)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rates(step)
        idx, targets = (t.to(config.device) for t in windows.next_batch(config.batch_size))
        loss = F.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plot(losses: dict[str, list[float]], png: str) -> None:
    """Plots the losses above, and below their differences from those of PyTorch's kernels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    steps = np.arange(1, CONFIG.steps + 1)
    styles = dict(zip(losses, (("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", ":"), ("0.6", "-")), strict=True))
    reference = np.array(next(iter(losses.values())))
    for name, values in reversed(losses.items()):
        color, line = styles[name]
        above.plot(steps, values, line, color=color, linewidth=2 if line != "-" else 1.2, label=name)
        if values is not losses[next(iter(losses))]:
            below.semilogy(steps, np.abs(values - reference).clip(1e-8), line, color=color, label=name)
    above.set(ylabel="training loss, nats a token", title="The same training, computed in three ways (float32)")
    below.set(xlabel="step", ylabel="|loss - loss with PyTorch kernels|")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs/pictures/same-training.png", help="the plot (%(default)s)")
    out = parser.parse_args().out
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("without a GPU, set TRITON_INTERPRET=1: Triton's kernels then run in its interpreter")
    corpus = load_corpus(CONFIG.data, CONFIG.tokenizer, CONFIG.val_fraction, CONFIG.block_size)
    losses = {
        "PyTorch kernels": ours(corpus, "torch"),
        "HuggingFace GPT2LMHeadModel": huggingface(corpus),
        "Triton kernels": ours(corpus, "triton"),
        SEED_NAME: ours(corpus, "torch", seed=CONFIG.seed + 1),
    }
    reference = np.array(losses["PyTorch kernels"])
    for name, values in losses.items():
        difference = np.abs(values - reference)
        print(
            f"{name:<30} last loss {values[-1]:.4f}, from PyTorch's: mean {difference.mean():.2e}, "
            f"largest {difference.max():.2e}"
        )
    plot(losses, out)


if __name__ == "__main__":
    main()
