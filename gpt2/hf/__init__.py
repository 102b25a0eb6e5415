from fastgpt2.gpt2.hf.attention import register, unregister
from fastgpt2.gpt2.hf.in_place import accelerate, restore
