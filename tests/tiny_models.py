"""Models so small that a test writes many tokens, with logits so far apart that rounding decides nothing."""

import torch
from torch import nn

from fastgpt2 import GPT, GPTConfig


def tiny(**settings) -> GPT:
    torch.manual_seed(0)
    sizes = dict(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**sizes, **settings}), kernels="torch")
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # so that logits differ
    # So that greedy text does not end in one token: none is likely everywhere, and none makes itself likely.
    if model.config.bias:
        nn.init.zeros_(model.transformer.ln_f.bias)
    nn.init.constant_(model.transformer.ln_f.weight, -1.0)
    nn.init.normal_(model.transformer.wpe.weight)
    return model
