"""HuggingFace's GPT-2 made fast in place: their model, trainer and files, these kernels.

from fastgpt2 import hf

hf.register()                    # attn_implementation="fastgpt2" for any of their GPT-2 classes; hf.unregister()
hf.accelerate(model)             # a live GPT2LMHeadModel: every op by `Kernels`, same parameters; hf.restore(model)
print(hf.report(model))          # op, road, why
"""

from fastgpt2.gpt2.hf.attention import register, unregister
from fastgpt2.gpt2.hf.in_place import accelerate, restore
from fastgpt2.gpt2.hf.table import report

__all__ = ["accelerate", "register", "report", "restore", "unregister"]
