"""Weights in and out: HuggingFace's model and files, and the checkpoints of runs."""
