"""Trains a GPT with HuggingFace's accelerate: accelerate launch examples/accelerate_loop.py"""

from accelerate import Accelerator

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.windows import Windows

accelerator = Accelerator(gradient_accumulation_steps=2)
rank, ranks = accelerator.process_index, accelerator.num_processes
corpus = load_corpus(None, tokenizer="byte", val_fraction=0.1, block_size=64)
windows = Windows(corpus.train, block_size=64, seed=0, rank=rank, world_size=ranks)  # disjoint over processes
model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64))
optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), accelerator.device.type)
model, optimizer = accelerator.prepare(model, optimizer)

for step in range(1, 101):
    idx, targets = (t.to(accelerator.device) for t in windows.next_batch(8))
    with accelerator.accumulate(model):
        logits, loss = model(idx, targets)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if step % 20 == 0:
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")
accelerator.unwrap_model(model).save_pretrained("own_gpt")  # GPT2LMHeadModel.from_pretrained("own_gpt") reads it
