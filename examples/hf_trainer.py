"""Trains a GPT with HuggingFace's Trainer: python examples/hf_trainer.py (needs accelerate)

It saves checkpoints as the Trainer does by default. Run again, it goes on from the newest one.
"""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.windows import Windows


class Model(torch.nn.Module):
    """Adapts a GPT to the Trainer, which passes inputs by name and expects a dictionary with the loss."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, labels):
        return {"loss": self.gpt(input_ids, labels)[1]}

    # What the Trainer asks of a model that it saves and loads. The head is the token table under a second name, and
    # safetensors takes no weight twice.
    _keys_to_ignore_on_save = ("gpt.lm_head.weight",)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name not in self._keys_to_ignore_on_save}

    def tie_weights(self):
        self.gpt.tie_weights()


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, windows: Windows):
        self.windows = windows

    def __iter__(self):
        while True:
            idx, targets = self.windows.next_batch(1)
            yield {"input_ids": idx[0], "labels": targets[0]}


corpus = load_corpus(None, tokenizer="byte", val_fraction=0.1, block_size=64)
model = Model(GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64)))
arguments = TrainingArguments(
    "hf_trainer",
    max_steps=100,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    weight_decay=0.1,
    logging_steps=20,
    report_to="none",
)
trainer = Trainer(model, arguments, train_dataset=Rows(Windows(corpus.train, block_size=64, seed=0)))
newest = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
trainer.train(resume_from_checkpoint=newest)
model.gpt.save_pretrained("own_gpt")
