"""Trains a GPT in a plain PyTorch loop: python examples/own_loop.py"""

import torch

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.windows import Windows

device = "cuda" if torch.cuda.is_available() else "cpu"
corpus = load_corpus(None, tokenizer="byte", val_fraction=0.1, block_size=64)  # None: Python's sources; or a folder
windows = Windows(corpus.train, block_size=64, seed=0)
model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64)).to(device)
optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device)
graphed(model, *windows.next_batch(8))  # steps of this shape replay CUDA graphs; without a GPU this only warns

for step in range(1, 101):
    idx, targets = (t.to(device) for t in windows.next_batch(8))  # (B, T) int64
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits, loss = model(idx, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
