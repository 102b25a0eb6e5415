"""GPT-2: the model, its weights, training, sampling and the checks that compare it with HuggingFace's."""

import sys

from fastgpt2.gpt2._moved import MovedModules

sys.meta_path.append(MovedModules())
