"""Text in, tokens out: sources, tokenizers, token shards, and the windows that a model trains on."""

from fastgpt2.gpt2._moved import moved_names

__getattr__ = moved_names(__name__, {"Windows": "windows"})
