"""HuggingFace's GPT-2 accelerated in place: transformers' model, trainer and files with this package's kernels.

from fastgpt2 import hf

hf.register()                # attn_implementation="fastgpt2" for transformers' GPT-2 classes; hf.unregister()
hf.accelerate(model)         # computes a live GPT2LMHeadModel with `Kernels`, same parameters; hf.restore(model)
print(hf.report(model))      # op, road, why
"""

from fastgpt2.gpt2.hf.attention import register, unregister
from fastgpt2.gpt2.hf.in_place import accelerate, restore
from fastgpt2.gpt2.hf.table import report

__all__ = ["accelerate", "register", "report", "restore", "unregister"]
