"""GPT-2: the model, its weights, data, training, generation and evaluation, and HuggingFace's GPT-2 accelerated."""

import sys

from fastgpt2.gpt2._moved import MovedModules

sys.meta_path.append(MovedModules())
