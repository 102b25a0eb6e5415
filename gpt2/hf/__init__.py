from fastgpt2.gpt2.hf.attention import register, unregister
