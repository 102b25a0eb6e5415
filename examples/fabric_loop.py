"""Trains a GPT with Lightning Fabric: python examples/fabric_loop.py (needs lightning-fabric)"""

from lightning_fabric import Fabric

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.windows import Windows

fabric = Fabric(devices="auto")
fabric.launch()
corpus = load_corpus(None, tokenizer="byte", val_fraction=0.1, block_size=64)
windows = Windows(corpus.train, block_size=64, seed=0, rank=fabric.global_rank, world_size=fabric.world_size)
model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64))
optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), fabric.device.type)
model, optimizer = fabric.setup(model, optimizer)

for step in range(1, 101):
    idx, targets = (fabric.to_device(t) for t in windows.next_batch(8))
    logits, loss = model(idx, targets)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        fabric.print(f"step {step}: loss {loss.item():.3f}")
